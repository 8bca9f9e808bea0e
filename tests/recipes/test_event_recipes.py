"""The event recipes: their values against the published table, a few steps on true files, the demonstration."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common.config import CONFIGS, ConfigError, load_config
from common.loading import EVENT_DATA_SETS
from common.moving_shapes import DIRECTIONS, SIDE, STEPS, draw_recording, write_recordings
from launching import read_lines, read_summary
from PIL import Image

from sdt_blocks import create_model, load_model
from sdt_blocks.neuron import find_neurons
from sdt_datasets.events import EventsToFrames
from sdt_datasets.layouts import NAMES
from sdt_datasets.recordings import read_events

sys.path.insert(0, str(Path(__file__).parents[1] / "datasets"))
from writing import Writer

# data, T, pooling, event pooling, classes, optimizer, batch, lr, its minimum, its start, weight decay, TET, frame side
REGIMES = {
    "gesture_t10": ("dvs128_gesture", 10, "0111", False, 11, "lamb", 16, 2e-3, 1e-5, 1e-5, 1e-4, False, None),
    "gesture_t16": ("dvs128_gesture", 16, "0111", False, 11, "lamb", 16, 3e-4, 1e-5, 1e-6, 0.06, False, None),
    "cifar10_dvs_t10_tet": ("cifar10_dvs", 10, "0011", True, 10, "adamw", 32, 7.5e-3, 3e-4, 1e-3, 1e-4, True, 64),
    "cifar10_dvs_t16": ("cifar10_dvs", 16, "0011", True, 10, "adamw", 32, 7.5e-3, 3e-4, 1e-3, 1e-4, True, 64),
}

# data, variant, T, frame side, lr, its minimum, its start, weight decay, epochs, warm-up, cool-down, batch, seed
OTHER_FAMILIES = {
    "cifar10_dvs_spikformer": (
        "cifar10_dvs", "spikformer_2_256_dvs", 16, 128, 1e-3, 1e-5, 1e-5, 0.06, 96, 10, 10, 16, 2021,
    ),
    "cifar10_dvs_qkformer": (
        "cifar10_dvs", "qkformer_2_256_dvs", 16, 128, 5e-3, 1e-5, 1e-5, 0.06, 96, 10, 10, 16, 2021,
    ),
    "gesture_qkformer": (
        "dvs128_gesture", "qkformer_2_256_gesture", 16, 128, 1e-3, 2e-5, 1e-5, 0.06, 192, 10, 10, 16, 2021,
    ),
    "har_dvs_v3": (
        "event_folder", "sdt_v3_19m_har_dvs", 8, 224, 4e-5 * 72 / 256, 1e-6, 0.0, 0.01, 100, 5, 0, 24, 42,
    ),
}  # fmt: skip


def expect(section, **values):
    assert {key: getattr(section, key) for key in values} == values


@pytest.mark.parametrize("name", REGIMES)
def test_event_configurations_are_the_tables(name):
    data, steps, pooling, event_pooling, classes, optimizer, batch, lr, min_lr, warmup, decay, tet, size = REGIMES[name]
    config = load_config([f"config={name}"], default="digits")
    with torch.device("meta"):
        model = create_model(config.model.name, time_steps=config.model.time_steps).config
    expected = {"depth": 2, "dim": 256, "num_heads": 8, "mlp_ratio": 4, "in_channels": 2, "num_classes": classes}
    expected |= {"pooling": pooling, "event_pooling": event_pooling, "time_steps": steps, "neuron": "lif"}
    assert model.items() >= expected.items()
    expect(config.data, name=data, mixup=0.0, cutmix=0.0)
    expect(config.events, time_steps=steps, split_by="number", size=size, augment=None)
    expect(config.optim, name=optimizer, lr=lr, min_lr=min_lr, warmup_lr=warmup, weight_decay=decay, lr_batch=batch)
    expect(config.optim, eps=1e-6 if optimizer == "lamb" else 1e-8, betas=[0.9, 0.999], clip_grad=None)
    expect(config.train, epochs=200, warmup_epochs=10, cooldown_epochs=10, batch_size=batch, mixed_precision="fp16")
    expect(config.train, label_smoothing=0.1, loss="ce", tet=tet, tet_lambda=0.001, tet_means=1.0)
    assert config.seed == 42


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_configurations_of_the_other_families_are_the_tables(name):
    data, variant, steps, size, *rates, decay, epochs, warmup, cooldown, batch, seed = OTHER_FAMILIES[name]
    config = load_config([f"config={name}"], default="digits")
    mixed = {"mixup": 0.5, "mixup_prob": 0.5, "mixup_off_epoch": 75} if batch == 16 else {"mixup": 0.0}
    expect(config.data, name=data, cutmix=0.0, **mixed)
    augment = "hflip,random_op_wide" if batch == 16 else None
    expect(config.events, time_steps=steps, split_by="number", size=size, augment=augment)
    expect(config.model, name=variant, time_steps=steps, mixes_images=None)
    # Three processes on HAR-DVS, one on the others.
    scale = (3 * batch if name == "har_dvs_v3" else batch) / config.optim.lr_batch
    given = [rate * scale for rate in (config.optim.lr, config.optim.min_lr, config.optim.warmup_lr)]
    assert given == pytest.approx(rates)
    expect(config.optim, name="adamw", weight_decay=decay, eps=1e-8, betas=[0.9, 0.999], clip_grad=None)
    expect(config.train, epochs=epochs, warmup_epochs=warmup, cooldown_epochs=cooldown, batch_size=batch)
    expect(config.train, label_smoothing=0.1, loss="ce", tet=False, mixed_precision="fp16", ema_decay=None)
    expect(config.train, warmup_prefix=batch == 24)
    assert config.seed == seed


@pytest.mark.parametrize("name", [*REGIMES, *OTHER_FAMILIES, "events_demo"])
def test_the_first_line_is_the_command(name):
    recipe = {"g": "gesture", "c": "cifar10_dvs", "e": "events_demo", "h": "gesture"}[name[0]]
    arguments = "" if name == "events_demo" else f" config={name} data.root=DIR"
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# accelerate launch recipes/{recipe}.py{arguments}"
    assert (CONFIGS.parent / f"{recipe}.py").is_file()


def test_the_recipes_know_every_event_data_set():
    assert set(EVENT_DATA_SETS) == set(NAMES)
    files = {path.stem for path in CONFIGS.glob("*.yaml")}
    of_events = {name for name in files if name.startswith(("gesture", "cifar10_dvs", "har_dvs"))}
    assert of_events == {*REGIMES, *OTHER_FAMILIES}


# On the CPU there is no fp16; two updates show that data, model, loss and evaluation fit together.
FEW = (
    "train.max_steps=2", "train.batch_size=4", "train.mixed_precision=no", "tracker=none", "threads=1",
    "output_dir=run",
)  # fmt: skip
SMALL_V1 = (*FEW, "model.dim=16", "model.depth=1")


def test_gesture_recipe_on_gesture_files(tmp_path, launcher):
    Writer().gestures(tmp_path / "data", train=["user01_led", "user02_lab"], number=900)
    arguments = (*SMALL_V1, "data.root=data", "events.size=32", "events.time_steps=5", "data.workers=2")
    done = launcher.run("gesture", *arguments, launch=("--cpu",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"frames are kept in {tmp_path / 'data' / '.frames_cache'}: " in done.stdout
    summary = read_summary(tmp_path / "run")
    assert (summary["data"], summary["steps"]) == ("dvs128_gesture", 2)
    assert summary["loss"] > 0
    (line,) = read_lines(tmp_path / "run")
    assert line["test_samples"] == 11
    model = load_model(tmp_path / "run" / "last")
    assert model.config["time_steps"] == 5
    assert (model.in_channels, model.num_classes, model.per_step) == (2, 11, False)
    # Two updates of four, what the loader read ahead, and the evaluation: each recording's frames once.
    assert 19 <= len(list((tmp_path / "data" / ".frames_cache").glob("??/*.npz"))) <= 33


def test_cifar10_dvs_recipe_on_aedat4_files(tmp_path, launcher):
    Writer().cifar10_dvs(tmp_path / "data", per_class=2)
    broken = tmp_path / "data" / "CIFAR10DVS" / "cat" / "cifar10_cat_1.aedat4"
    broken.write_bytes(broken.read_bytes()[:500])
    arguments = (*SMALL_V1, "data.root=data", "events.augment=hflip,roll,cutout", "events.cache=null", "data.workers=0")
    done = launcher.run("cifar10_dvs", *arguments)
    assert done.returncode == 1
    assert f"error: {broken.relative_to(tmp_path)} cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    summary = launcher.train("cifar10_dvs", *arguments, "data.on_error=skip", "resume=none")
    assert (summary["data"], summary["steps"]) == ("cifar10_dvs", 2)
    (line,) = read_lines(tmp_path / "run")
    assert (line["test_samples"], line["unreadable"]) == (9, 1)
    model = load_model(tmp_path / "run" / "last")
    assert (model.in_channels, model.num_classes, model.per_step) == (2, 10, True)
    assert model.config["event_pooling"]


SMALL = {
    "cifar10_dvs_spikformer": ("model.dim=32", "model.depth=1", "model.num_heads=4"),
    "cifar10_dvs_qkformer": ("model.dim=32", "model.depths=[1,1]", "model.num_heads=4", "model.mixes_images=true"),
    "gesture_qkformer": ("model.dim=32", "model.depths=[1,1]", "model.num_heads=4"),
    "har_dvs_v3": ("model.dims=[16,16,16,24]", "model.depths=[1,1,1,1,1]"),
    "gesture by E-SpikeFormer": (
        "model.name=sdt_v3_6m_gesture", "model.dims=[16,16,16,24]", "model.depths=[1,1,1,1,0]",
        "data.name=dvs128_gesture",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_other_families_train_on_event_files(name, tmp_path, train):
    """Two updates, on files as each data set has them, with the configuration's own mixing and augmentation."""
    given = SMALL[name]
    config = name if name in OTHER_FAMILIES else "har_dvs_v3"
    if name.startswith("cifar10"):
        Writer().cifar10_dvs(tmp_path / "data", per_class=2)
    elif name.startswith("gesture"):
        Writer().gestures(tmp_path / "data", train=["user01_led"], number=900)
    else:
        write_recordings(tmp_path / "data", train=2, test=1)
    arguments = (
        *FEW, "data.workers=0", "data.root=data", "events.cache=null", "events.size=32",
        "events.time_steps=4",
    )  # fmt: skip
    run = train(*arguments, *given, default=config)
    classes = {"c": 10, "g": 11, "h": 4}[name[0]]
    model = load_model(tmp_path / "run" / "last")
    assert (run.position.step, model.in_channels, model.num_classes, model.time_steps) == (2, 2, classes, 4)
    assert 0 < run.position.lines[-1]["train_loss"] < 10
    assert bool(model.config.get("mixes_images")) == ("mixes_images" in given[-1])
    rates = {}
    for layer, neuron in find_neurons(model).items():
        neuron.register_forward_hook(lambda _, args, out, layer=layer: rates.update({layer: out.bool().float().mean()}))
    frames = torch.stack([run.train_loader.dataset[i][0] for i in range(4)])
    assert frames.shape == (4, 4, 2, 32, 32) and frames.any()
    model.train()(frames)
    silent = [layer for layer, rate in rates.items() if not rate]
    assert len(rates) > 10 and len(silent) < len(rates) / 4, silent  # those of few tokens and channels may be


