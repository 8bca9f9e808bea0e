"""One small model of each family: searched on images of their own, trained with several seeds, set side by side."""

from __future__ import annotations

import csv
import json

import pytest
from common.config import ConfigError
from PIL import Image

TINY = {
    "V1": ("model.name=sdt_2_256", "model.depth=1", "model.dim=16"),
    "V3": ("model.name=sdt_v3_3m", "model.dims=[8,8,16,16]", "model.depths=[1,1,1,1,0]"),
}
SHORT = (
    "data.img_size=16", "train.epochs=1", "train.warmup_epochs=0", "train.batch_size=16", "data.train_samples=64",
    "threads=1", "validation_samples=30", "samples=4", "latency=false",
)  # fmt: skip


@pytest.fixture
def families(tmp_path, monkeypatch, capsys):
    """`compare_families.py` in this process, with smaller models: its rows as CSV has them, and what it prints."""
    import compare_families as recipe

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "SMALL", TINY)

    def go(*arguments):
        recipe.main([*SHORT, "families=V3", "seeds=1,2", *arguments])
        with (tmp_path / "runs" / "families" / "families.csv").open(encoding="utf-8") as file:
            return {row["name"]: row for row in csv.DictReader(file)}, capsys.readouterr().out

    return go


def test_the_best_learning_rate_trains_with_every_seed(families, tmp_path):
    rows, out = families("rates=1e-5,1e-2")
    folder = tmp_path / "runs" / "families"
    assert list(rows) == ["V3"]
    for name, row in rows.items():
        searched = {rate: summary(folder / name / "search" / rate) for rate in ("1e-05", "0.01")}
        best = max(searched.values(), key=lambda run: run["test_top1"])
        assert float(row["validation_top1"]) == best["test_top1"] and row["lr"] == str(best["lr"])
        seeds = [summary(folder / name / f"seed_{seed}") for seed in (1, 2)]
        assert all(run["lr"] == best["lr"] for run in seeds)
        assert float(row["top1"]) == pytest.approx(sum(run["test_top1"] for run in seeds) / 2)
        assert {run["samples"] for run in searched.values()} == {30} and {run["samples"] for run in seeds} == {360}
        assert float(row["firing_rate"]) > 0.001
    assert "judged on 30 images taken from the training images" in out and "- V3, validation: " in out
    with Image.open(folder / "families.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    # What is trained is read again.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    again, out = families("rates=1e-5,1e-2", "seeds=2")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and "epoch" not in out.split("|")[0]
    assert float(again["V3"]["top1"]) == summary(folder / "V3" / "seed_2")["test_top1"]
    with pytest.raises(ConfigError, match=r"other settings: .*optim\.weight_decay is 0\.5"):
        families("rates=1e-5,1e-2", "optim.weight_decay=0.5")
    # Figures of other runs than those asked for are no answer either.
    for setting, words in (
        ("train.batch_size=8", r"train\.batch_size is 8 and was 16"),
        ("data.test_samples=9", r"data\.test_samples is 9 and was None"),
        ("data.crop_pct=0.5", r"data\.crop_pct is 0\.5 and was 1\.0"),
        ("data.root=elsewhere", r"data\.root is elsewhere and was None"),
    ):
        with pytest.raises(ConfigError, match=f"holds a finished run with other settings: {words}"):
            families("rates=1e-5,1e-2", setting)


def summary(folder):
    """The summary of a run, the learning rate it had, and how many images it was judged on."""
    line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    lr = float(config.split("optim:")[1].split("lr: ")[1].split()[0])
    content = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return content | {"lr": lr, "samples": line["test_samples"]}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("families=V1,V4", "V4 is none of V1, V3"),
        ("rates=fast", "rates=fast: expected different values separated by commas"),
        ("seeds=1,1", "seeds=1,1: expected different values"),
        ("optim.lr=1e-3", "optim.lr=1e-3 is this recipe's own; set rates"),
        ("validation_samples=0", "validation_samples: expected a value of at least 1, got 0"),
        ("train.speed=1", "unknown key"),
    ],
)
def test_what_cannot_be_searched_is_refused(families, argument, words):
    with pytest.raises(ConfigError, match=words):
        families(argument)
