"""Energy models against closed forms, direct counts of what each kernel meets, and SpikingJelly's counters."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import snntorch
import snntorch.utils
import torch
from torch import nn

from sdt_blocks import LIF, MetaSpikeFormer, create_model, over_time
from sdt_blocks.analysis import ENERGY_MODELS, energy, energy_from_rates, firing_rates, read_energy_models
from sdt_blocks.analysis.energy_models import ann_cost, estimate
from sdt_blocks.analysis.operations import count_operations

PJ = 1e-9
STEPS = 3


class Two(nn.Module):
    """An analog layer, a neuron and a layer fed by spikes, 6 -> 8 -> 5."""

    def __init__(self, neuron=None):
        super().__init__()
        self.first, self.neuron, self.second = nn.Linear(6, 8), neuron or LIF(), nn.Linear(8, 5)

    def forward(self, x):
        return self.second(self.neuron(6 * self.first(x).expand(STEPS, len(x), 8)))


@pytest.fixture(scope="module")
def two():
    """The report, and the mean number of spikes of a sample at each step."""
    torch.manual_seed(0)
    net, x = Two(), torch.rand(4, 6)
    seen = []
    handle = net.neuron.register_forward_hook(lambda module, args, output: seen.append(output))
    net(x)
    handle.remove()
    spikes = seen[0].double().sum((1, 2)) / 4
    assert 0 < spikes.sum() < STEPS * 8
    return energy(net, x), spikes


def test_formula_and_executed(two):
    report, spikes = two
    formula, executed = report.estimates["formula"], report.estimates["executed"]
    fired = spikes.sum().item()
    assert formula.cost.total_mj == pytest.approx(PJ * (4.6 * STEPS * 48 + 0.9 * 5 * fired))
    assert executed.cost.total_mj == pytest.approx(PJ * (4.6 * 48 + 0.9 * 8 + 0.9 * 5 * fired + 0.9 * 5 * STEPS))
    assert [step.total_mj for step in formula.steps] == pytest.approx(
        [PJ * (4.6 * 48 + 0.9 * 5 * count) for count in spikes.tolist()]
    )
    assert report.total_mj == formula.cost.total_mj and formula.cost.memory_mj == executed.cost.memory_mj == 0
    assert formula.ann.total_mj == pytest.approx(PJ * 4.6 * (48 + 40))
    assert formula.bits == 2 and formula.quantised.total_mj == pytest.approx(PJ * 2 * 0.9 * (48 + 40))
    bits = {steps: estimate(replace(report.operations, steps=steps), formula.model).bits for steps in (1, 2, 4, 7, 8)}
    assert bits == {1: 1, 2: 2, 4: 3, 7: 3, 8: 4}  # no spike at all is a value too
    multiplying = estimate(report.operations, replace(formula.model, ac=2.4))  # two of which are more than one 4.6
    assert multiplying.quantised.total_mj == pytest.approx(PJ * 4.6 * (48 + 40))
    assert executed.ann.total_mj == pytest.approx(PJ * (4.6 * (48 + 40) + 0.9 * (8 + 5)))


def test_simple_memory(two):
    report, spikes = two
    fired, found = spikes.sum().item(), report.estimates["step"]
    used = 48 + 8 + 5 * fired + 5 * STEPS  # weights and biases
    assert found.cost.weights_mj == pytest.approx(PJ * 24.96 * 4 * used)
    assert found.cost.states_mj == pytest.approx(PJ * 24.96 * 4 * 2 * 8 * STEPS)
    assert found.cost.compute_mj == pytest.approx(report.estimates["executed"].cost.compute_mj)
    assert found.ann.total_mj == pytest.approx(PJ * (4.6 * 88 + 0.9 * 13 + 24.96 * 4 * (48 + 8 + 40 + 5)))


def test_every_state_of_a_neuron_is_charged():
    """Two numbers a neuron of snnTorch's Synaptic, three of its Alpha, one of its Leaky or of SpikingJelly's LIF."""
    made = {
        "Leaky": (snntorch.Leaky(beta=0.9, threshold=0.05), 1),
        "Synaptic": (snntorch.Synaptic(alpha=0.9, beta=0.8, threshold=0.05), 2),
        "Alpha": (snntorch.Alpha(alpha=0.9, beta=0.8, threshold=0.05), 3),
    }
    theirs = pytest.importorskip("spikingjelly.activation_based.neuron")
    made["LIFNode"] = (theirs.LIFNode(v_threshold=0.05, step_mode="m"), 1)
    torch.manual_seed(0)
    for name, (neuron, states) in made.items():
        report = energy(Two(over_time(neuron)), torch.rand(4, 6))
        (layer,) = report.operations.neurons
        assert layer.states == states and sum(layer.spikes) > 0, name
        found = report.estimates["step"].cost.states_mj
        assert found == pytest.approx(PJ * 24.96 * 4 * 2 * 8 * STEPS * states), name


def test_memory_by_the_size_of_buffers(two):
    report, spikes = two
    fired, found = spikes.sum().item(), report.estimates["lemaire"]

    def word(entries):
        return 10 * 4 * entries / 8192  # up to 8 KB

    first, second = word(6 * 8), word(8 * 5)
    assert found.cost.weights_mj == pytest.approx(PJ * (first * (48 + 8) + second * (5 * fired + 5 * STEPS)))
    assert found.cost.states_mj == pytest.approx(PJ * (2 * word(5) * 5 * fired + 2 * word(8) * 8 * STEPS))
    assert found.cost.spikes_mj == pytest.approx(PJ * (word(6) * 6 + 2 * word(1000) * fired))
    addressing = 0.1 * (6 + 8) + 0.1 * 5 * fired
    neurons = 3.2 * 8 * STEPS + 0.1 * fired
    operations = 3.2 * 48 + 0.1 * 8 + 0.1 * (5 * fired + 5 * STEPS)
    assert found.cost.compute_mj == pytest.approx(PJ * (operations + neurons + addressing))
    prices = [found.model.price(0, size) * 32 for size in (4096, 8192, 20480, 32768, 2**19 + 2**14, 2**20, 2**24)]
    assert prices == pytest.approx([5, 10, 15, 20, 60, 100, 100])


def test_weights_once_and_routed_spikes(two):
    report, spikes = two
    fired, found = spikes.sum().item(), report.estimates["yan"]
    assert found.cost.weights_mj == pytest.approx(PJ * 8 * (20 * (48 + 40) + 0.25 * 5 * (fired + STEPS)))
    assert found.steps[1].weights_mj == pytest.approx(PJ * 8 * 0.25 * 5 * (spikes[1].item() + 1))
    assert found.cost.states_mj == pytest.approx(PJ * 0.25 * 16 * 2 * 8 * STEPS)
    assert found.cost.spikes_mj == pytest.approx(PJ * (0.25 * 8 * 48 + 3 * 2 * fired))
    assert found.quantised.spikes_mj == pytest.approx(PJ * 0.25 * 2 * (48 + 40 + 8))
    assert found.quantised.weights_mj == pytest.approx(PJ * 8 * 20 * (48 + 40))
    # Of moving weights and activations alone they get the break-even rate that they publish, b / (8 T).
    moving = replace(found.model, name="moving", ac=0, mac=0, spike=0, biases=False)
    assert report.estimate(moving).rows[1].break_even_quantised == pytest.approx(2 / (8 * STEPS))
    del report.estimates["moving"]


@pytest.mark.parametrize("name", ENERGY_MODELS)
def test_at_the_break_even_rate_both_cost_the_same(two, name):
    report, _ = two
    found = report.estimates[name]
    for rate, ann in ((found.break_even, found.ann), (found.break_even_quantised, found.quantised)):
        slope = [energy_from_rates(Two(), r, (6,)).estimates[name].cost.total_mj for r in (0.25, 0.75)]
        assert slope[0] + (rate - 0.25) / 0.5 * (slope[1] - slope[0]) == pytest.approx(ann.total_mj, rel=1e-9)
    row = found.rows[1]
    assert (row.name, found.rows[2].type, found.rows[2].break_even) == ("second", "neuron", None)
    if name == "formula":
        assert row.break_even == pytest.approx(4.6 / (0.9 * STEPS))
        assert row.break_even_quantised == pytest.approx(2 / STEPS)


def test_the_verdict_names_models_and_factors(two):
    report, _ = two
    for name, found in report.estimates.items():
        factor = f"{name} ({found.ann.total_mj / found.cost.total_mj:.3g}x)"
        assert factor in report.verdict.split(";")[0]
    assert report.verdict.count("against an ANN of 2-bit activations") >= 1 and report.verdict in str(
        report.table().caption
    )
    content = json.loads(report.to_json())
    assert content["verdict"] == report.verdict and "after pooling" in content["convention"]
    assert content["estimates"]["step"]["rows"][2]["states_mj"] == report.estimates["step"].rows[2].cost.states_mj > 0


def test_biases_by_choice(two):
    report, _ = two
    plain = replace(ENERGY_MODELS["executed"], name="no biases", biases=False)
    without, found = report.estimate(plain), report.estimates["executed"]
    assert found.cost.total_mj - without.cost.total_mj == pytest.approx(PJ * 0.9 * (8 + 5 * STEPS))
    assert report.estimates.pop("no biases") is without


CONVOLUTIONS = {
    "3x3": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (4, 7, 5)),
    "strided": (nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), (4, 7, 6)),
    "grouped, uneven, dilated": (
        nn.Conv2d(4, 6, (3, 5), padding=(2, 1), dilation=(2, 1), stride=(1, 3), groups=2, bias=False),
        (4, 9, 8),
    ),
    "depthwise 7x7": (nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=False), (4, 6, 6)),
    "1d": (nn.Conv1d(3, 5, 4, padding=3, bias=False), (3, 9)),
    "3d": (nn.Conv3d(2, 3, 3, padding=1, bias=False), (2, 4, 3, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (4, 5, 4)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_executed_operations_are_what_the_kernel_meets(kind):
    """A convolution of ones with ones counts its own products."""
    convolution, shape = CONVOLUTIONS[kind]
    convolution = convolution.double().requires_grad_(False)
    nn.init.ones_(convolution.weight)
    torch.manual_seed(0)
    x = (torch.rand(2, *shape) < 0.3).double()
    layer = count_operations(convolution, x, spike_input=True).layers[0]
    assert layer.executed == [convolution(x).sum().item() / 2] and layer.executed[0] > 0
    assert layer.executed_macs == convolution(torch.ones(1, *shape).double()).sum().item() < layer.macs
    assert layer.outputs == convolution(x)[0].numel() and layer.inputs == x[0].numel()
    assert layer.moved == [x.sum().item() / 2] and layer.weights == convolution.weight.numel()
    for name, macs in (("formula", layer.macs), ("executed", layer.executed_macs)):
        assert ann_cost(layer, ENERGY_MODELS[name]).total_mj == pytest.approx(PJ * 4.6 * macs)


class Loop(nn.Module):
    """Plain snnTorch, a loop over steps."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.MaxPool2d(2)
        self.fire = snntorch.Leaky(beta=0.9, init_hidden=True)
        self.deep, self.last = nn.Conv2d(8, 6, 5, padding=2, bias=False), nn.Linear(96, 3)
        self.again = snntorch.Leaky(beta=0.9, init_hidden=True, threshold=0.1)

    def forward(self, x):
        spikes = (self.again(self.deep(self.pool(self.fire(4 * self.conv(x).abs())))) for _ in range(3))
        return torch.stack([self.last(one.flatten(1)) for one in spikes])