def test_absent_data_end_the_run_with_one_paragraph(tmp_path, launcher):
    (tmp_path / "empty").mkdir()
    done = launcher.run("gesture", *SMALL_V1, "data.root=empty")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.name=dvs128_gesture: no recordings were found in empty")
    assert len(done.stderr.splitlines()) == 1


def test_a_resumed_run_sees_the_same_augmented_frames(tmp_path, train):
    write_recordings(tmp_path / "shapes", train=5, test=1)
    common = (f"data.root={tmp_path / 'shapes'}", "events.augment=event_drop,roll,cutout,random_op", "events.size=16")
    weights = []
    for name, stops in (("whole", (7,)), ("in two", (3, 7))):
        for stop in stops:
            run = train(
                *SMALL_V1, "data.workers=0", *common, f"train.max_steps={stop}", f"output_dir={tmp_path / name}",
                "train.checkpoint_steps=1", default="events_demo",
            )  # fmt: skip
        weights.append({key: value.clone() for key, value in run.plain.state_dict().items()})
    whole, resumed = weights
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert run.position.step == 7


# Moving shapes


def test_recordings_are_written_once_and_are_the_same(tmp_path):
    for name in ("one", "two"):
        write_recordings(tmp_path / name, train=3, test=2, seed=5)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.npy"))
    assert len(files) == 4 * 5
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    (tmp_path / "one" / files[0]).unlink()
    write_recordings(tmp_path / "one", train=3, test=2, seed=5)
    assert not (tmp_path / "one" / files[0]).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def frames_of(direction, count):
    to_frames = EventsToFrames(sensor_size=(SIDE, SIDE, 2), time_steps=STEPS)
    recordings = [draw_recording(np.random.default_rng([7, number]), direction) for number in range(count)]
    events = [np.zeros(len(r), dtype=[(name, int) for name in "xypt"]) for r in recordings]
    for structured, columns in zip(events, recordings, strict=True):
        for name, column in zip("xypt", columns.T, strict=True):
            structured[name] = column
    return np.stack([to_frames(one) for one in events])


