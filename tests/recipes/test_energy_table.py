"""The table of energies: the paper's rows from published rates, and rows of one's own from weights and images."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from common.config import ConfigError, load_config
from common.loading import build_datasets
from PIL import Image

from sdt_blocks import DataCard, SpikeDrivenTransformer, load_released_checkpoint, save_model
from sdt_blocks.analysis import energy


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """`energy_table.py` in this process: the rows of its CSV, and what it prints."""
    import energy_table as recipe

    monkeypatch.chdir(tmp_path)

    def go(*arguments, networks):
        monkeypatch.setattr(recipe, "PAPER", {name: recipe.PAPER[name] for name in networks})
        recipe.main([*arguments, "output_dir=out"])
        with open(tmp_path / "out" / "energy_table.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file)), capsys.readouterr().out

    return go


def rows_of(rows, network, start):
    return next(row for row in rows if row["network"] == network and row["rates"].startswith(start))


def check_paper(rows, out, tex):
    """The rows of published rates: what they come to was added up by hand from what was published."""
    related = rows_of(rows, "sdt_8_512", "a Spikingformer")
    assert float(related["energy_mj"]) == pytest.approx(7.43159, abs=1e-5)
    assert float(related["difference"]) == pytest.approx(100 * (7.43159 / 4.50 - 1), abs=0.01)
    stem = rows_of(rows, "sdt_8_768", "stem")
    assert float(stem["energy_mj"]) == pytest.approx(4.51, abs=0.005)
    rates = {"sdt_8_512": (9.9, 13.9), "sdt_8_768": (5.6, 8.3)}
    for network, expected in rates.items():
        fitted = rows_of(rows, network, "one for all")
        assert float(fitted["energy_mj"]) == pytest.approx(float(fitted["published_mj"]), rel=1e-9)
        assert [float(fitted["rate"]), float(fitted["once_rate"])] == pytest.approx(expected, abs=0.05)
    assert "after pooling, over all samples, at each step" in out and "No one rate explains" in out
    assert tex.startswith("% ") and tex.count(r" \\") == 1 + len(rows) and r"sdt\_8\_768" in tex


@pytest.mark.slow
def test_the_uniform_rate_of_each_row(table):
    rows, _ = table(networks=("sdt_8_384", "sdt_6_512", "sdt_8_512", "sdt_10_512", "sdt_8_768"))
    fitted = [row for row in rows if row["rates"].startswith("one for all")]
    assert [float(row["rate"]) for row in fitted] == pytest.approx([16.3, 7.9, 9.9, 11.6, 5.6], abs=0.05)
    assert [float(row["once_rate"]) for row in fitted] == pytest.approx([21.8, 12.7, 13.9, 15.2, 8.3], abs=0.05)


def test_the_papers_rows_and_one_of_weights_and_images(table, photographs, tmp_path, firing_model):
    """The row of a model of one's own is what the library says of the same images."""
    data = [f"data.root={photographs}", "data.img_size=32", "data.workers=0", "threads=1"]
    _, val = build_datasets(load_config(data, default="imagenet_8_384"), evaluation_only=True)
    images = torch.stack([val[i][0] for i in range(len(val))])
    targets = torch.tensor([val[i][1] for i in range(len(val))])
    model: SpikeDrivenTransformer = firing_model(images, num_classes=2)
    model.card = DataCard(["china", "flower"], [32, 32])
    save_model(model, tmp_path / "mine")
    rows, out = table("mine", *data, networks=("sdt_8_512", "sdt_8_768"))
    check_paper(rows, out, (tmp_path / "out" / "energy_table.tex").read_text(encoding="utf-8"))
    row, report = rows[-1], energy(model, images)
    assert row["network"] == "SpikeDrivenTransformer (mine)" and row["rates"].startswith(f"measured: {len(images)} ")
    assert float(row["energy_mj"]) == pytest.approx(report.total_mj, rel=1e-9)
    assert float(row["once_mj"]) == pytest.approx(report.total_once_mj, rel=1e-9) and float(row["rate"]) > 1
    right = model(images).argmax(1) == targets
    assert float(row["top1"]) == pytest.approx(100 * right.float().mean().item(), abs=1e-4)
    assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
    assert row["published_mj"] == "" and "measured: " in out


def test_a_model_of_the_papers_shapes_is_known():
    import energy_table as recipe

    from sdt_blocks import create_model

    with torch.device("meta"):
        assert recipe.variant_of(create_model("sdt_10_512")) == "sdt_10_512"
        assert recipe.variant_of(create_model("sdt_10_512", num_classes=10)) is None
        assert recipe.variant_of(create_model("spikformer_10_512")) is None


def test_a_released_file_and_a_validation_folder(table, tmp_path, monkeypatch, released_file):
    """The command for the paper's own weights: a file as it was released, pictures in folders named like ImageNet's."""
    import energy_table as recipe

    monkeypatch.setattr(recipe, "paper_rows", lambda: ([], []))
    root, drawn = tmp_path / "imagenet", np.random.default_rng(0)
    for place in range(10):
        folder = root / "val" / f"n{place:08d}"
        folder.mkdir(parents=True)
        Image.fromarray(drawn.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(folder / "ILSVRC2012_val_1.JPEG")
    data = [f"data.root={root}", "data.img_size=64", "data.workers=0", "threads=1"]
    rows, out = table(str(released_file), *data, networks=())
    _, val = build_datasets(load_config(data, default="imagenet_8_384"), evaluation_only=True)
    images = torch.stack([val[i][0] for i in range(10)])
    model = load_released_checkpoint(released_file)
    (row,) = rows
    assert float(row["energy_mj"]) == pytest.approx(energy(model, images).total_mj, rel=1e-9) and float(row["rate"]) > 1
    right = model(images).argmax(1) == torch.arange(10)
    assert float(row["top1"]) == pytest.approx(100 * right.float().mean().item(), abs=1e-4)
    assert row["network"] == f"SpikeDrivenTransformer ({released_file.name})" and "measured: 10 images" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.pth.tar"], ["nowhere.pth.tar", "no such file"]),
        (["samples=0"], ["samples: ", "at least 1"]),
        (["data.root=x"], ["data.root=x", "name the weights"]),
    ],
)
def test_refusals(arguments, words):
    import energy_table as recipe

    with pytest.raises(ConfigError) as refused:
        recipe.main(arguments)
    assert all(word in str(refused.value) for word in words)