@pytest.mark.parametrize(("network", "size"), [("v1", 16), ("v2", 64), ("loop", 16)])
def test_additions_of_spikingjelly(network, size, small, enliven):
    """Layer for layer and to the last one; the papers' formula differs where there is a border, and only there."""
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    torch.manual_seed(1)
    widths = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1, 1), "num_heads": 4, "num_classes": 5, "time_steps": 2}
    model = {"v1": small, "v2": lambda: enliven(MetaSpikeFormer(**widths)), "loop": Loop}[network]()
    x, counter = torch.rand(3, 3, size, size), counters.SynOpCounter()
    report = energy(model, x, as_trained=True)
    snntorch.utils.reset(model)
    with torch.no_grad(), counters.DispatchCounterMode([counter]):
        model(x)
    theirs = {name.partition(".")[2]: sum(count.values()) for name, count in counter.get_counts().items()}
    differ = 0
    for layer in report.operations.layers:
        if layer.kind != "AC" or layer.type == "attention":
            continue
        executed = 3 * sum(layer.executed)
        assert round(executed) == theirs[layer.name] > 0 and executed == pytest.approx(round(executed), abs=1e-6)
        formula = report[layer.name].synaptic_operations * 3
        module = model.get_submodule(layer.name)
        border = isinstance(module, nn.Conv2d) and max(module.padding) > 0
        assert (layer.executed_macs < layer.macs) == border and (border or formula == pytest.approx(executed))
        differ += border
    assert differ


