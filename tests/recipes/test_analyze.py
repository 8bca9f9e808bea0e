"""The analysis recipe on a run, a released file, events and plain networks: what it writes, and what it refuses."""

import csv
import json
import shutil

import pytest
import snntorch
import torch
from launching import TWO
from scipy import stats
from torch import nn

from sdt_blocks import DataCard, SpikeDrivenTransformer, calibrate_norms, create_model, save_model
from sdt_blocks.analysis import analyze_model, energy, firing_rates
from sdt_datasets.images import build_image_datasets

FILES = {
    "attention_blocks.png", "attention_steps.png", "audit.txt", "energy.json", "energy.png", "index.html",
    "layers.csv", "layers.md", "layers.tex", "membrane.png", "overlays", "raster.png", "rate_histogram.png",
    "rates.csv", "rates.png", "time_steps.csv", "time_steps.md", "time_steps.tex",
}  # fmt: skip


@pytest.fixture
def run_folder(tmp_path):
    """What a training run leaves behind, without the training."""
    from common.config import load_config, to_yaml

    torch.manual_seed(0)
    model = SpikeDrivenTransformer(depth=2, dim=16, in_channels=1, num_classes=10, pooling="0011").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 3)
            nn.init.uniform_(module.bias, 0, 1)
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    folder = tmp_path / "run"
    save_model(model, folder / "best")
    config = load_config(["data.img_size=8", "threads=1", "tracker=none"], default="digits")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder


def direct(run_folder, samples):
    """The library's figures for the first images of the evaluation set, in one batch."""
    from sdt_blocks import load_model

    _, test = build_image_datasets(
        "digits", img_size=8, mean=[0.3], std=[0.35], interpolation="bilinear", test_samples=samples
    )
    images = torch.stack([test[i][0] for i in range(samples)])
    model = load_model(run_folder)
    return firing_rates(model, images), json.loads(energy(model, images).to_json())


