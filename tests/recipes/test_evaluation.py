"""Evaluation: figures counted by hand, classes matched by name, the files that the recipe writes."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from common.config import ConfigError, load_config, to_yaml
from common.moving_shapes import DIRECTIONS, write_recordings
from common.run_state import sha256
from common.schema import Derived
from common.trained import card_of, class_names, match_classes, run_config
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sdt_blocks import LIF, DataCard, load_model, save_model
from sdt_blocks.steps import Unit

WHERE = Path("run")


class Answers(nn.Module):
    """Logits written into the images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x):
        return x[:, 0, 0, : self.num_classes]


def figures(num_classes, samples, batch_size=7, unreadable=()):
    """An evaluation of random answers, with the answers and targets themselves."""
    from accelerate import Accelerator
    from common.evaluation import evaluate
    from common.loading import ShardBatches, build_loader

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(samples, num_classes, generator=generator)
    targets = torch.randint(num_classes - 1, (samples,), generator=generator)  # the last class has no sample
    data = [
        (row.expand(1, 3, num_classes), -1 if i in unreadable else int(target))
        for i, (row, target) in enumerate(zip(logits, targets, strict=True))
    ]
    loader = build_loader(data, ShardBatches(samples, batch_size=batch_size), workers=0, pin=False)
    kept = [i for i in range(samples) if i not in unreadable]
    return evaluate(Answers(num_classes), loader, Accelerator(cpu=True)), logits[kept], targets[kept]


@pytest.mark.parametrize(("classes", "unreadable"), [(12, ()), (10, (0, 5, 22)), (4, ()), (2, range(7))])
def test_the_figures_are_those_counted_by_hand(classes, unreadable):
    result, logits, targets = figures(classes, 23, unreadable=set(unreadable))
    order = logits.argsort(1, descending=True)
    expected = {"top1": 100 * (order[:, 0] == targets).double().mean().item()}
    if classes >= 10:
        expected["top5"] = 100 * (order[:, :5] == targets[:, None]).any(1).double().mean().item()
    assert result.accuracies == pytest.approx(expected) and result.accuracies.keys() == expected.keys()
    assert result.loss == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-6)
    assert result.samples == len(targets) and result.input_size == (3, classes)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (targets, order[:, 0]), 1)
    assert (result.confusion.numpy() == confusion).all() and confusion.trace() > 0
    accuracy = result.class_accuracy
    assert accuracy[-1].isnan()
    for label in targets.unique():
        share = (order[targets == label, 0] == label).double().mean()
        assert accuracy[label] == pytest.approx(100 * share.item())


def data_of(classes, targets):
    return SimpleNamespace(classes=list(classes), targets=np.array(targets))


def match(data, names, classes, by="name"):
    return match_classes(data, names, SimpleNamespace(num_classes=classes), checkpoint=WHERE, by=by)


def test_classes_in_another_order_keep_their_meaning():
    data = data_of(["dog", "bird", "cat"], [0, 1, 2, 2, -1])
    assert "another order" in match(data, ["bird", "cat", "dog"], 3)
    assert data.targets.tolist() == [2, 0, 1, 1, -1] and data.classes == ["bird", "cat", "dog"]


def test_data_may_lack_classes_but_have_none_of_its_own():
    data = data_of(["cat", "dog"], [0, 1])
    assert match(data, ["bird", "cat", "cow", "dog"], 4).endswith("2 of the model's 4")
    assert data.targets.tolist() == [1, 3] and len(data.classes) == 4
    with pytest.raises(ConfigError, match=r"house_cat of the data is no class of the model, whose cat the data lacks"):
        match(data_of(["dog", "house_cat"], [0, 1]), ["cat", "dog"], 2)
    with pytest.raises(ConfigError, match=r"Cat of the data"):
        match(data_of(["Cat", "dog"], [0, 1]), ["cat", "dog"], 2)
    with pytest.raises(ConfigError, match=r"cat is twice"):
        match(data_of(["cat", "dog"], [0, 1]), ["cat", "cat", "dog"], 3)


def test_a_composed_accent_is_the_same_letter():
    data = data_of(["cafe\u0301", "tea"], [0, 1])
    match(data, ["tea", "caf\u00e9"], 2)
    assert data.targets.tolist() == [1, 0]