def test_memory_of_spikingjelly(small):
    """Weights read where a spike comes in, and biases, of all layers fed by spikes."""
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    base = pytest.importorskip("spikingjelly.activation_based.op_counter.base")
    model, x = small(), torch.rand(2, 3, 16, 16)
    report = energy(model, x, as_trained=True)
    counter = counters.NeuromorphicMemoryAccessCounter()
    with torch.no_grad(), base.ModuleCounterMode([counter], model=model):
        model(x)
    theirs = {name.partition(".")[2]: value for name, value in counter.get_counts().items()}
    layers = [layer for layer in report.operations.layers if layer.kind == "AC" and layer.type != "attention"]
    assert len(layers) == 11
    for row in report.estimates["step"].rows:
        assert row.type != "attention" or row.cost.weights_mj == 0 < row.cost.compute_mj
        if row.name in {layer.name for layer in layers}:
            read = theirs[row.name]["weight_read_bytes"] + theirs[row.name]["bias_read_bytes"]
            assert row.cost.weights_mj == pytest.approx(PJ * 24.96 * read / 2, rel=1e-12) and read > 0


def test_lemaires_model_of_spikingjelly():
    """The whole of it, by their own counter, where no border makes operations differ and no bias is kept."""
    theirs = pytest.importorskip("spikingjelly.activation_based.op_counter")
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fire = nn.Linear(6, 4 * 9, bias=False), neuron.LIFNode(v_threshold=0.2)
            self.mix, self.again = nn.Conv2d(4, 5, 1, bias=False), neuron.LIFNode(v_threshold=0.1)
            self.last = nn.Linear(45, 3, bias=False)

        def forward(self, x):
            membrane = self.first(x).view(-1, 4, 3, 3)
            spikes = (self.again(self.mix(self.fire(membrane)).abs()) for _ in range(STEPS))
            return torch.stack([self.last(one.flatten(1)) for one in spikes])

    torch.manual_seed(0)
    net, x = Net(), torch.rand(1, 6)
    found = theirs.estimate_lemaire_energy(net, x)
    for module in (net.fire, net.again):
        module.reset()
    ours = energy(net, x, neurons=(neuron.LIFNode,), as_trained=True).estimates["lemaire"].cost
    assert ours.total_mj == pytest.approx(PJ * found.total_pj, rel=1e-12) and found.counts["synop"] > 50
    parts = {"params_pj": ours.weights_mj, "potential_pj": ours.states_mj, "inout_pj": ours.spikes_mj}
    assert {name: PJ * found.breakdown_pj[name] for name in parts} == pytest.approx(parts, rel=1e-12)


