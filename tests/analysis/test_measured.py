"""Energy counters that are folders of this test, and a network measured with them."""

import sys
import types

import pytest
import torch
from torch import nn

from sdt_blocks import LIF, example_images, example_model
from sdt_blocks.analysis.counters import find_counters
from sdt_blocks.analysis.measured import ANN, DENSE, EVENTS, as_ann, latencies, measure

CPU = torch.device("cpu")
ROUND = 262_143_328_850


def zone(powercap, folder, name, microjoules):
    (powercap / folder).mkdir(parents=True)
    for file, content in (("name", name), ("max_energy_range_uj", ROUND), ("energy_uj", microjoules)):
        (powercap / folder / file).write_text(f"{content}\n")
    return powercap / folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path):
    """Two processors, one with memory beside it, and everything that would count twice."""
    files = {
        name: zone(tmp_path, folder, name, 1_000)
        for folder, name in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
        )
    }
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000)
    return tmp_path, files


def test_processors_and_memory_count_once_each(powercap):
    counters, missing = find_counters(CPU, powercap[0])
    assert ([counter.name for counter in counters], missing) == (["package-0", "dram", "package-1"], "")


def test_a_counter_that_starts_anew_goes_on(powercap):
    folder, files = powercap
    (package, *_), _ = find_counters(CPU, folder)
    files["package-0"].write_text(f"{ROUND - 500_000}\n")
    assert package.joules() == pytest.approx((ROUND - 501_000) * 1e-6, abs=1e-9)
    files["package-0"].write_text("2000000\n")
    assert package.joules() == pytest.approx((ROUND - 501_000 + 2_500_000) * 1e-6, abs=1e-9)
    assert package.joules() == package.joules()


def test_machines_without_counters_say_so(tmp_path):
    assert find_counters(CPU, tmp_path / "none") == (
        [],
        f"this machine shows no energy counters ({tmp_path / 'none'} is not there)",
    )
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert "has no processor's counter" in find_counters(CPU, tmp_path)[1]
    zone(tmp_path, "intel-rapl:1", "package-0", "many")
    assert "cannot be read as an energy counter" in find_counters(CPU, tmp_path)[1]


def test_counters_of_root_alone_are_named(powercap, monkeypatch):
    from pathlib import Path

    read = Path.read_text

    def refuse(path, *args, **options):
        if path.name == "energy_uj":
            raise PermissionError(path)
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    counters, missing = find_counters(CPU, powercap[0])
    assert counters == [] and "energy_uj can be read by root alone" in missing