def test_position_counts_where_it_is_asked_for_or_nothing_else_is_known():
    data = data_of(["guard_dog", "house_cat"], [0, 1])
    assert "cat is guard_dog" in match(data, ["cat", "dog"], 2, by="position")
    assert data.targets.tolist() == [0, 1] and data.classes == ["cat", "dog"]
    assert "does not name its classes" in match(data_of(["a", "b"], [0, 1]), None, 2)
    for names, by in ((None, "name"), (["x", "y", "z"], "position")):
        with pytest.raises(ConfigError, match="has 3 classes, the data has 2"):
            match(data_of(["a", "b"], [0, 1]), names, 3, by=by)


def write_names(run, names):
    """The config.yaml of a run from before the names of classes were saved with the model."""
    content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    content["derived"]["class_names"] = names
    (run / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def test_the_names_in_the_folder_of_an_older_run_are_found(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([], default="digits"), Derived()), encoding="utf-8")
    write_names(tmp_path, ["no", "1.5", "null"])  # which YAML could take for something else
    model = SimpleNamespace(num_classes=3, card=None)
    for place in (".", "best", "ema", "checkpoints/step_00000007"):
        assert class_names(tmp_path / place, model) == ["no", "1.5", "null"]
    assert run_config(tmp_path / "elsewhere") is None and class_names(tmp_path / "elsewhere", model) is None
    with pytest.raises(ConfigError, match="must be a list of 4 names"):
        class_names(tmp_path, SimpleNamespace(num_classes=4, card=None))
    assert class_names(tmp_path, SimpleNamespace(num_classes=3, card=DataCard(["a", "b", "c"]))) == ["a", "b", "c"]


def test_a_run_saves_its_names_with_the_model_and_nowhere_else(set_up, train, tmp_path):
    small = ("model.dim=16", "model.depth=1", "threads=1", "tracker=none", "train.batch_size=32", "output_dir=run")
    small = (*small, "train.ema_decay=0.9", "data.train_samples=64", "data.test_samples=32")
    train(*small, "train.max_steps=2")
    run, names = tmp_path / "run", [str(digit) for digit in range(10)]
    models = {path.parent for path in run.rglob("config.json")}
    assert {path.name for path in models} >= {"best", "last", "ema", "step_00000002"}
    cards = {load_model(path).card for path in models}
    assert cards == {DataCard(names, (16, 16), mean=[0.3], std=[0.35], interpolation="bilinear", crop_pct=1.0)}
    assert "class_names" not in (run / "config.yaml").read_text(encoding="utf-8")
    # The same run, written before the models had cards, goes on and gets them.
    for path in models:
        config = json.loads((path / "config.json").read_text())
        del config["card"]
        (path / "config.json").write_text(json.dumps(config))
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        written = json.loads(manifest.read_text())
        for name in ("config.json", "ema/config.json"):
            path = manifest.parent / name
            written[name] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest.write_text(json.dumps(written))
    (run / "best" / "model.safetensors").write_bytes(b"damaged")
    write_names(run, names[::-1])
    with pytest.raises(ConfigError, match="belongs to a run on the classes 9, 8, 7"):
        set_up(*small, "train.max_steps=3")
    write_names(run, names)
    set_up(*small, "train.max_steps=3")
    assert {load_model(run / name).card for name in ("last", "ema")} == cards
    assert load_model(run / "best").card in cards, "the damaged one is taken from the checkpoint"


@pytest.mark.parametrize(("family", "name"), [("SpikeDrivenTransformer", "8_384"), ("MetaSpikeFormer", "v2_t1")])
def test_released_models_are_evaluated_as_the_recipes_train_them(family, name):
    from sdt_blocks.models.registry import families

    config = load_config([], default=f"imagenet_{name}")
    card = families()[family].card
    assert card_of(config, card.class_names, [config.data.img_size] * 2) == card


def test_other_classes_are_no_resume_and_get_a_new_head(set_up, train, photographs, tmp_path):
    small = (
        "data.name=folder", "data.img_size=16", "model.in_channels=1", "model.dim=16", "model.depth=1", "threads=1",
        "tracker=none", "train.batch_size=8", "train.epochs=2",
    )  # fmt: skip
    train(*small, f"data.root={photographs}", "train.max_steps=2", "output_dir=run")
    renamed = shutil.copytree(photographs, tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "china").rename(renamed / split / "temple")
    with pytest.raises(ConfigError, match=r"classes china, flower, the data has flower, temple; .*init_checkpoint="):
        set_up(*small, f"data.root={renamed}", "train.max_steps=3", "output_dir=run")
    heads = {}
    for name, root in (("same", photographs), ("other", renamed)):
        run = set_up(*small, f"data.root={root}", "train.init_checkpoint=run/last", f"output_dir={name}")
        heads[name] = run.plain.head.weight.detach()
    trained = load_model(tmp_path / "run" / "last").head.weight
    assert torch.equal(heads["same"], trained) and not torch.equal(heads["other"], trained)