def test_measured_log_of_a_published_network():
    """The 7.43610 mJ of Spikingformer 8-512 without its head, as its authors measured them on ImageNet."""
    table = Path(__file__).parents[2] / "recipes" / "data" / "published_rates.csv"
    with open(table, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == "spikingformer_8_512"]
    rates = {row["layer"]: float(row["rates"]) for row in rows}
    with torch.device("meta"):
        model = create_model("sdt_8_512")
    report = energy_from_rates(model, {"head": 0.0, "blocks.*.attention.branch": 0.0, **rates}, (3, 224, 224))
    fed = [layer.name for layer in report.layers if layer.kind == "AC" and layer.type != "attention"]
    assert {*fed, "head"} == {*rates, "head"} and len(fed) == 53
    assert report.total_mj - report["head"].energy_mj == pytest.approx(7.43610, rel=1e-3)


def test_the_bound_of_an_attention_from_given_rates():
    """`E_AC * N * D * sum of the rates of k and v`, from neurons that are named or one rate for all."""
    with torch.device("meta"):
        model = create_model("sdt_2_256")
    bound, per_rate = {}, 0.9 * PJ * 2 * 64 * 256
    rates = {"*k_neuron": [0.1, 0.2, 0.3, 0.4], "*v_neuron": 0.05, "*": 0.1}
    for given in (0.1, rates):
        bound[str(given)] = energy_from_rates(model, given, (3, 32, 32)).attention.bound_mj
    assert bound["0.1"] == pytest.approx(per_rate * 4 * 0.2)
    assert bound[str(rates)] == pytest.approx(per_rate * (1.0 + 4 * 0.05))


