"""Neurons of other libraries: whole sequences step by step, without memory between calls."""

import copy
from functools import partial

import pytest
import snntorch
import torch
from snntorch import surrogate
from torch import nn

from sdt_blocks import (
    LIF,
    MembraneShortcut,
    SpikeDrivenSelfAttention,
    SpikeDrivenTransformer,
    SpikingMLP,
    optimize_for_inference,
    over_time,
)
from sdt_blocks.neuron import OverTime
from sdt_blocks.steps import fire

SNNTORCH = {
    "Leaky": partial(snntorch.Leaky, beta=0.9),
    "Leaky, hidden": partial(snntorch.Leaky, beta=0.9, init_hidden=True),
    "Leaky, hidden, with output": partial(snntorch.Leaky, beta=0.9, init_hidden=True, output=True),
    "Leaky, learned": partial(snntorch.Leaky, beta=0.9, learn_beta=True, learn_threshold=True),
    "Synaptic": partial(snntorch.Synaptic, alpha=0.8, beta=0.9),
    "Alpha": partial(snntorch.Alpha, alpha=0.9, beta=0.8),
    "Lapicque": partial(snntorch.Lapicque, R=5.0, C=1.0, time_step=1.0),
    "RLeaky": partial(snntorch.RLeaky, beta=0.9, all_to_all=False),
    "RSynaptic": partial(snntorch.RSynaptic, alpha=0.8, beta=0.9, all_to_all=False),
}


class Node(nn.Module):
    """A node in the manner of SpikingJelly: it integrates, and stays where it is until `reset`."""

    def __init__(self, threshold=1.0, step_mode="s"):
        super().__init__()
        self.threshold, self.step_mode = threshold, step_mode
        self.v = 0.0

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        if self.step_mode == "m":
            return torch.stack([self.step(x_t) for x_t in x])
        return self.step(x)

    def step(self, x):
        self.v = self.v + x
        fired = (self.v >= self.threshold).to(x)
        self.v = self.v - fired * self.threshold
        return fired


def steps_of(neuron, x):
    """Spikes by hand, one call a step."""
    outputs = [neuron(x_t) for x_t in x]
    return torch.stack([out[0] if isinstance(out, tuple) else out for out in outputs])


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.rand(6, 2, 8, 3, 3) * 1.2


@pytest.mark.parametrize("make", SNNTORCH.values(), ids=SNNTORCH)
def test_snntorch_neurons_see_every_step(make, x):
    neuron = make(threshold=1.0)
    expected = steps_of(copy.deepcopy(neuron), x)
    wrapped = over_time(neuron)
    assert 0 < expected.mean() < 1 and not torch.equal(expected[0], expected[-1])
    for _ in range(2):
        assert torch.equal(wrapped(x), expected)
    assert torch.equal(wrapped(x[:, :1]), expected[:, :1])


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_nodes_with_a_step_mode(step_mode, x):
    expected = steps_of(Node(), x)
    wrapped = over_time(Node(step_mode=step_mode))
    assert 0 < expected.mean() < 1
    for _ in range(2):
        assert torch.equal(wrapped(x), expected)
    assert wrapped.neuron.v == 0.0


def test_spikingjellys_own_node(x):
    spikingjelly = pytest.importorskip("spikingjelly.activation_based.neuron")
    for step_mode in "sm":
        node = spikingjelly.LIFNode(tau=2.0, step_mode=step_mode, decay_input=True, v_reset=0.0)
        assert torch.equal(over_time(node)(2 * x), LIF(tau=2.0)(2 * x))


@pytest.mark.parametrize("make", [*SNNTORCH.values(), Node], ids=[*SNNTORCH, "Node"])
def test_as_factory(make, x):
    torch.manual_seed(0)
    block = SpikingMLP(8, neuron=make).eval()
    nn.init.constant_(block.fc1.norm.bias, 0.4)
    assert isinstance(block.neuron1, OverTime)
    first = block(x)
    assert first.std() > 0 and torch.equal(block(x), first)
    expected = steps_of(make(threshold=1.0), x)
    assert torch.equal(block.neuron1(x), expected) and expected.any()


def test_a_sequential_with_a_neuron_in_it(x):
    block = SpikingMLP(8, neuron=lambda threshold: nn.Sequential(nn.Identity(), Node(threshold)))
    assert torch.equal(block.neuron1(x), steps_of(Node(), x))


@pytest.mark.parametrize("inner", [LIF, partial(Node, step_mode="m"), lambda: nn.Sequential(LIF())])
@pytest.mark.parametrize("other", [Node, partial(snntorch.Leaky, beta=0.9)])
def test_a_sequential_of_single_steps_and_sequences_is_refused(inner, other):
    """Single steps would reach the one, whose first axis is time, with the batch there."""
    for layers in ((inner(), other()), (other(), inner())):
        with pytest.raises(TypeError, match=r"in which \w+ takes a sequence, not single steps: put over_time"):
            over_time(nn.Sequential(*layers))


