"""Predictions for files: those of the model on what the recipe's data set makes of them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common.config import ConfigError, RunError, load_config, to_yaml
from common.trained import card_of
from PIL import Image

from sdt_blocks import create_model, save_model
from sdt_blocks.example import FOLDER, example_model
from sdt_datasets.event_data import build_event_datasets
from sdt_datasets.events import EventsToFrames
from sdt_datasets.images import build_image_datasets


@pytest.fixture
def predict(capsys, tmp_path, monkeypatch):
    """`predict.py` in this process: what it prints to standard output, and to standard error."""
    import predict as recipe
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> tuple[str, str]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        recipe.main([*arguments, "threads=1", "data.workers=0"])
        captured = capsys.readouterr()
        return captured.out, captured.err

    return go


@pytest.fixture
def digits(tmp_path):
    """Six digits as files, two of them deeper and with names that are odd, beside a file that is no image."""
    from sdt_datasets.image_sources import load_digits_images

    _, source = load_digits_images()
    names = ["0.png", "1.png", "a=b.png", "3.PNG", "more/4.png", "more/line\nbreak.png"]
    (tmp_path / "digits" / "more").mkdir(parents=True)
    (tmp_path / "digits" / "notes.txt").write_text("no image")
    for index, name in enumerate(names):
        Image.fromarray(source.images[index]).save(tmp_path / "digits" / name, format="PNG")
    return [f"digits/{name}" for name in names]


def expected(samples):
    _, test = build_image_datasets(
        "digits", img_size=16, mean=[0.3], std=[0.35], crop_pct=1.0, interpolation="bilinear", test_samples=samples
    )
    with torch.no_grad():
        return example_model()(torch.stack([test[i][0] for i in range(samples)])).softmax(1), test.targets


def test_probabilities_are_the_models_in_json_alone(predict, digits):
    out, err = predict(f"checkpoint={FOLDER}", "--json", "top=3", "train.batch_size=4", *digits)
    found, (answers, labels) = json.loads(out), expected(len(digits))
    assert [one["file"] for one in found] == digits
    for one, answer in zip(found, answers, strict=True):
        values, indices = answer.topk(3)
        assert [p["index"] for p in one["predictions"]] == indices.tolist()
        assert [p["probability"] for p in one["predictions"]] == pytest.approx(values.tolist(), abs=1e-5)
    firsts = [int(one["predictions"][0]["label"]) for one in found]
    assert sum(np.array(firsts) == labels) >= len(digits) - 1 and len(set(firsts)) > 2
    assert "no neuron" not in err


@pytest.mark.parametrize(
    ("with_run", "in_card", "arguments", "sums_to_one"),
    [
        (False, True, (), False),
        (False, True, ("train.loss=ce",), True),
        (False, False, ("config=digits",), True),
        (True, False, (), False),  # of a run before cards said so
    ],
)
def test_classes_that_are_judged_each_by_itself(predict, digits, tmp_path, with_run, in_card, arguments, sums_to_one):
    config, model = load_config(["train.loss=bce"], default="digits"), example_model()
    run_folder(tmp_path / "run", model, config, model.card.class_names)
    assert model.card.activation == "sigmoid"
    if not in_card:
        model.card = replace(model.card, activation=None)
        save_model(model, tmp_path / "run" / "best")
    if not with_run:
        (tmp_path / "run" / "config.yaml").unlink()
    out, _ = predict("checkpoint=run", "--json", "top=10", *arguments, digits[0])
    found = {one["index"]: one["probability"] for one in json.loads(out)[0]["predictions"]}
    logits = expected(1)[0].log()  # but for a constant
    ratio = logits - torch.tensor([found[index] for index in range(10)]).double().log()
    assert (abs(sum(found.values()) - 1) < 1e-5) == sums_to_one == bool(ratio.std() < 1e-3)


def test_a_folder_gives_a_line_a_file_and_says_what_it_passed_over(predict, digits):
    out, err = predict(f"checkpoint={FOLDER}", "digits", "digits/0.png")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "digits/0.png", "digits/1.png", "digits/3.PNG", "digits/a=b.png", "digits/more/4.png",
        "digits/more/line\\nbreak.png", "digits/0.png",
    ]  # fmt: skip
    assert lines[0] == lines[-1] and all(line.count(" %  ") == 5 for line in lines)
    assert "passed over 1 file" in err and "notes.txt" in err


def run_folder(folder, model, config, names):
    model.card = card_of(config, names, (config.data.img_size,) * 2)
    save_model(model, folder / "best")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def test_recordings_are_framed_as_in_the_run(predict, tmp_path, firing_model):
    config = load_config(["events.time_steps=3", "events.size=8", "events.sensor_size=[16,12]"], default="events_demo")
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, [16, 12, 2], (900, 3)) for _ in range(4)]
    frames = []
    for number, xyp in enumerate(columns):
        events = np.zeros(900, dtype=[("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "?")])
        events["t"], events["x"], events["y"], events["p"] = np.arange(900), *xyp.T
        np.savez(tmp_path / f"{number}.npz", **{name: events[name] for name in "txyp"})
        frames.append(torch.from_numpy(EventsToFrames(sensor_size=(16, 12, 2), time_steps=3)(events)))
    x = torch.stack(frames)
    x = torch.nn.functional.interpolate(x.flatten(0, 1), size=(8, 8), mode="bilinear").view(4, 3, 2, 8, 8)
    model = firing_model(x, in_channels=2, num_classes=4, time_steps=3)
    run_folder(tmp_path / "run", model, config, ["up", "down", "left", "right"])
    out, _ = predict("checkpoint=run", "json=true", *(f"{number}.npz" for number in range(4)))
    with torch.no_grad():
        answers = model(x).softmax(1)
    assert answers.std(0).max() > 0, "the recordings must be told apart"
    for one, answer in zip(json.loads(out), answers, strict=True):
        given = {p["class"]: p["probability"] for p in one["predictions"]}
        assert list(map(given.get, ["up", "down", "left", "right"])) == pytest.approx(answer.tolist(), abs=1e-5)


def test_gestures_are_framed_by_time_as_in_training(tmp_path):
    """Tonic's files keep milliseconds: 33 of 100 lies before the end of the first of three frames, 33.3."""
    import predict as recipe

    columns = np.array([[1, 2, 0, t] for t in (0, 33, 50, 66, 67, 100)])
    for split in ("ibmGestureTrain", "ibmGestureTest"):
        path = tmp_path / "DVSGesture" / split / "user01_led" / "0.npy"
        path.parent.mkdir(parents=True)
        np.save(path, columns)
    settings = {"time_steps": 3, "split_by": "time"}
    _, evaluated = build_event_datasets("dvs128_gesture", tmp_path, cache=False, **settings)
    asked = ["data.name=dvs128_gesture", "events.sensor_size=[128,128]", "events.split_by=time", "events.time_steps=3"]
    config = load_config(asked, default="gesture_t16")
    model = create_model("sdt_2_256", dim=16, depth=1, in_channels=2, num_classes=11)
    frames, _ = recipe.build_dataset([str(path)], model, config)[0]
    assert torch.equal(frames, evaluated[0][0]) and frames.sum((1, 2, 3)).tolist() == [2, 2, 2]


