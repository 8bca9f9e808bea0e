"""What a model says of its data is saved with it, refused where it cannot be true, and prepares images."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sdt_blocks import (
    DataCard,
    SpikeDrivenTransformer,
    example_images,
    example_model,
    load_model,
    load_released_checkpoint,
    save_model,
    transform_of,
)
from sdt_blocks.models.card import words_of

TINY = {"depth": 1, "dim": 16, "pooling": "0001", "num_classes": 3}
IMAGES = {"mean": [0.5], "std": [0.2], "interpolation": "bilinear", "crop_pct": 0.9}
NAMES = ["null", "caf\u00e9 \U0001f408", "odd\udcff\n"]


@pytest.fixture
def saved(tmp_path):
    """A folder with a model of three classes and its card."""
    model = SpikeDrivenTransformer(**TINY)
    assert model.card is None
    model.card = DataCard(NAMES, (32, 32), **IMAGES)
    save_model(model, tmp_path)
    return tmp_path


def test_the_card_comes_back_as_it_was(saved):
    card = load_model(saved).card
    assert card == DataCard(tuple(NAMES), [32, 32], **IMAGES) and card.labels == NAMES
    frames = SpikeDrivenTransformer(**TINY)
    frames.card = DataCard(NAMES, (180, 240))
    save_model(frames, saved)
    assert load_model(saved).card == frames.card and not frames.card.preparation
    frames.card = None
    save_model(frames, saved)
    assert load_model(saved).card is None and "card" not in json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, NAMES),
        ({"time_steps": 2}, NAMES),
        ({"num_classes": 3, "new_head": True}, None),
        ({"num_classes": 7, "new_head": True}, None),
        ({"num_classes": 0}, None),
    ],
)
def test_other_classes_have_no_names_and_the_same_images(saved, options, names):
    card = load_model(saved, **options).card
    assert card.labels == names and card.input_size == (32, 32) and card.mean == (0.5,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": "cat"}, "class_names must be a list of texts"),
        ({"class_names": ["cat", 1]}, "class_names must be a list of texts"),
        ({"class_names": []}, "at least one class"),
        ({"class_names": ["cat", "dog"]}, "card has 2 class_names, but the model has 3"),
        ({"class_names": "imagenet-1k"}, "card has 1000 class_names, but the model has 3"),
        ({"input_size": 32}, "input_size must be a list of numbers"),
        ({"input_size": [32]}, "input_size must be height and width"),
        ({"input_size": [32, 0]}, r"input_size\[1\] must be at least 1"),
        ({"mean": [float("nan")]}, r"mean\[0\] must be finite"),
        ({"std": [0.0]}, r"std\[0\] must be above 0"),
        ({"std": None}, "std is missing"),
        ({"crop_pct": True}, "crop_pct must be a number"),
        ({"crop_pct": 1.5}, "crop_pct must be .* at most 1"),
        ({"interpolation": 3}, "interpolation must be text"),
        ({"note": ["late"]}, "note must be text"),
        ({"color": "gray"}, "unknown color; it has class_names, input_size"),
    ],
)
def test_what_is_no_card_is_refused_with_the_file(saved, changes, words):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "card": {**config["card"], **changes}}))
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        load_model(saved)
    path.write_text(json.dumps({**config, "card": ["cat"]}))
    with pytest.raises(ValueError, match="card must be an object"):
        load_model(saved)


def test_a_card_of_other_classes_is_not_saved(tmp_path):
    model = SpikeDrivenTransformer(**TINY)
    for card, error in ((DataCard(["cat", "dog"]), ValueError), ({"class_names": NAMES}, TypeError)):
        model.card = card
        with pytest.raises(error, match="card"):
            save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_transform_gives_what_the_model_was_trained_on():
    from sdt_datasets.image_sources import load_digits_images

    _, source = load_digits_images()
    transform = pickle.loads(pickle.dumps(transform_of(example_model())))
    made = torch.stack([transform(Image.fromarray(image)) for image in source.images])
    images, labels = example_images()
    rows = [int((made == image).flatten(1).all(1).nonzero()[0]) for image in images]
    assert source.targets[rows].tolist() == labels.tolist() and len(set(rows)) == 20


def test_images_of_any_mode_become_rgb_first():
    model = SpikeDrivenTransformer(**TINY)
    model.card = DataCard(None, (8, 8), mean=[0.0], std=[1.0], interpolation="nearest", crop_pct=1.0)
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    gray, expected = Image.fromarray(values), torch.from_numpy(values).float().expand(3, 8, 8) / 255
    clear = gray.convert("RGBA")
    clear.putalpha(Image.new("L", (8, 8), 3))
    for image in (gray, gray.convert("RGB"), clear, Image.fromarray(values.astype(np.uint16) * 257)):
        assert torch.equal(transform_of(model)(image), expected), image.mode
    with pytest.raises(TypeError, match=r"expected an image of PIL, got str; PIL\.Image\.open"):
        transform_of(model)("cat.jpg")


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "does not say how its images are prepared"),
        (DataCard(NAMES, (32, 32)), "not one of square images"),
        (DataCard(NAMES, (32, 64), **IMAGES), "not one of square images"),
        (DataCard(NAMES, **IMAGES), "not one of square images"),
        (DataCard(NAMES, (32, 32), **{**IMAGES, "interpolation": "sharp"}), "interpolation 'sharp' is unknown"),
        (DataCard(NAMES, (32, 32), **{**IMAGES, "mean": [0.1, 0.2]}), "mean needs one finite value"),
    ],
)
def test_a_transform_is_not_made_up(card, words):
    model = SpikeDrivenTransformer(**TINY)
    model.card = card
    with pytest.raises(ValueError, match=words):
        transform_of(model)
    with pytest.raises(ValueError, match="Linear does not say"):
        transform_of(nn.Linear(2, 2))


def test_the_card_says_how_logits_become_probabilities(tmp_path):
    model = example_model()
    model.card = dataclasses.replace(model.card, activation="sigmoid")
    save_model(model, tmp_path)
    assert load_model(tmp_path).card == model.card
    with pytest.raises(ValueError, match="activation must be one of softmax, sigmoid, got 'tanh'"):
        DataCard(activation="tanh")


@pytest.fixture
def imagenet_file(released_file, tmp_path):
    """A released file of a thousand classes."""
    content = torch.load(released_file, weights_only=False)
    weights = content["state_dict"]
    for key in ("head.weight", "head.bias"):
        weights[key] = weights[key].repeat(100, *(1,) * (weights[key].ndim - 1))
    torch.save(content, tmp_path / "released.pth.tar")
    return tmp_path / "released.pth.tar"


def test_a_released_imagenet_model_knows_its_classes_and_its_images(imagenet_file, released_file, tmp_path):
    model = load_released_checkpoint(imagenet_file)
    assert model.card.class_names[0] == "n01440764" and model.card.class_names[-1] == "n15075141"
    assert len(model.card.class_names) == len(set(model.card.class_names)) == 1000
    assert model.card.labels[:1] == ["tench, Tinca tinca"]
    assert transform_of(model)(Image.new("L", (500, 300))).shape == (3, 224, 224)
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").card == model.card
    assert "n01440764" not in (tmp_path / "saved" / "config.json").read_text()
    assert load_released_checkpoint(imagenet_file, num_classes=7, new_head=True).card == model.card.without_names()
    assert load_released_checkpoint(released_file).card is None
    assert words_of(["n01440764", "n01", "cat"]) == ["tench, Tinca tinca", "n01", "cat"]


@pytest.mark.parametrize(
    ("name", "resized", "words"),
    [
        ("sdt_lif_static_64", pytest.approx(224 / 0.95), None),
        ("sdtv2_grads_T2_64", 256, None),
        ("spikformer_imagenet_64", 224, None),
        ("qkformer_imagenet_64", 256, "trained and evaluated with mixes_images=True"),
        ("sdtv3_base_64", 232, "8 in those named 1x8 (levels=8)"),
        ("sdtv3_large_kd_64", 232, "8 in those named 1x8 (levels=8)"),
    ],
)
def test_released_models_of_every_family_have_their_cards(named_golden, tmp_path, name, resized, words):
    weights = named_golden(name).group("state")
    few = {"model": weights}
    classes = weights["head.weight"].shape[0]
    times = -(-1000 // classes)
    heads = {key: value for key, value in weights.items() if key.startswith("head")}
    many = {key: value.repeat(times, *(1,) * (value.ndim - 1))[:1000] for key, value in heads.items()}
    torch.save(few, tmp_path / "few.pth")
    torch.save({"model": {**weights, **many}}, tmp_path / "many.pth")
    assert load_released_checkpoint(tmp_path / "few.pth").card is None
    card = load_released_checkpoint(tmp_path / "many.pth").card
    assert card.class_names[-1] == "n15075141" and card.input_size == (224, 224)
    assert card.interpolation == "bicubic" and 224 / card.crop_pct == resized
    assert card.note is None if words is None else words in card.note
    save_model(load_released_checkpoint(tmp_path / "many.pth"), tmp_path / "saved")
    assert load_model(tmp_path / "saved").card == card


def test_the_names_of_imagenet_are_asked_for_when_one_is_looked_at(imagenet_file):
    code = f"""
import sys
sys.modules["timm"] = None
from sdt_blocks import load_released_checkpoint
names = load_released_checkpoint({str(imagenet_file)!r}).card.class_names
print(len(names))
try:
    names[0]
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    count, said = done.stdout.splitlines()
    assert count == "1000" and "names of ImageNet's classes come with timm, which cannot be imported" in said