@pytest.fixture
def evaluate_here(capsys, tmp_path, monkeypatch):
    """`evaluate.py` in this process: its output."""
    import evaluate
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> str:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        evaluate.main([*arguments, "threads=1", "data.workers=0"])
        return capsys.readouterr().out

    return go


def test_the_recipe_writes_classes_and_confusion_for_data_in_another_order(evaluate_here, tmp_path, firing_model):
    model = firing_model(in_channels=3, num_classes=3)
    on_gpus = ("train.sync_bn=true", "train.mixed_precision=fp16", "train.compile=true")  # as a run's file may say
    config = load_config(["data.img_size=16", "data.crop_pct=1", *on_gpus], default="imagenet_8_384")
    model.card = card_of(config, ["b", "c", "a"], (16, 16))  # not the order in which folders are read
    save_model(model, tmp_path / "run" / "best")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8) for name in "abc"}
    for name, images in pixels.items():
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "data" / "val" / name / f"{i}.png")
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    expected = np.zeros((3, 3), dtype=int)
    with torch.no_grad():
        for row, name in enumerate("bca"):
            x = (torch.from_numpy(pixels[name]).permute(0, 3, 1, 2).float() / 255 - mean) / std
            np.add.at(expected[row], model(x).argmax(1).numpy(), 1)
    out = evaluate_here("checkpoint=run", "data.root=data")
    assert f"top-1 {100 * expected.trace() / 15:.2f} % | loss" in out and "top-5" not in out
    assert "15 images at 16 x 16" in out and "another order" in out
    folder = tmp_path / "run" / "evaluation"
    with (folder / "confusion.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == ["b", "c", "a"] and [row[0] for row in rows] == ["b", "c", "a"]
    assert [[int(value) for value in row[1:]] for row in rows] == expected.tolist()
    with (folder / "classes.csv").open(encoding="utf-8") as file:
        assert [int(row["recognised"]) for row in csv.DictReader(file)] == expected.diagonal().tolist()
    assert json.loads((folder / "evaluation.json").read_text())["samples"] == 15
    assert json.loads((folder / "evaluation.json").read_text())["unreadable"] == 0 and "could not be read" not in out
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        ConfigError, match=r"events\.size is for recordings of events, and data\.name=folder holds images"
    ):
        evaluate_here("checkpoint=run", "data.root=data", "events.size=3")
    (tmp_path / "data" / "val" / "a" / "3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"a/3\.png cannot be read"):
        out = evaluate_here("checkpoint=run", "data.root=data", "data.on_error=skip")
    assert "14 images at 16 x 16" in out and "1 of the images could not be read; no figure includes such" in out
    figures = json.loads((folder / "evaluation.json").read_text())
    assert (figures["samples"], figures["unreadable"]) == (14, 1)


def test_an_evaluation_that_is_stopped_leaves_the_one_before(evaluate_here, firing_model, tmp_path, monkeypatch):
    from common import pictures

    def evaluation(samples):
        evaluate_here("checkpoint=saved", "config=digits", f"data.test_samples={samples}", "output_dir=found")

    def stop(*_):
        raise KeyboardInterrupt

    save_model(firing_model(in_channels=1, num_classes=10), tmp_path / "saved")
    evaluation(20)
    before = {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    assert set(before) == {"evaluation.json", "classes.csv", "confusion.csv", "confusion.png"}
    monkeypatch.setattr(pictures, "draw_confusion", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluation(30)
    assert {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()} == before


def test_other_settings_than_the_runs_have_a_folder_of_their_own(evaluate_here, train, tmp_path):
    small = ("model.dim=16", "model.depth=1", "threads=1", "tracker=none", "train.batch_size=32", "output_dir=run")
    train(*small, "data.train_samples=64", "data.test_samples=40", "train.ema_decay=0.5", "train.max_steps=2")

    def figures(*arguments):
        out = evaluate_here("checkpoint=run", *arguments)
        folder = tmp_path / out.rpartition(" are in ")[2].strip()
        return folder.name, json.loads((folder / "evaluation.json").read_text())

    name, own = figures()
    assert name == "evaluation" and own["settings"] == {} and own["samples"] == own["firing_rate_samples"] == 40
    # What changes no answer, and what the run says itself, is no difference.
    name, own = figures("train.batch_size=8", "data.on_error=skip", "data.img_size=16")
    assert name == "evaluation" and own["settings"] == {}
    for asked, name in (
        (("model.time_steps=2",), "evaluation,model.time_steps=2"),
        (("img_size=32", "ema=true"), "evaluation,data.img_size=32,ema=true"),
        (("data.test_samples=20",), "evaluation,data.test_samples=20"),
    ):
        found, other = figures(*asked)
        settings = [f"{key}={value}".lower() for key, value in other["settings"].items()]
        assert found == name == ",".join(["evaluation", *settings])
    assert json.loads((tmp_path / "run/evaluation/evaluation.json").read_text()) == own
    assert figures("data.test_samples=20", "output_dir=mine")[0] == "mine"


def test_the_name_of_a_folder_says_its_settings():
    from common.trained import default_folder

    def named(**settings):
        return default_folder(WHERE, "evaluation", settings).name.removeprefix("run_evaluation")

    assert named() == "" and named(ema=True, steps=None) == ",ema=true,steps=null"
    here, there = named(root="/data/one/val"), named(root="/data/two/val/")
    assert here != there and here[:-8] == there[:-8] == ",root=val-"
    assert re.fullmatch(r",mean=_0.3,0.5_-[0-9a-f]{8}", named(mean=[0.3, 0.5])) and named(mean=[0.5]) != named(
        mean=[0.3]
    )
    long = [named(**dict.fromkeys("abc", "x" * 60), d=d) for d in (1, 2)]
    assert long[0] != long[1] and max(map(len, long)) < 120


def silenced(model, *units):
    """The model with nothing above the thresholds behind these units."""
    for unit in units:
        torch.nn.init.constant_(model.get_submodule(unit).norm.bias, -100.0)
    return model


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ((), ""),
        (("blocks.0.mlp.branch.fc1",), "1 of 19 neuron layers never fired: blocks.0.mlp.branch.neuron2"),
        (("*",), "no neuron fired: the norms have seen"),
    ],
)
def test_neurons_that_never_fired_are_named_in_the_first_line(evaluate_here, firing_model, tmp_path, units, said):
    model = firing_model(in_channels=1, num_classes=10)
    if units == ("*",):
        units = [name for name, module in model.named_modules() if isinstance(module, Unit)]
    save_model(silenced(model, *units), tmp_path / "saved")
    out = evaluate_here("checkpoint=saved", "config=digits", "data.test_samples=20", "output_dir=of_20")
    first, *others = out.splitlines()
    assert first.startswith(said or "top-1")
    assert json.loads((tmp_path / "of_20" / "evaluation.json").read_text())["silence"] == (said and first)
    assert (others if said else [first])[0].startswith("top-1")


def test_a_layer_that_fires_in_a_later_batch_has_fired():
    from accelerate import Accelerator
    from common.evaluation import Firing

    net = nn.Sequential(nn.Identity(), LIF(), LIF(threshold=0.4))
    firing = Firing(net)
    for value, expected in ((0.0, (False, False)), (3.0, (True, True))):
        with firing.watched(rated=0):
            net(torch.full((4, 2, 3), value))
        assert tuple(firing.fired.values()) == expected and firing.rate == firing.samples == 0
    with firing.watched(rated=2):
        net(torch.zeros(4, 2, 3))
    firing.add_up(Accelerator(cpu=True))
    assert firing.fired == {"1": True, "2": True} and (firing.samples, firing.rate) == (2, 0.0)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_spikes_of_half_precision_are_counted_to_the_last(dtype):
    from common.evaluation import Firing

    fire = torch.arange(2 * 400 * 500).reshape(2, 400, 500) % 7 < 3
    net = nn.Sequential(LIF(tau=1.0))
    firing = Firing(net)
    with firing.watched(rated=400):
        assert net(3 * fire.to(dtype)).dtype == dtype
    assert fire.sum() > 65504 and firing.rate == pytest.approx(int(fire.sum()) / fire.numel(), rel=1e-6)


def test_the_firing_rate_is_of_all_samples_or_of_batches_at_equal_distances(monkeypatch):
    from accelerate import Accelerator
    from common import evaluation

    class Small(nn.Module):
        num_classes = 4

        def __init__(self):
            super().__init__()
            self.first, self.last = LIF(threshold=0.5), LIF(threshold=0.1)

        def forward(self, x):
            return self.last(self.first(x.expand(3, *x.shape)) / 4)

    model = Small()
    # Sorted by class, as folders are read: the first batches say little of the others.
    images = torch.linspace(0.1, 2, 24)[:, None].expand(24, 4).contiguous()
    loader = DataLoader(TensorDataset(images, torch.arange(24) // 6), batch_size=2)

    def counted(rows):
        spikes = model.first(images[rows].expand(3, -1, -1))
        return torch.stack([spikes, model.last(spikes / 4)]).mean().item()

    found = evaluation.evaluate(model, loader, Accelerator(cpu=True))
    assert (found.rated, found.samples) == (24, 24)
    assert found.firing_rate == pytest.approx(counted(list(range(24)))) and counted([0, 1]) < 0.6 * found.firing_rate
    monkeypatch.setattr(evaluation, "RATED", 6)
    monkeypatch.setattr(evaluation, "RATED_BATCHES", 3)
    found = evaluation.evaluate(model, loader, Accelerator(cpu=True))
    some = [0, 1, 8, 9, 16, 17]
    assert found.rated == 6 and found.samples == 24 and found.firing_rate == pytest.approx(counted(some))
    monkeypatch.setattr(evaluation, "RATED_BATCHES", 12)
    assert evaluation.evaluate(model, loader, Accelerator(cpu=True)).rated == 24


def test_a_compiled_model_fires_in_every_evaluation():
    from accelerate import Accelerator
    from common.evaluation import evaluate

    class Small(nn.Sequential):
        num_classes = 4

    images, targets = torch.rand(6, 3, 4), torch.arange(6) % 4
    model = Small(LIF(threshold=0.5), nn.Linear(4, 4), LIF(threshold=0.1))
    loader = DataLoader(TensorDataset(images, targets), batch_size=3)
    expected = evaluate(model, loader, Accelerator(cpu=True))
    assert expected.firing_rate > 0.05 and not expected.silence
    torch._dynamo.reset()
    model.compile(backend="eager")
    with torch.no_grad():
        model.train()(images[:3])
        model.eval()(images[:3])
    for _ in range(2):
        found = evaluate(model, loader, Accelerator(cpu=True))
        assert (found.firing_rate, found.silence) == (expected.firing_rate, "")


def test_event_folders_are_matched_by_name_and_keep_the_sensor_of_training(evaluate_here, train, tmp_path, monkeypatch):
    data, renamed = tmp_path / "shapes", tmp_path / "renamed"
    write_recordings(data, train=4, test=2)
    run = train(
        "data.root=shapes", "events.cache=null", "train.max_steps=2", "train.batch_size=4", "model.dim=16",
        "data.workers=0", "tracker=none", "threads=1", "output_dir=run", default="events_demo",
    )  # fmt: skip
    side = run.test_loader.dataset.dataset.frame_size[0]
    assert (
        load_config([f"config={tmp_path / 'run' / 'config.yaml'}"], default="digits").events.sensor_size == [side] * 2
    )
    assert f"8 recordings at {side} x {side}" in evaluate_here("checkpoint=run")
    monkeypatch.chdir(tmp_path / "run")  # from where the data are found as well, and are still the run's own
    assert "are in ../run/evaluation\n" in evaluate_here("checkpoint=../run", "data.root=../shapes")
    assert "are in ../run/evaluation\n" in evaluate_here("checkpoint=../run")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, renamed)
    for path in renamed.rglob("*.npy"):  # events in a corner only, which say nothing of the sensor's size
        events = np.load(path)
        events[:, :2] //= 2
        np.save(path, events)
    out = evaluate_here("checkpoint=run", f"data.root={renamed}")
    assert f"8 recordings at {side} x {side}" in out and "classes are matched by name\n" in out
    for split in ("train", "test"):
        (renamed / split / sorted(DIRECTIONS)[0]).rename(renamed / split / "zenith")
    with pytest.raises(ConfigError, match="zenith of the data is no class of the model"):
        evaluate_here("checkpoint=run", f"data.root={renamed}")