def test_a_silent_model_is_said_to_be_silent(predict, tmp_path, digits):
    from sdt_blocks import create_model

    fresh = create_model("sdt_2_256", dim=16, depth=1, in_channels=1, num_classes=2).eval()
    run_folder(tmp_path / "run", fresh, load_config([], default="digits"), ["even", "odd"])
    out, err = predict("checkpoint=run", digits[0])
    assert "no neuron fired: the norms have seen 0 batches" in err and "even" in out


@pytest.mark.parametrize("name", ["sdt_v2_15m", "sdt_v3_3m"])
def test_a_model_of_any_family_that_fires_is_not_said_to_be_silent(predict, tmp_path, digits, name):
    from sdt_blocks import calibrate_norms, create_model, example_images
    from sdt_blocks.analysis import firing_rates

    torch.manual_seed(0)
    images = example_images()[0]
    model = create_model(name, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1, 0), in_channels=1, num_classes=2)
    calibrate_norms(model, images)
    assert firing_rates(model.eval(), images).mean > 0.05
    run_folder(tmp_path / "run", model, load_config([], default="digits"), ["even", "odd"])
    out, err = predict("checkpoint=run", digits[0])
    assert "fired" not in err and "even" in out


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["digits/0.png"], ConfigError, "checkpoint=FOLDER"),
        (["checkpoint={example}"], ConfigError, "name the images"),
        (["checkpoint=plain", "digits/0.png"], ConfigError, "does not say how its data were prepared"),
        (["checkpoint={example}", "nowhere.png"], ConfigError, "nowhere.png: no such file"),
        (["checkpoint={example}", "empty"], ConfigError, "empty holds no file that ends in .jpg"),
        (["checkpoint={example}", "top=0", "digits"], ConfigError, "top: expected"),
        (["checkpoint={example}", "json=yes", "digits"], ConfigError, "json: expected true or false"),
        (["checkpoint={example}", "dat.img_size=3", "digits"], ConfigError, "unknown key"),
        (["checkpoint={example}", "digits/notes.txt"], RunError, "notes.txt cannot be read"),
        (
            ["checkpoint=broken", "digits"],
            ConfigError,
            "checkpoint=broken: blocks.0.mlp.branch.fc1.norm.running_var holds",
        ),
    ],
)
def test_refusals(predict, digits, arguments, error, words):
    Path("empty").mkdir()
    plain = example_model()
    plain.card = None
    save_model(plain, "plain")
    broken = example_model()
    broken.blocks[0].mlp.branch.fc1.norm.running_var[1] = float("nan")
    save_model(broken, "broken")
    with pytest.raises(error) as refused:
        predict(*(argument.format(example=FOLDER) for argument in arguments))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_unreadable_files_can_be_left_out(predict, digits):
    with pytest.warns(UserWarning, match="notes.txt cannot be read"):
        out, _ = predict(f"checkpoint={FOLDER}", "data.on_error=skip", "--json", digits[1], "digits/notes.txt")
    assert [one["file"] for one in json.loads(out)] == [digits[1]]


def test_what_the_model_says_of_its_images_wins_over_a_file_and_loses_to_the_command_line(predict, digits, monkeypatch):
    from common import progress

    said = []
    monkeypatch.setattr(progress, "warn", said.append)
    plain, _ = predict(f"checkpoint={FOLDER}", "--json", digits[0])
    assert not said
    named, _ = predict(f"checkpoint={FOLDER}", "--json", "config=mnist_5k", digits[0])
    assert named == plain and len(said) == 1
    assert "data.mean=(0.3,) instead of" in said[0] and "=... on the command line wins" in said[0]
    other, _ = predict(f"checkpoint={FOLDER}", "--json", "data.mean=[0.9]", "data.std=[0.35]", digits[0])
    assert json.loads(other)[0]["predictions"] != json.loads(plain)[0]["predictions"]
