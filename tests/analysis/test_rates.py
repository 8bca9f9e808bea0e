"""Firing rates against the authors' figures, direct means, plain snnTorch loops and a single process."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import LIF, optimize_for_inference
from sdt_blocks.analysis import energy, firing_rates


def our_layers(theirs, depth):
    names = {f"MS_SPS_lif{i or ''}": f"patch.neurons.{i}" for i in range(4)} | {"head_lif": "head_neuron"}
    parts = {
        "SSA_Conv{}_first_lif": "attention.branch.neuron",
        "SSA_Conv{}_q_lif": "attention.branch.q_neuron",
        "SSA_Conv{}_k_lif": "attention.branch.k_neuron",
        "SSA_Conv{}_v_lif": "attention.branch.v_neuron",
        "SSA_Conv{}_kv_before": "attention.branch.mixer.coincidences",
        "SSA_Conv{}_kv": "attention.branch.mixer.neuron",
        "SSA_Conv{}_x_after_qkv": "attention.branch.mixer.masked",
        "MLP_Conv{}_fc1_lif": "mlp.branch.neuron1",
        "MLP_Conv{}_fc2_lif": "mlp.branch.neuron2",
    }
    names |= {f"MS_{a.format(i)}": f"blocks.{i}.{b}" for i in range(depth) for a, b in parts.items()}
    return names[theirs]


def test_released_rates(golden):
    rates = firing_rates(golden.model(), golden.tensors["input"])
    for theirs, expected in golden.firing_rates.items():
        ours = our_layers(theirs, golden.config["depth"])
        if golden.config["dvs_mode"] and theirs.endswith(("k_lif", "v_lif")):
            # With event pooling the released figures are those after the pooling.
            ours = ours.replace("k_neuron", "mixer.k_pool").replace("v_neuron", "mixer.v_pool")
        assert rates[ours].rate == pytest.approx(expected, abs=1e-3), theirs


def test_batches_of_any_size_add_up(small):
    model, x = small(), torch.rand(7, 3, 16, 16)
    whole = firing_rates(model, x)
    parts = firing_rates(model, [x[:3], (x[3:6], torch.zeros(3)), [x[6:], None]])
    assert parts.samples == whole.samples == 7
    assert list(parts.layers) == list(whole.layers)
    for name, layer in whole.layers.items():
        assert parts[name].rate == pytest.approx(layer.rate, rel=1e-12)
        assert parts[name].channel_rate == pytest.approx(layer.channel_rate, rel=1e-12)
    assert whole["head_neuron"].mean > 0


def test_recordings_of_unequal_length(small):
    model, x = small(), torch.rand(2, 5, 3, 16, 16)
    rates = firing_rates(model, [x, x[:, :2]])
    long, short = firing_rates(model, x), firing_rates(model, x[:, :2])
    for name, layer in rates.layers.items():
        both = [(a + b) / 2 for a, b in zip(long[name].rate, short[name].rate, strict=False)]
        assert layer.rate == pytest.approx(both + long[name].rate[2:])


@pytest.mark.parametrize("options", [{"time_steps": 1}, {"time_steps": 16}, {"neuron": "plif"}, {"per_step": True}])
def test_settings(small, options):
    model, x = small(**options), torch.rand(2, 3, 16, 16)
    seen = {}
    model.mlp_neuron = model.blocks[0].mlp.branch.neuron1
    model.mlp_neuron.register_forward_hook(lambda module, args, output: seen.update(spikes=output))
    rates = firing_rates(model, x)
    direct = seen["spikes"].double().mean((1, 2, 3, 4))
    assert rates["blocks.0.mlp.branch.neuron1"].rate == pytest.approx(direct.tolist())
    assert rates.steps == model.time_steps


def test_half_precision(small):
    model = small().bfloat16()
    rates = firing_rates(model, torch.rand(2, 3, 16, 16))
    assert all(0 <= rate <= 1 for layer in rates.layers.values() for rate in layer.rate)
    assert rates["patch.neurons.0"].mean > 0


def test_silent_and_saturated_channels():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = LIF()

        def forward(self, x):
            drive = torch.tensor([0.0, 10.0, 1.2, 10.0]).view(1, 1, 4, 1, 1)
            return self.neuron(drive.expand(4, len(x), 4, 2, 2))

    layer = firing_rates(Constant(), torch.rand(3, 1))["neuron"]
    # An input of 1.2 with tau = 2: the membrane is 0.6, 0.9, 1.05 and, after the reset, 0.6 again.
    assert layer.channel_rate == [0, 1, 0.25, 1]
    assert layer.rate == [0.5, 0.5, 0.75, 0.5]
    assert (layer.silent, layer.saturated) == (0.25, 0.5)


def test_all_silent(small):
    model = small()
    for module in model.modules():
        if isinstance(module, LIF):
            module.threshold = 1e9
    rates = firing_rates(model, torch.rand(2, 3, 16, 16))
    assert {rate for layer in rates.layers.values() for rate in layer.rate} == {0.0}
    assert all(layer.silent == 1 for layer in rates.layers.values())


class Loop(nn.Module):
    """snnTorch as its tutorials write it: a loop over steps; one neuron holds its state, one is handed it."""

    def __init__(self, steps=4):
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(6, 8), snntorch.Leaky(beta=0.9, init_hidden=True)
        self.fc2, self.lif2 = nn.Linear(8, 3), snntorch.Leaky(beta=0.8, reset_mechanism="zero")
        nn.init.uniform_(self.fc1.weight, 0, 0.5)
        nn.init.uniform_(self.fc2.weight, 0, 0.5)

    def forward(self, x, spikes=None):
        membrane = self.lif2.init_leaky()
        out = []
        for _ in range(self.steps):
            first = self.lif1(self.fc1(x))
            second, membrane = self.lif2(self.fc2(first), membrane)
            out.append(second)
            if spikes is not None:
                spikes += [first, second]
        return torch.stack(out)


def test_plain_snntorch_loop():
    torch.manual_seed(0)
    net, x = Loop(), torch.rand(5, 6)
    expected = []
    with torch.no_grad():
        net(x, expected)
    # The second batch must not go on from the membranes of the first.
    rates = firing_rates(net, [x, x])
    for offset, name in enumerate(("lif1", "lif2")):
        direct = [spikes.double().mean().item() for spikes in expected[offset::2]]
        assert rates[name].rate == pytest.approx(direct), name
    assert rates.samples == 10 and 0 < rates["lif2"].mean < 1


def test_loop_outside_of_the_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), snntorch.Leaky(beta=0.9, init_hidden=True))
    x = torch.rand(3, 2, 6) * 4
    rates = firing_rates(net, x, forward=lambda net, x: [net(step) for step in x])
    net[1].reset_mem()
    with torch.no_grad():
        expected = [net(step).mean().item() for step in x]
    assert rates["1"].rate == pytest.approx(expected)
    assert rates.samples == 2


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_models_are_seen_through(small, how):
    model, x = small(), torch.rand(2, 3, 16, 16)
    expected = firing_rates(model, x)
    if how == "in place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with torch.no_grad():
        model(x)
    found = firing_rates(model, x)
    assert {name: layer.rate for name, layer in found.layers.items()} == {
        name: layer.rate for name, layer in expected.layers.items()
    }


def test_model_is_left_as_it_was(small):
    model = small().train()
    model.patch.stages[0].norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    firing_rates(model, torch.rand(2, 3, 16, 16))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_csv(small, tmp_path):
    rates = firing_rates(small(), torch.rand(2, 3, 16, 16))
    rates.to_csv(tmp_path / "rates.csv")
    with open(tmp_path / "rates.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == list(rates.layers)
    assert float(rows[0]["step_2"]) == rates["patch.neurons.0"].rate[2]


def test_errors(small):
    with pytest.raises(ValueError, match="no known neuron layer"):
        firing_rates(nn.Linear(2, 2), torch.rand(1, 2))
    with pytest.raises(ValueError, match="no batch"):
        firing_rates(small(), [])
    with pytest.raises(TypeError, match="must be a tensor"):
        firing_rates(small(), [{"x": 1}])
    with pytest.raises(TypeError, match="analyze the model that it was made from"):
        energy(optimize_for_inference(small(), compile=False), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="took part"):
        firing_rates(small(), [torch.rand(1, 3, 16, 16)], forward=lambda model, x: x)
    with pytest.raises(ValueError, match="must not be empty"):
        firing_rates(small(), [torch.rand(0, 3, 16, 16)])
    with pytest.raises(TypeError, match=r"expected batches, .* got NoneType"):
        firing_rates(small(), None)


@pytest.mark.parametrize("analysis", [firing_rates, energy])
def test_what_is_not_finite_is_not_taken_for_silence(small, analysis):
    images = torch.rand(3, 3, 16, 16)
    for value in (torch.nan, torch.inf):
        images[1, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"a batch \[3, 3, 16, 16\] holds values that are not finite"):
            analysis(small(), images)
    model = small()
    model.patch.stages[0].conv.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"patch\.stages\.0\.conv\.weight holds values that are not numbers"):
        analysis(model, torch.rand(3, 3, 16, 16))


TWO = """
import sys, json, torch
sys.path.insert(0, sys.argv[1])
from conftest import lively as small
from sdt_blocks.analysis import energy, firing_rates
rank = int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
mine = [x[:4]] if rank == 0 else [x[4:]]
rates, report = firing_rates(small(), mine), energy(small(), mine)
print(json.dumps({"rates": {k: [*v.rate, v.std] for k, v in rates.layers.items()}, "energy": report.to_json()}))
torch.distributed.destroy_process_group()
"""


def test_two_processes_count_as_one(small, tmp_path):
    arguments = [sys.executable, "-c", TWO, str(Path(__file__).parent)]
    workers = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
    assert found[0] == found[1]
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rates, report = firing_rates(small(), x), json.loads(energy(small(), x).to_json())
    assert {name: pytest.approx([*layer.rate, layer.std]) for name, layer in rates.layers.items()} == found[0]["rates"]
    theirs = json.loads(found[0]["energy"])
    assert theirs["samples"] == 5
    assert theirs["total_mj"] == pytest.approx(report["total_mj"], rel=1e-12)
    for name, estimate in theirs["estimates"].items():
        for figure in ("total_mj", "memory_mj", "std_mj", "ann_mj", "break_even"):
            assert estimate[figure] == pytest.approx(report["estimates"][name][figure], rel=1e-9), (name, figure)
    for ours, other in zip(report["layers"], theirs["layers"], strict=True):
        assert ours["name"] == other["name"] and ours["rate"] == pytest.approx(other["rate"], rel=1e-12)