def test_frames_are_the_steps_of_the_motion():
    """Equal numbers of events are equal steps; each frame is the one before it, moved, but for polarity and noise."""
    for direction, (down, right) in DIRECTIONS.items():
        places = frames_of(direction, 20).sum(2) > 0
        for step in range(STEPS - 1):
            moved = np.roll(places[:, step], (2 * down, 2 * right), axis=(1, 2))
            kept = (moved & places[:, step + 1]).sum((1, 2)) / places[:, step].sum((1, 2))
            assert kept.min() > 0.6


def test_no_single_frame_gives_the_direction_away():
    """The same frame belongs to all four directions equally: at each step the frames of one direction, moved to where
    another direction would be, are frames of that other direction."""
    frames = {direction: frames_of(direction, 10) for direction in DIRECTIONS}
    for direction, (down, right) in DIRECTIONS.items():
        for other, (other_down, other_right) in DIRECTIONS.items():
            for step in range(STEPS):
                shift = (2 * step * (other_down - down), 2 * step * (other_right - right))
                moved = np.roll(frames[direction][:, step].sum(1) > 0, shift, axis=(1, 2))
                agree = (moved & (frames[other][:, step].sum(1) > 0)).sum((1, 2))
                # All of the shape, which starts at the same place; the noise stays where it is.
                assert (agree >= moved.sum((1, 2)) - 16).all()


