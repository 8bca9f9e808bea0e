"""The recipe of early answers on the example model and digits: its table, its picture, and what it refuses."""

import csv
import math

import pytest
import torch

from sdt_blocks import EarlyAnswers, example_model
from sdt_blocks.example import __file__ as example

FOLDER = example.rpartition("/")[0]
DATA = ["config=digits", "data.workers=0", "threads=1", "data.test_samples=120"]


def test_the_table(tmp_path, capsys):
    import early_answers as recipe

    recipe.main(
        [f"checkpoint={FOLDER}", *DATA, "tolerances=0,0.5", "rounds=1", "batch_size=25", f"output_dir={tmp_path}"]
    )
    with open(tmp_path / "early_answers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows] == ["dense"] * 4 + ["events"] * 4
    for whole, every, exact, loose in (rows[:4], rows[4:]):
        assert (whole["steps"], float(every["steps"]), float(whole["time"])) == ("", 4, 1)
        assert whole["accuracy"] == every["accuracy"] and float(whole["accuracy"]) > 90
        assert 1 <= float(loose["steps"]) < float(exact["steps"]) < 4
        assert float(whole["accuracy"]) - 50 < float(loose["accuracy"]) <= 100
        assert float(loose["accuracy_low"]) < float(loose["accuracy"]) <= float(loose["accuracy_high"])
        assert all(float(row["ms"]) > 0 for row in (whole, every, exact, loose))
    out = capsys.readouterr().out
    assert "thresholds from 60 samples, all else of 60 others" in out and "entropy, 50 % lost at most" in out
    assert (tmp_path / "early_answers.png").stat().st_size > 10_000


def test_the_samples_are_those_of_the_set(monkeypatch):
    """Each once, in one part or the other; the row of a tolerance is what the library says of them."""
    import early_answers as recipe
    from common.config import load_config
    from common.loading import build_datasets

    _, test_set = build_datasets(load_config(DATA, default="digits"), evaluation_only=True)
    options = recipe.Options(checkpoint=FOLDER, fit_samples=70, batch_size=32, rounds=1)
    fitting, judged = recipe.split(test_set, options)
    assert [len(targets) for _, targets in (*fitting, *judged)] == [32, 32, 6, 32, 18]
    found = torch.cat([images for images, _ in (*fitting, *judged)])
    assert len(found.flatten(1).unique(dim=0)) == len(torch.stack([x for x, _ in test_set]).flatten(1).unique(dim=0))
    monkeypatch.setattr(recipe, "FORMS", ("events",))
    row = recipe.rows_of(example_model(), fitting, judged, [0.1], options)[-1]
    early = EarlyAnswers.fit(example_model(), fitting, tolerance=0.1)
    steps = torch.cat([early(images).steps for images, _ in judged]).float().mean().item()
    assert row["threshold"] == pytest.approx(early.threshold, abs=1e-5) and row["steps"] == pytest.approx(steps)
    assert row["samples"] == 50 and not math.isinf(row["threshold"])


def test_unreadable_samples_are_in_no_part():
    import early_answers as recipe
    from common.config import ConfigError

    samples = [(torch.full((1, 2, 2), float(i)), -1 if i % 3 else i) for i in range(12)]
    fitting, judged = recipe.split(samples, recipe.Options(batch_size=1))
    assert len(fitting) == len(judged) == 2
    assert {(int(images.max()), int(target)) for images, target in (*fitting, *judged)} == {
        (i, i) for i in (0, 3, 6, 9)
    }
    with pytest.raises(ConfigError, match="fit_samples=4 of 4 samples"):
        recipe.split(samples, recipe.Options(fit_samples=4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["checkpoint=FOLDER"]),
        (["checkpoint=x", "tolerances=0,2"], ["tolerances=0,2", "from 0 to 1"]),
        (["checkpoint=x", "tolerances=few"], ["tolerances=few"]),
        (["checkpoint=x", "measure=norm"], ["measure", "norm", "entropy, margin"]),
        ([f"checkpoint={FOLDER}", *DATA, "fit_samples=120"], ["fit_samples=120 of 120 samples"]),
    ],
)
def test_refusals(arguments, words):
    import early_answers as recipe
    from common.config import ConfigError

    with pytest.raises(ConfigError) as refused:
        recipe.main(arguments)
    assert all(word in str(refused.value) for word in words)