def test_the_bound_is_the_measured_one(small):
    model, x = small(), torch.rand(4, 3, 16, 16)
    measured, rates = energy(model, x), firing_rates(model, x)
    given = {name: layer.rate for name, layer in rates.layers.items() if name.endswith(("k_neuron", "v_neuron"))}
    again = energy_from_rates(model, {**given, "*": 0.1}, (3, 16, 16))
    assert again.attention.bound_mj == pytest.approx(measured.attention.bound_mj, rel=1e-9) and given


def test_models_of_ones_own(tmp_path, two):
    path = tmp_path / "chip.yaml"
    path.write_text(
        "chip:\n  base: step\n  ac: 1e-1\n  biases: false\n  buffers: [[0, 0], [4096, 8]]\nother: {mac: 2}\n"
    )
    models = read_energy_models(path)
    assert (models["chip"].ac, models["chip"].mac, models["chip"].biases) == (0.1, 4.6, False)
    assert models["chip"].buffers == ((0, 0), (4096, 8)) and "chip.yaml" in models["chip"].source
    report, spikes = two
    found = report.estimate(models["chip"])
    assert found.cost.compute_mj == pytest.approx(PJ * (4.6 * 48 + 0.1 * 5 * spikes.sum().item()))
    assert found.cost.states_mj == pytest.approx(PJ * 8 * 32 / 4096 * 2 * 8 * STEPS)
    del report.estimates["chip"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chip: {pj: 1}", "no constant 'pj'; there are base, source, mac, ac"),
        ("chip: {base: horowitz}", "base must be one of formula, executed, step, lemaire, yan, got 'horowitz'"),
        ("chip: {ac: much}", "ac must be a number, got 'much'"),
        ("chip: {ac: true}", "ac must be a number, got True"),
        ("chip: {biases: 1}", "biases must be true or false, got 1"),
        ("chip: {ac: -1}", "chip: ac must not be negative or infinite, got -1"),
        ("chip: {ac: .nan}", "chip: ac must not be negative or infinite, got nan"),
        ("chip: {buffers: [[9, 1], [8, 2]]}", "buffers must grow in size"),
        ("chip: {buffers: [[8, 1], [8, 2]]}", "buffers must grow in size"),
        ("chip: {buffers: [8, 2]}", "buffers must be pairs"),
        ("chip: 3", "expected constants under the name of each model"),
        ("- chip", "expected constants under the name of each model"),
    ],
)
def test_bad_models(text, message, tmp_path):
    path = tmp_path / "chip.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_energy_models(path)