def check_demo(tmp_path, launcher, *arguments):
    summary = launcher.train("events_demo", "output_dir=demo", "tracker=none", *arguments)
    with Image.open(tmp_path / "demo" / "events_demo.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 800
    colored = (pixels.max(2) - pixels.min(2) > 80).mean()
    assert 0.01 < colored < 0.6
    return summary


def test_demo_runs_and_draws(tmp_path, launcher):
    write_recordings(tmp_path / "shapes", train=4, test=2)
    summary = check_demo(
        tmp_path, launcher, "data.root=shapes", "train.max_steps=2", "train.batch_size=4", "model.dim=16", "threads=1"
    )
    assert summary["steps"] == 2


def test_demo_takes_what_training_takes(tmp_path, launcher, monkeypatch):
    import events_demo

    shown = launcher.run("events_demo", "--print-config", "train.epochs=3")
    assert shown.returncode == 0 and "epochs: 3" in shown.stdout and not list(tmp_path.iterdir())
    monkeypatch.setattr(events_demo, "TRAIN", 1)
    root = f"data.root={tmp_path / 'shapes'}"
    runs = events_demo.prepare([root, "seeds=3,4", "output_dir=demo"])
    assert [run.output_dir for run in runs] == ["demo/seed_3", "demo/seed_4"]
    assert [run.output_dir for run in events_demo.prepare([root, "output_dir=demo"])] == ["demo"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.root=.*file/shapes: no recordings can be written there"):
        events_demo.prepare([f"data.root={tmp_path / 'file' / 'shapes'}"])


@pytest.mark.slow
def test_demo_learns_the_four_directions(tmp_path, launcher):
    summary = check_demo(tmp_path, launcher)
    assert summary["test_top1"] >= 90
    assert len(list((tmp_path / "runs" / "moving_shapes" / "test").glob("*/*.npy"))) == 200


def test_the_real_recording_comes_with_its_license():
    folder = CONFIGS.parent / "data"
    assert len(read_events(folder / "davis346_crop.npz")) == 17_284
    assert "MIT License" in (folder / "davis346_LICENSE").read_text()


def test_one_class_is_nothing_to_train_on(set_up, tmp_path):
    write_recordings(tmp_path / "shapes", train=2, test=1)
    for split in ("train", "test"):
        for folder in sorted((tmp_path / "shapes" / split).iterdir())[1:]:
            shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"the data has one class, '\w+'; a classifier needs at least two"):
        set_up("data.root=shapes", "tracker=none", "threads=1", "output_dir=run", default="events_demo")