def check_steps(run_folder, folder, samples):
    """Accuracy and energy with the first steps are those of the model told to take no more of them."""
    from sdt_blocks import load_model

    _, test = build_image_datasets(
        "digits", img_size=8, mean=[0.3], std=[0.35], interpolation="bilinear", test_samples=samples
    )
    images = torch.stack([test[i][0] for i in range(samples)])
    targets = torch.tensor([test[i][1] for i in range(samples)])
    with open(folder / "time_steps.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["steps"]) for row in rows] == [1, 2, 3, 4] and all(float(row["latency_ms"]) > 0 for row in rows)
    model = load_model(run_folder)
    for row in (rows[1], rows[3]):
        model.time_steps = int(row["steps"])
        right = (model(images).argmax(1) == targets).float().mean()
        assert float(row["accuracy"]) == pytest.approx(float(right), abs=1e-6)
        assert float(row["formula_mj"]) == pytest.approx(energy(model, images).total_mj, rel=1e-6)


def check_intervals(folder, page, told):
    """Those of 80 % around every mean, in each file, on the page and on the terminal."""
    report = json.loads((folder / "energy.json").read_text())
    low, high = report["estimates"]["step"]["interval_mj"]
    found = report["estimates"]["step"]
    half = stats.t.ppf(0.9, 49) * found["std_mj"] / 50**0.5
    assert (low, high) == pytest.approx((found["total_mj"] - half, found["total_mj"] + half)) and half > 0
    with open(folder / "time_steps.csv", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    assert [float(last["memory_mj_low"]), float(last["memory_mj_high"])] == pytest.approx([low, high])
    accuracy = stats.binomtest(round(float(last["accuracy"]) * 50), 50).proportion_ci(0.8, method="wilson")
    assert [float(last["accuracy_low"]), float(last["accuracy_high"])] == pytest.approx(list(accuracy))
    with open(folder / "layers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(
        float(row["formula_mj_low"]) <= float(row["formula_mj"]) <= float(row["formula_mj_high"]) for row in rows
    )
    for ending in ("md", "tex"):
        text = (folder / f"layers.{ending}").read_text(encoding="utf-8")
        assert " [" in text and "80 % confidence interval" in text
    with open(folder / "rates.csv", encoding="utf-8") as file:
        assert all(float(row["low"]) <= float(row["mean"]) <= float(row["high"]) for row in csv.DictReader(file))
    assert page.count("<polygon") == 3 and "80 % confidence interval" in page and "80 % confidence" in told


def check_figures(folder, rates, report):
    found = json.loads((folder / "energy.json").read_text())
    assert found["samples"] == report["samples"]
    assert found["total_mj"] == pytest.approx(report["total_mj"], rel=1e-9)
    with open(folder / "rates.csv", encoding="utf-8") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert rows.keys() == rates.layers.keys()
    for name, layer in rates.layers.items():
        assert [float(rows[name][f"step_{t}"]) for t in range(4)] == pytest.approx(layer.rate, rel=1e-9)


def test_a_run(launcher, run_folder):
    done = launcher.run(
        "analyze",
        "checkpoint=run",
        "samples=50",
        "batch_size=16",
        "images=3",
        "neurobench=true",
        "measure=true",
        "seconds=0.05",
        "confidence=0.8",
        launch=("--cpu",),
    )
    assert done.returncode == 0, done.stderr
    folder = run_folder / "analysis"
    assert {path.name for path in folder.iterdir()} == FILES | {"neurobench.json", "measured.json", "analyzed.json"}
    assert len(list((folder / "overlays").glob("*.png"))) == 3
    rates, report = direct(run_folder, 50)
    check_figures(folder, rates, report)
    lines = (folder / "audit.txt").read_text(encoding="utf-8").splitlines()
    # The run is too short for every layer to fire.
    assert lines[0].endswith("is spike-driven.") or (
        lines[0] == rates.silence and lines[1].endswith("is spike-driven.")
    )
    assert rates.mean > 0 and "It is judged as it is deployed." in lines
    assert "The network is spike-driven." in done.stdout and "run/analysis/index.html" in done.stdout
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5 and "50 samples, 4 time steps, input 1 x 8 x 8" in page
    measured = json.loads((folder / "measured.json").read_text())
    assert [form["name"] for form in measured["forms"]] == ["dense", "event-driven", "ANN"]
    assert all(form["latency_ms"] > 0 and form["throughput"] > 0 for form in measured["forms"])
    assert measured["counters"] in done.stdout and ("joules of" in measured["counters"] or "counter" in done.stdout)
    assert measured["latency_missing"] == ""
    check_steps(run_folder, folder, samples=50)
    check_intervals(folder, page, done.stdout)
    neurobench = json.loads((folder / "neurobench.json").read_text())
    assert neurobench["ActivationSparsity"] == pytest.approx(1 - rates.mean)


@pytest.mark.slow
def test_two_processes_write_the_figures_of_one(launcher, run_folder):
    done = launcher.run("analyze", "checkpoint=run", "samples=37", "output_dir=two", launch=TWO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The network is") == 1
    check_figures(launcher.folder / "two", *direct(run_folder, 37))


def test_a_released_file_with_other_steps(launcher, released_file, photographs):
    done = launcher.run(
        "analyze", f"checkpoint={released_file}", f"data.root={photographs}", "data.img_size=64", "data.workers=0",
        "samples=4", "model.time_steps=2", "layer=patch.neurons.0", "output_dir=out", "threads=1",
        "as_trained=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "It is judged as it is trained." in (launcher.folder / "out" / "audit.txt").read_text()
    found = json.loads((launcher.folder / "out" / "energy.json").read_text())
    assert found["steps"] == 2 and found["samples"] == 4
    assert "patch.neurons.0: spikes of the first sample" in (launcher.folder / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["checkpoint=FOLDER"]),
        (["checkpoint=nowhere"], ["nowhere", "no such file"]),
        (["checkpoint=run", "samples=0"], ["samples", "at least 1", "got 0"]),
        (["checkpoint=run", "samples=many"], ["samples", "many"]),
        (["checkpoint=run", "confidence=95"], ["confidence", "below 1", "got 95"]),
        (["checkpoint=run", "layer=head"], ["layer=head", "head_neuron"]),
        (["checkpoint=run", "sample=3"], ["sample"]),
        (["checkpoint=run", "output_dir=run/config.yaml"], ["output_dir=run/config.yaml", "no files can be written"]),
    ],
)
def test_refusals(run_folder, monkeypatch, arguments, words):
    import analyze
    from common.config import ConfigError

    monkeypatch.chdir(run_folder.parent)
    with pytest.raises(ConfigError) as refused:
        analyze.main(arguments)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)
    assert not (run_folder / "analysis").exists()


def test_an_evaluation_set_may_have_fewer_samples_than_are_looked_at(set_up, photographs, tmp_path, capsys):
    import analyze

    shutil.rmtree(shutil.copytree(photographs, tmp_path / "photographs") / "train")  # what trains is not looked at
    torch.manual_seed(0)
    model = create_model("sdt_2_256", depth=1, dim=16, num_classes=2, pooling="0001")
    calibrate_norms(model, torch.rand(8, 3, 16, 16))
    model.card = DataCard(["china", "flower"])
    save_model(model.eval(), tmp_path / "model")
    settings = ["config=finetune", "data.root=photographs", "data.img_size=16", "data.workers=0", "threads=1"]
    analyze.main(["checkpoint=model", *settings, "seconds=0", "images=1"])
    assert "on 14 samples" in capsys.readouterr().out


def test_help(launcher):
    done = launcher.run("analyze", "--help")
    assert done.returncode == 0 and "neurobench=false" in done.stdout and "data.root" in done.stdout


def test_event_frames_and_event_pooling(golden, tmp_path):
    x = golden.tensors["input"]
    rates, report = analyze_model(golden.model(), [x[:1], x[1:]], tmp_path, images=2)
    assert rates.samples == len(x) and report.steps == golden.config["T"]
    assert (tmp_path / "index.html").stat().st_size > 50_000
    assert golden.config["depth"] == 1 or (tmp_path / "attention_blocks.png").exists()


def test_a_plain_snntorch_network(tmp_path, capsys):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.lif = nn.Linear(6, 8), nn.LayerNorm(8), snntorch.Leaky(0.9, init_hidden=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            return sum(self.out(self.lif(self.norm(self.fc(x)))) for _ in range(4))

    rates, report = analyze_model(Loop(), [torch.rand(5, 6)], tmp_path)
    assert rates.mean > 0 and [str(entry) for entry in report.not_counted] == ["norm: native_layer_norm"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == FILES - {"attention_steps.png", "attention_blocks.png"}
    assert "NOT spike-driven" in (tmp_path / "audit.txt").read_text() and "NOT spike-driven" in capsys.readouterr().out
