"""What torch.compile builds anew: nothing for another batch or image once sizes have changed, or for a learned tau.

And what it makes of a training step: the same as eager code.
"""

import copy
import itertools

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


def test_a_learned_time_constant(compiled):
    block, run, counter = compiled(ParametricLIF)
    for step in range(3):
        with torch.no_grad():
            block.neuron1.w.add_(0.3 * step)
        assert_as_eager(block, run, torch.rand(2, 3, 8, 4, 4) * 4)
    assert counter.frame_count == 1


SCHEDULES = {
    "alpha": ("alpha",),
    "tau": ("tau",),
    "both": ("alpha", "tau"),
    "alpha of a learned tau": ("alpha", "learned"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changed", SCHEDULES.values(), ids=SCHEDULES)
def test_scheduled_numbers_build_nothing_anew(compiled, changed, training):
    """Constants of the graph until the first change, and its inputs from then on."""
    block, run, counter = compiled(ParametricLIF if "learned" in changed else LIF)
    block.train(training)
    x, gradients, graphs = torch.rand(2, 3, 8, 4, 4) * 4, [], []
    for alpha, tau in (None, None), (2.0, 1.7), (3.0, 1.5), (2.5, 1.2), (1.5, 1.1):
        for neuron in (block.neuron1, block.neuron2):
            if alpha and "alpha" in changed:
                neuron.surrogate = Surrogate("sigmoid", alpha)
            if tau and "tau" in changed:
                neuron.tau = tau
        assert_as_eager(block, run, x)
        gradients.append(block.fc1.conv.weight.grad.clone())
        graphs.append(counter.frame_count)
    assert not any(torch.allclose(one, next) for one, next in itertools.pairwise(gradients))
    assert graphs == [1, 2, 2, 2, 2]


def assert_compiled_step_as_eager(small):
    """In float64, where rounding makes no spike flip: logits, gradients and running statistics."""
    torch._dynamo.reset()
    model, images = small.model.double().train(), small.images.double()
    found = []
    for trained, run in ((model, model), (other := copy.deepcopy(model), torch.compile(other, backend="aot_eager"))):
        logits = run(images)
        logits.square().sum().backward()
        found.append([logits, *(parameter.grad for parameter in trained.parameters()), *trained.buffers()])
    largest = max(values.abs().max() for values in found[0][1:] if values.is_floating_point() and values.numel())
    assert largest > 0.1
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-7, atol=1e-7 * largest.item())


def test_a_training_step_of_every_family(monkeypatch, small):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    assert_compiled_step_as_eager(small)


def test_a_training_step_without_kernels(monkeypatch, make_small):
    """The family whose first norm, of a still image, no neuron follows."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "reference")
    assert_compiled_step_as_eager(make_small("sdt_v2_15m"))
