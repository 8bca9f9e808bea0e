"""What torch.compile builds anew: nothing for another batch or image once sizes have changed, or for a learnt tau."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sdt_blocks import LIF, ParametricLIF, SpikingMLP
from sdt_blocks.surrogate import Surrogate


@pytest.fixture
def compiled(monkeypatch):
    """An MLP that is compiled, and the counter of its graphs."""
    monkeypatch.delenv("SDT_BLOCKS_BACKEND", raising=False)
    torch._dynamo.reset()
    torch.manual_seed(0)

    def make(neuron=LIF):
        block, counter = SpikingMLP(8, hidden=12, neuron=neuron), CompileCounterWithBackend("aot_eager")
        return block, torch.compile(block, backend=counter, fullgraph=True), counter

    return make


def stepped(run, x, block):
    block.zero_grad()
    run(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in block.parameters()]


def assert_as_eager(block, run, x):
    before = copy.deepcopy(block.state_dict())
    found = stepped(run, x, block)
    block.load_state_dict(before)
    expected = stepped(block, x, block)
    assert sum(gradient.abs().sum() for gradient in expected) > 0.1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_batches_and_images_of_other_sizes(compiled):
    """The second size makes sizes symbols; no other builds anew, nor a last batch of fewer images."""
    block, run, counter = compiled()
    graphs = []
    for batch, side in ((6, 4), (5, 6), (6, 4), (3, 8), (2, 6), (6, 10)):
        assert_as_eager(block, run, torch.rand(2, batch, 8, side, side) * 4)
        graphs.append(counter.frame_count)
    assert graphs[2:] == [graphs[1]] * 4 and graphs[1] <= 2


def test_a_learnt_time_constant(compiled):
    block, run, counter = compiled(ParametricLIF)
    for step in range(3):
        with torch.no_grad():
            block.neuron1.w.add_(0.3 * step)
        assert_as_eager(block, run, torch.rand(2, 3, 8, 4, 4) * 4)
    assert counter.frame_count == 1


def test_a_scheduled_sharpness_is_followed(compiled):
    """A number of a neuron is a constant of the graph: a new one is compiled anew, and has its own gradients."""
    block, run, counter = compiled()
    x, gradients = torch.rand(2, 3, 8, 4, 4) * 4, []
    for alpha in (4.0, 2.0, 3.0):
        block.neuron1.surrogate = block.neuron2.surrogate = Surrogate("sigmoid", alpha)
        assert_as_eager(block, run, x)
        gradients.append(block.fc1.conv.weight.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1]) and 1 < counter.frame_count <= 4
