"""Levels of integer neurons and counts of spikes: each is as many additions, and a level as many binary steps."""

import pytest
import torch
from torch import nn

from sdt_blocks import calibrate_norms, create_model
from sdt_blocks.analysis import ENERGY_MODELS, energy, energy_from_rates, firing_rates
from sdt_blocks.analysis.energy import E_AC, PJ_IN_MJ
from sdt_blocks.neuron import IntegerNeuron


@pytest.fixture(scope="module")
def net():
    """Convolution, levels, 1x1 convolution; x in, the levels and the rows beside it."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.neuron = IntegerNeuron(levels=3)

        def forward(self, x):
            emitted = self.neuron(4 * self.first(x).unsqueeze(0))
            self.levels = 3 * emitted
            return self.last(emitted[0])

    return Net().eval(), torch.rand(2, 3, 6, 6)


def test_a_level_of_l_is_l_additions_and_l_spikes(net):
    model, x = net
    report, rates = energy(model, x), firing_rates(model, x)
    levels = model.levels.round()
    assert levels.unique().tolist() == [0, 1, 2, 3]
    additions = levels.sum().item() / 2 * 9 * 16  # by the papers' formula, which counts what falls on the padding
    assert report["last"].kind == "AC"
    assert report["last"].synaptic_operations == pytest.approx(additions)
    assert report["last"].energy_mj == pytest.approx(E_AC * PJ_IN_MJ * additions)
    assert rates["neuron"].rate == pytest.approx([(levels > i).double().mean().item() for i in range(3)])
    # Executed: a convolution of the levels with ones adds as often, borders left out.
    ones = nn.functional.conv2d(levels[0], torch.ones(16, 8, 3, 3), padding=1).sum().item() / 2
    row = next(row for row in report.estimates["executed"].rows if row.name == "last")
    biases = 16 * 36
    assert row.cost.compute_mj == pytest.approx(E_AC * PJ_IN_MJ * (ones + biases))


def test_given_rates_are_those_of_the_binary_steps(net):
    model, x = net
    report = energy_from_rates(model, 0.5, x.shape[1:])
    assert report["last"].synaptic_operations == pytest.approx(0.5 * 3 * 36 * 8 * 9 * 16)


def test_neurons_of_levels_emit_a_spike_in_each_binary_step(net):
    model, x = net
    report = energy(model, x)
    spikes = model.levels.round().sum().item() / 2
    size = 3 * 8 * 36  # binary steps x channels x places
    yan = ENERGY_MODELS["yan"]
    each = PJ_IN_MJ * (yan.reset + yan.spike)
    for found, expected in ((report, spikes), (energy_from_rates(model, 0.5, x.shape[1:]), 0.5 * size)):
        row = found.estimates["yan"].rows[-1]
        assert (row.name, row.type) == ("neuron", "neuron")
        assert row.rate == pytest.approx(expected / size) and row.cost.total_mj == pytest.approx(each * expected)


def test_attention_of_levels_adds_products_of_counts():
    """q (k^T v) of all levels in pairs, as the unfolded spikes would do it."""
    torch.manual_seed(0)
    model, x = (
        create_model("sdt_v3_5m", dims=(16, 32, 64, 64), depths=(1, 1, 1, 1, 1), num_classes=10),
        torch.rand(2, 3, 64, 64),
    )
    calibrate_norms(model, x)
    attention = model.stages[3][0][1].branch
    seen = []
    attention.mixer.register_forward_pre_hook(lambda _, given: seen.append([(4 * z).round() for z in given]))
    report = energy(model, x)
    q, k, v = seen[0]
    assert all(z.max() > 1 for z in (q, k, v))
    heads, width = 8, v.shape[2] // 8
    of_k, of_v = (z.flatten(3).unflatten(2, (heads, -1)) for z in (k, v))
    pairs = torch.einsum("tbhcn,tbhdn->", of_k, of_v).item()
    found = report["stages.3.0.1.branch"]
    assert found.kind == "AC"
    assert found.synaptic_operations == pytest.approx((pairs + q.sum().item() * width) / 2)


def test_a_sum_of_spikes_adds_as_often_as_spikes_are_in_it():
    torch.manual_seed(0)
    model, x = create_model("spikformer_4_384", depth=1, dim=32, num_heads=4), torch.rand(2, 3, 32, 32)
    calibrate_norms(model, x)
    seen = []
    model.blocks[0].attention.branch.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = energy(model, x)["blocks.0.attention.branch.q.conv"]
    assert seen[0].max() == 2
    assert found.kind == "AC" and found.synaptic_operations == pytest.approx(seen[0].sum().item() / 2 * 32)
