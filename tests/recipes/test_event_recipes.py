"""The event recipes: their values against the published table, a few steps on true files, the demonstration."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common.config import CONFIGS, load_config
from common.loading import EVENT_DATA_SETS
from common.moving_shapes import DIRECTIONS, SIDE, STEPS, draw_recording, write_recordings
from launching import read_lines, read_summary
from PIL import Image

from sdt_blocks import create_model, load_model
from sdt_datasets.events import EventsToFrames
from sdt_datasets.layouts import NAMES
from sdt_datasets.recordings import read_events

sys.path.insert(0, str(Path(__file__).parents[1] / "datasets"))
from writing import Writer

# data, T, pooling, event pooling, classes, optimiser, batch, lr, its minimum, its start, weight decay, TET, frame side
REGIMES = {
    "gesture_t10": ("dvs128_gesture", 10, "0111", False, 11, "lamb", 16, 2e-3, 1e-5, 1e-5, 1e-4, False, None),
    "gesture_t16": ("dvs128_gesture", 16, "0111", False, 11, "lamb", 16, 3e-4, 1e-5, 1e-6, 0.06, False, None),
    "cifar10_dvs_t10_tet": ("cifar10_dvs", 10, "0011", True, 10, "adamw", 32, 7.5e-3, 3e-4, 1e-3, 1e-4, True, 64),
    "cifar10_dvs_t16": ("cifar10_dvs", 16, "0011", True, 10, "adamw", 32, 7.5e-3, 3e-4, 1e-3, 1e-4, True, 64),
}


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


@pytest.mark.parametrize("name", [*REGIMES, "events_demo"])
def test_the_first_line_is_the_command(name):
    recipe = {"g": "gesture", "c": "cifar10_dvs", "e": "events_demo"}[name[0]]
    arguments = "" if name == "events_demo" else f" config={name} data.root=DIR"
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# accelerate launch recipes/{recipe}.py{arguments}"
    assert (CONFIGS.parent / f"{recipe}.py").is_file()


def test_the_recipes_know_every_event_data_set():
    assert set(EVENT_DATA_SETS) == set(NAMES)
    files = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {name for name in files if name.startswith(("gesture", "cifar10_dvs"))} == set(REGIMES)


# On the CPU there is no fp16; two updates show that data, model, loss and evaluation fit together.
FEW = (
    "train.max_steps=2", "train.batch_size=4", "train.mixed_precision=no", "tracker=none", "threads=1",
    "model.dim=16", "model.depth=1", "output_dir=run",
)  # fmt: skip


def test_gesture_recipe_on_gesture_files(tmp_path, launcher):
    Writer().gestures(tmp_path / "data", train=["user01_led", "user02_lab"], number=900)
    arguments = (*FEW, "data.root=data", "events.size=32", "events.time_steps=5", "data.workers=2")
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
    arguments = (*FEW, "data.root=data", "events.augment=hflip,roll,cutout", "events.cache=null", "data.workers=0")
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


def test_absent_data_end_the_run_with_one_paragraph(tmp_path, launcher):
    (tmp_path / "empty").mkdir()
    done = launcher.run("gesture", *FEW, "data.root=empty")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.name=dvs128_gesture: no recordings were found in empty")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def set_up(tmp_path):
    """`set_up(*arguments)` makes a run in this process."""
    from accelerate.state import AcceleratorState, GradientState
    from common import set_up as module

    def make(*arguments):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return module.set_up(load_config([*FEW, "data.workers=0", *arguments], default="events_demo"))

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_a_resumed_run_sees_the_same_augmented_frames(tmp_path, set_up):
    from common.engine import train

    write_recordings(tmp_path / "shapes", train=5, test=1)
    common = (f"data.root={tmp_path / 'shapes'}", "events.augment=event_drop,roll,cutout,random_op", "events.size=16")
    weights = []
    for name, stops in (("whole", (7,)), ("in two", (3, 7))):
        for stop in stops:
            run = set_up(
                *common, f"train.max_steps={stop}", f"output_dir={tmp_path / name}", "train.checkpoint_steps=1"
            )
            train(run)
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
    coloured = (pixels.max(2) - pixels.min(2) > 80).mean()
    assert 0.01 < coloured < 0.6
    return summary


def test_demo_runs_and_draws(tmp_path, launcher):
    write_recordings(tmp_path / "shapes", train=4, test=2)
    summary = check_demo(
        tmp_path, launcher, "data.root=shapes", "train.max_steps=2", "train.batch_size=4", "model.dim=16", "threads=1"
    )
    assert summary["steps"] == 2


@pytest.mark.slow
def test_demo_learns_the_four_directions(tmp_path, launcher):
    summary = check_demo(tmp_path, launcher)
    assert summary["test_top1"] >= 90
    assert len(list((tmp_path / "runs" / "moving_shapes" / "test").glob("*/*.npy"))) == 200


def test_the_real_recording_comes_with_its_licence():
    folder = CONFIGS.parent / "data"
    assert len(read_events(folder / "davis346_crop.npz")) == 17_284
    assert "MIT License" in (folder / "davis346_LICENSE").read_text()
