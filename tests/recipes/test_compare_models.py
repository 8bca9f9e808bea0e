"""Models of all families side by side, untrained, saved and trained: what stands in the table, and why."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from common.config import ConfigError
from PIL import Image
from torch import nn

from sdt_blocks import LIF, calibrate_norms, create_model, save_model
from sdt_blocks.analysis import E_AC, E_MAC, energy
from sdt_blocks.analysis.measured import Form

SMALL = {
    "sdt_2_256": {"dim": 32},
    "sdt_v2_15m": {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1, 0)},
    "spikformer_4_384": {"dim": 32, "depth": 1, "num_heads": 4},
    "qkformer_4_384": {"dim": 32, "depths": (1, 1, 1), "num_heads": 4},
    "sdt_v3_5m": {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1, 0)},
    "sdt_v3_83m": {"dims": (8, 16, 32), "depths": (1, 1, 1, 1)},
}


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """`compare_models.py` in this process: its rows as CSV has them, and what it prints."""
    import compare_models as recipe

    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        recipe.main([*arguments, "samples=2"])
        with (tmp_path / "model_comparison" / "models.csv").open(encoding="utf-8") as file:
            return {row["name"]: row for row in csv.DictReader(file)}, capsys.readouterr().out

    return go


def test_every_family_is_judged(compare, tmp_path):
    from common.judging import sample_inputs

    models = {}
    for name, options in SMALL.items():
        torch.manual_seed(0)
        models[name] = create_model(name, num_classes=10, **options)
        calibrate_norms(models[name], sample_inputs(models[name], 4, 32))
        save_model(models[name].eval(), tmp_path / f"small_{name}")
    rows, out = compare(*(f"small_{name}" for name in SMALL), "img_size=32", "rounds=2")
    assert list(rows) == [f"small_{name}" for name in SMALL]
    verdicts = [row["spike_driven"] for row in rows.values()]
    assert verdicts == ["yes", "yes", "no", "no", "yes", "no"]
    for name, model in models.items():
        row = rows[f"small_{name}"]
        assert int(row["params"]) == sum(parameter.numel() for parameter in model.parameters())
        assert 0.01 < float(row["firing_rate"]) < 1, name
        assert 0 < float(row["energy_mj"]) < float(row["memory_mj"])
        assert float(row["operations"]) > float(row["multiplications"]) > 0
        assert float(row["dense_ms"]) > 0
    for name in ("sdt_2_256", "spikformer_4_384", "qkformer_4_384"):
        assert float(rows[f"small_{name}"]["event_ms"]) > 0
    assert "layer(s) multiply counts of spikes" in rows["small_spikformer_4_384"]["why"]
    assert "product(s) of counts with spikes" in rows["small_sdt_v2_15m"]["why"]
    assert "levels" in rows["small_sdt_v3_5m"]["why"] and "head" in rows["small_sdt_v3_83m"]["why"]
    assert "small_qkformer_4_384 (QKFormer), not spike-driven: " in out
    with Image.open(tmp_path / "model_comparison" / "models.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert "dense (ms) & event-driven (ms)" in (tmp_path / "model_comparison" / "models.tex").read_text()


class ThreeParts(nn.Module):
    """An analog layer, a neuron, a layer of additions, and an operation that nobody has a rule for."""

    def __init__(self, bias: float):
        super().__init__()
        self.first, self.fire, self.second = nn.Linear(6, 8), LIF(tau=1.0), nn.Linear(8, 3)
        nn.init.zeros_(self.first.weight)
        nn.init.constant_(self.first.bias, bias)

    def forward(self, x):
        fired = self.second(self.fire(self.first(x).expand(4, -1, -1)))
        return torch.renorm(fired, 2, 0, 1.0).mean(0)


@pytest.mark.filterwarnings("ignore:not counted", "ignore:no neuron fired")
@pytest.mark.parametrize(("bias", "rate"), [(2.0, 1.0), (-2.0, 0.0)])
def test_each_figure_stands_in_its_column_and_unit(bias, rate):
    from common.judging import judge

    x, model = torch.rand(5, 6) + 0.1, ThreeParts(bias)
    row, report = judge(model, x), energy(model, x)
    multiplied, added = 4 * 6 * 8, 4 * 8 * 3 * rate
    assert row["multiplications"] == pytest.approx(multiplied / 1e6)
    assert row["operations"] == pytest.approx((multiplied + added) / 1e6)
    assert row["energy_mj"] == pytest.approx((multiplied * E_MAC + added * E_AC) * 1e-9)
    assert row["ann_mj"] == report.ann_mj and row["memory_mj"] == report.estimates["step"].cost.total_mj
    assert row["firing_rate"] == rate and row["params"] == 6 * 8 + 8 + 8 * 3 + 3
    assert any(reason.startswith("not counted: the model: ") for reason in row["why"])
    assert ("no neuron fired" in row["why"]) == (rate == 0)


def test_a_model_in_which_nothing_fires_is_called_silent():
    from common.judging import judge, untrained

    model = create_model("sdt_2_256", dim=16, depth=1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -9.0)
    assert judge(model, torch.rand(2, 3, 16, 16))["spike_driven"] == "silent"
    (one, inputs), (other, _) = (untrained("sdt_2_256", seed=seed, img_size=32, count=3) for seed in (1, 2))
    assert judge(one, inputs)["spike_driven"] == "yes" and len(inputs) == 3
    assert not torch.equal(one.head.weight, other.head.weight)


def test_the_inputs_of_an_untrained_model():
    from common.judging import sample_inputs

    photographs = sample_inputs(SimpleNamespace(in_channels=1), 6, 20)
    assert photographs.shape == (6, 1, 20, 20) and photographs.flatten(1).unique(dim=0).shape[0] == 6
    assert photographs.mean().abs() < 1e-5 and photographs.std() == pytest.approx(1)
    events = sample_inputs(SimpleNamespace(in_channels=2, time_steps=5), 3, 20)
    assert events.shape == (3, 5, 2, 20, 20) and torch.equal(events, events.round()) and 0 < events.mean() < 1


def test_a_form_that_is_missing_has_no_latency():
    from common.judging import latency_row

    forms = [Form("dense", latency_ms=2.5), Form("event-driven", latency_ms=0.0, missing="no kernel")]
    expected = {"dense_ms": 2.5, "event_ms": None, "missing": "no event-driven form: no kernel"}
    assert latency_row(forms) == expected and latency_row(forms[:1]) == {"dense_ms": 2.5}


def test_several_seeds_are_one_row(compare, tmp_path):
    from common.judging import sample_inputs

    energies = []
    for seed, top1 in enumerate((90.0, 94.0)):
        torch.manual_seed(seed)
        model = create_model("sdt_2_256", dim=32)
        calibrate_norms(model, sample_inputs(model, 4, 32))
        save_model(model.eval(), tmp_path / "runs" / f"seed_{seed}")
        summary = {"data": "cifar10", "test_top1": top1}
        (tmp_path / "runs" / f"seed_{seed}" / "summary.json").write_text(json.dumps(summary))
        alone, _ = compare(f"runs/seed_{seed}", "img_size=32", "latency=false")
        energies.append(float(alone[f"runs/seed_{seed}"]["energy_mj"]))
    rows, out = compare("runs", "img_size=32", "latency=false")
    assert float(rows["runs"]["top1"]) == 92.0 and float(rows["runs"]["top1_std"]) == pytest.approx(8**0.5)
    assert float(rows["runs"]["energy_mj"]) == pytest.approx(sum(energies) / 2)
    assert rows["runs"]["data"] == "cifar10" and float(rows["runs"]["firing_rate"]) > 0.01
    assert "dense_ms" not in rows["runs"] and "92.00 ± 2.83" in out


def test_a_seed_without_a_figure_leaves_none_and_the_worst_verdict_stands():
    from common.judging import mean_row

    row = {"family": "V1", "params": 7, "energy_mj": 1.0, "spike_driven": "yes", "why": ["as it is"], "top1": 90.0}
    other = {"family": "V1", "params": 7, "energy_mj": 3.0, "spike_driven": "silent", "why": ["no neuron fired"]}
    for rows in ([row, other], [other, row]):
        found = mean_row(rows)
        assert (found["energy_mj"], found["params"], found["spike_driven"]) == (2.0, 7, "silent")
        assert found["top1"] is None and "top1_std" not in found
        assert found["why"][0] == "silent with 1 of 2 seeds" and set(found["why"][1:]) == {
            "as it is",
            "no neuron fired",
        }
    for one in (row, other):
        assert mean_row([one, one | {"spike_driven": "no", "data": "digits"}])["spike_driven"] == "no"
    assert mean_row([row]) == row


def test_a_run_is_judged_by_the_model_that_its_accuracy_is_of(compare, tmp_path):
    from common.config import changed, load_config, to_yaml
    from common.judging import sample_inputs

    torch.manual_seed(0)
    config = load_config(["data.test_samples=20", "data.img_size=16"], default="digits")
    for name, dim in (("best", 32), ("last", 64)):
        model = create_model("sdt_2_256", depth=1, dim=dim, in_channels=1)
        calibrate_norms(model, sample_inputs(model, 4, 16))
        save_model(model.eval(), tmp_path / "run" / name)
        sizes = sum(parameter.numel() for parameter in model.parameters())
    config = changed(config, {"model.in_channels": 1, "model.num_classes": 10})
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"data": "digits", "test_top1": 50.0}))
    rows, _ = compare("run", "latency=false")
    assert (float(rows["run"]["top1"]), int(rows["run"]["params"])) == (50.0, sizes)


@pytest.mark.filterwarnings("ignore:.*it is left out")
def test_a_run_is_judged_on_what_can_be_read(tmp_path, photographs):
    import shutil

    from common.config import load_config
    from common.side_by_side import data_of

    shutil.copytree(photographs, tmp_path / "data")
    images = sorted((tmp_path / "data" / "val").rglob("*.jpg"))
    for image in images[1:]:
        image.write_bytes(b"")
    asked = [f"data.root={tmp_path / 'data'}", "data.img_size=16", "data.on_error=skip"]
    assert data_of(load_config(asked, default="finetune"), 99).shape == (1, 3, 16, 16)
    images[0].write_bytes(b"")
    with pytest.raises(ConfigError, match="not one of the 14 samples"):
        data_of(load_config(asked, default="finetune"), 99)


def test_what_cannot_be_compared_is_refused(compare, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["sdt_9_999"], "sdt_9_999 is neither a folder or file nor a variant"),
        (["empty"], "checkpoint=empty: "),
        (["sdt_2_256", "rounds=0"], "rounds: expected a value of at least 1, got 0"),
        (["sdt_2_256", "latency=perhaps"], "latency"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(*arguments)