def test_gradients_and_copies(x):
    block = SpikingMLP(8, neuron=partial(snntorch.Leaky, beta=0.9, learn_beta=True)).train()
    nn.init.constant_(block.fc1.norm.bias, 0.4)
    block(x.requires_grad_()).square().sum().backward()
    for name in ("neuron1", "neuron2"):
        assert getattr(block, name).neuron.beta.grad.abs() > 0
    assert x.grad.abs().sum() > 0
    assert torch.equal(copy.deepcopy(block).eval()(x), block.eval()(x))


@pytest.mark.parametrize("make", SNNTORCH.values(), ids=SNNTORCH)
def test_mixed_blocks_have_the_same_gradients_on_both_paths(make, monkeypatch):
    """In float64, where no membrane lies within rounding of its threshold; in float32 a spike may flip there."""
    torch.manual_seed(0)
    parts = (SpikingMLP(8, neuron=make), SpikeDrivenSelfAttention(8, num_heads=2), SpikingMLP(8, neuron="plif"))
    model = nn.Sequential(*map(MembraneShortcut, parts), over_time(make())).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.2, 0.8)
    x, found = 2 * torch.rand(4, 2, 8, 5, 5, dtype=torch.float64), []
    for backend in ("reference", "compiled"):
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", backend)
        twin = copy.deepcopy(model)
        spikes = twin(x)
        (spikes * torch.linspace(0, 1, 5)).sum().backward()
        found.append((spikes.detach(), [parameter.grad for parameter in twin.parameters()]))
    assert spikes.dtype == torch.float64 and 0.01 < spikes.mean() < 0.99
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_spikes_have_the_precision_of_the_membrane(dtype, x):
    block = SpikingMLP(8, neuron=SNNTORCH["Synaptic"]).to(dtype).eval()
    nn.init.constant_(block.fc1.norm.bias, 1.4)
    spikes = block.neuron1(3 * x.to(dtype))
    assert spikes.dtype == dtype and spikes.any() and block(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["neuron", "q_neuron", "mixer.neuron"])
def test_a_neuron_put_in_place_later_is_refused(name, x):
    block = SpikeDrivenSelfAttention(8)
    block.set_submodule(name, snntorch.Leaky(beta=0.9))
    with pytest.raises(TypeError, match=r"over_time\(Leaky"):
        block(x)
    block.set_submodule(name, over_time(snntorch.Leaky(beta=0.9)))
    assert block(x).shape == x.shape


def test_a_head_put_in_place_later_is_refused():
    model = SpikeDrivenTransformer(depth=1, dim=16, pooling="0011", num_classes=3)
    model.head_neuron = Node()
    with pytest.raises(TypeError, match="over_time"):
        model(torch.rand(1, 3, 8, 8))


def test_what_is_no_stepping_neuron():
    neuron = LIF()
    assert over_time(neuron) is neuron
    wrapped = over_time(Node())
    assert over_time(wrapped) is wrapped
    for other, message in ((Node, "no wrapping"), (nn.ReLU(), "how to clear the memory of ReLU")):
        with pytest.raises(TypeError, match=message):
            over_time(other)
    with pytest.raises(TypeError, match=r"must make a torch\.nn\.Module, got int"):
        SpikingMLP(8, neuron=lambda threshold: 3)


def test_an_output_that_is_no_tensor():
    class Odd(nn.Module):
        def forward(self, x):
            return {"spikes": x}

    with pytest.raises(TypeError, match="Odd gave dict"):
        fire(Odd(), torch.ones(2, 3))
    with pytest.raises(ValueError, match="time step"):
        over_time(Node())(torch.ones(0, 3))


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.7, "spike_grad": surrogate.fast_sigmoid()},
        {"spike_grad": surrogate.sigmoid(), "learn_beta": True, "init_hidden": True},
        {"spike_grad": surrogate.triangular(), "learn_threshold": True, "output": True},
        {"reset_delay": False},
        {"graded_spikes_factor": 2.0},
        {"spike_grad": lambda x: (x > 0.1).float()},
    ],
)
def test_evaluation_gives_the_same_spikes(reset, options):
    torch.manual_seed(0)
    neuron = over_time(snntorch.Leaky(beta=0.8, reset_mechanism=reset, **options))
    x = 1.5 * torch.randn(6, 3, 5, 4, 4)
    for sequence in (x, x.movedim(-1, 2), x[:1].expand_as(x), x[..., 0, 0], x.double()):
        expected = neuron(sequence)
        found = neuron.evaluate(sequence)
        assert torch.equal(found, expected) and 0.02 < (found != 0).float().mean() < 0.98
        assert not found.requires_grad


def test_a_neuron_that_is_watched_is_computed_by_its_own_forward():
    torch.manual_seed(0)
    network, seen = nn.Sequential(over_time(snntorch.Leaky(beta=0.8)), nn.Flatten()), []
    network[0].neuron.register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.warns(UserWarning, match="it has hooks, or a call"):
        fast = optimize_for_inference(network)
    x = 2 * torch.randn(4, 3, 5)
    assert torch.equal(fast(x), network(x)) and len(seen) == 2 * len(x)