def test_the_gpus_counter(powercap, monkeypatch):
    """Against a stand-in for NVML: millijoules since the driver was loaded."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    counters, missing = find_counters(gpu, powercap[0])
    assert len(counters) == 3 and "pip install nvidia-ml-py" in missing
    readings = iter([7_000, 9_500])
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings) if handle == "GPU-1-2" else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2", name="a GPU")
    )
    counters, missing = find_counters(gpu, powercap[0])
    assert counters[-1].name == "a GPU" and missing == "" and counters[-1].joules() == pytest.approx(2.5)
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(RuntimeError("no driver"))
    assert "cannot be read (no driver)" in find_counters(gpu, powercap[0])[1]


class Constant:
    """A counter of so many watts, by a clock that each look moves on by a second."""

    name = "a meter"

    def __init__(self, watts):
        self.watts, self.looks = watts, 0

    def joules(self):
        self.looks += 1
        return self.watts * self.looks


def test_joules_of_an_inference(monkeypatch):
    """Ten joules between the looks before and after, shared by the samples that ran in between."""
    from sdt_blocks.analysis import measured

    images = example_images()[0][:4]
    model, runs = example_model(), []
    monkeypatch.setattr(measured.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        measured, "_times", lambda form, x, seconds, warm=True: runs.append((form(x).shape[0], warm)) or [0.25, 0.25]
    )
    found = measure(model, images, counters=[Constant(10)], seconds=0.1, missing="no GPU")
    assert [form.name for form in found.forms] == [DENSE, EVENTS, ANN]
    for form in found.forms:
        assert form.energy.joules == {"a meter": pytest.approx(10 / 8)}
        assert form.latency_ms == pytest.approx(250) and form.throughput == pytest.approx(16)
    assert runs[:3] == [(1, True), (4, True), (4, False)]
    assert found.counters == "joules of a meter, all programs together; no GPU"
    assert list(found.latency_ms) == [1, 2, 3, 4]


def test_a_network_is_measured_and_left_as_it_was():
    model, images = example_model().train(), example_images()[0][:2]
    found = measure(model, images, seconds=0.001)
    assert model.training and model.time_steps == 4 and all(form.missing == "" for form in found.forms)
    assert all(form.latency_ms > 0 and form.throughput > 0 and form.energy is None for form in found.forms)
    assert all(latency > 0 for latency in found.latency_ms.values()) and "not asked for" in found.counters


def test_models_take_turns(monkeypatch):
    """One of them has no event-driven form, which is said; of the others each call is followed by the next one's."""
    from sdt_blocks.analysis import measured

    models, order, told = {"one": example_model(), "two": example_model()}, [], []
    build, run = measured._FORMS[EVENTS], measured._run

    def built(model):
        if model is models["two"]:
            raise RuntimeError("no\n  compiler")
        return build(model)

    monkeypatch.setitem(measured._FORMS, EVENTS, built)
    monkeypatch.setattr(measured, "_run", lambda form, x: (order.append(id(form)), run(form, x)))
    found = latencies(models, dict.fromkeys(models, example_images()[0][:1]), rounds=3, tick=told.append)
    assert [(name, form.name) for name, forms in found.items() for form in forms] == [
        (name, form) for name in models for form in (DENSE, EVENTS)
    ]
    assert [form.missing for forms in found.values() for form in forms] == ["", "", "", "no compiler"]
    assert [form.latency_ms > 0 for forms in found.values() for form in forms] == [True, True, True, False]
    # Each is tried once; two rounds count nowhere, three do.
    assert len(set(order)) == 3 and order == order[:3] * 6
    assert told[0] == "one: dense" and told[-1] == "round 3 of 3"


def test_latencies_that_are_missing_say_why(monkeypatch):
    from sdt_blocks.analysis import measured

    optimize = measured.optimize_for_inference

    def fail_at_three(model, **options):
        if getattr(model, "time_steps", 0) == 3:
            raise ValueError("three steps are\n too many")
        return optimize(model, **options)

    monkeypatch.setattr(measured, "optimize_for_inference", fail_at_three)
    found = measure(example_model(), example_images()[0][:1], seconds=0.001)
    assert list(found.latency_ms) == [1, 2] and found.latency_missing == "with 3 step(s), three steps are too many"
    assert found.to_dict()["latency_missing"] == found.latency_missing
    plain = measure(nn.Sequential(nn.Linear(3, 2), LIF()), torch.rand(2, 1, 3), seconds=0.001)
    assert not plain.latency_ms and "Sequential has no time_steps to set" in plain.latency_missing


def test_a_network_that_takes_time_first_is_given_fewer_steps(monkeypatch):
    from sdt_blocks.analysis import measured

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif, self.time_steps = nn.Linear(3, 2), LIF(), 3

        def forward(self, x):
            return self.lif(self.fc(x)).mean(0)

    given = set()
    monkeypatch.setattr(measured, "_run", lambda form, x: given.add(tuple(x.shape)))
    found = measure(TimeFirst(), torch.rand(3, 2, 3), axis=1, seconds=0.0)
    assert list(found.latency_ms) == [1, 2, 3]
    assert given == {(3, 2, 3), (1, 2, 3), (1, 1, 3), (2, 1, 3), (3, 1, 3)}  # (1, 2, 3) is the ANN's


def test_the_ann_has_the_layers_and_no_neuron():
    model, images = example_model(), example_images()[0]
    ann = as_ann(model)
    logits = ann(images)
    assert logits.isfinite().all() and logits.shape == (20, 10) and len(logits.unique(dim=0)) > 5
    assert sum(p.numel() for p in ann.parameters()) == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="no time_steps to set to one"):
        as_ann(nn.Sequential(nn.Linear(2, 2)))
