"""A training step keeps one order of axes in memory, the one that its images and weights have, forward and backward."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdt_blocks import MembraneShortcut, SpikeDrivenSelfAttention, SpikingMLP
from sdt_blocks.blocks import ConvNorm, LinearSpikeMixer, MaskMixer
from sdt_blocks.ops.spec import channels_last
from sdt_blocks.steps import pool, project, shown

FORMATS = [torch.contiguous_format, torch.channels_last]


class Orders(TorchDispatchMode):
    """Whether the two inputs of each backward pass of a norm, convolution or pooling have one order in memory."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in ("native_batch_norm_backward", "convolution_backward", "max_pool_backward"):
            grad, x, *_ = args
            self.found.append((name, order(grad) == order(x)))
        return func(*args, **(kwargs or {}))


def order(x):
    """The axes from the outermost in memory to the innermost."""
    return sorted((axis for axis in range(x.ndim) if x.shape[axis] > 1), key=lambda axis: -x.stride(axis))


def orders_of_backward(model, x):
    outputs = model(x)
    with Orders() as seen:
        sum(output.square().mean() for output in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
    assert "convolution_backward" in {name for name, _ in seen.found}
    return seen.found


@pytest.mark.parametrize("memory_format", FORMATS)
def test_every_family(small, memory_format):
    model = small.model.to(memory_format=memory_format).train()
    found = orders_of_backward(model, small.images.contiguous(memory_format=memory_format))
    assert all(alike for _, alike in found), found


@pytest.mark.parametrize("memory_format", FORMATS)
def test_attention_that_pools_events(memory_format):
    torch.manual_seed(0)
    block = MembraneShortcut(SpikeDrivenSelfAttention(16, num_heads=2, event_pooling=True))
    model = nn.Sequential(block, MembraneShortcut(SpikingMLP(16))).to(memory_format=memory_format)
    frames = torch.randn(6, 16, 4, 4).contiguous(memory_format=memory_format).requires_grad_()
    found = orders_of_backward(lambda x: model(x.unflatten(0, (2, 3))).mean((-2, -1)), frames)
    assert all(alike for _, alike in found), found


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mixer", [LinearSpikeMixer(16, num_heads=2), MaskMixer(16, num_heads=2, event_pooling=True)])
def test_a_mixer_keeps_the_order(mixer, memory_format):
    torch.manual_seed(0)
    q, k, v = ((torch.rand(6, 16, 4, 4) < 0.5).float().contiguous(memory_format=memory_format) for _ in range(3))
    mixed = mixer(*(x.unflatten(0, (2, 3)) for x in (q, k, v)))
    assert mixed.any() and channels_last(mixed) == (memory_format is torch.channels_last)
    plain = mixer(*(x.contiguous().unflatten(0, (2, 3)) for x in (q, k, v)))
    assert torch.equal(mixed, plain)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_of_a_mixer_keep_the_order(memory_format):
    torch.manual_seed(0)
    q, k, v = (torch.rand(6, 16, 4, 4).contiguous(memory_format=memory_format).unflatten(0, (2, 3)) for _ in range(3))
    mixed = LinearSpikeMixer(16, num_heads=2)(q.requires_grad_(), k, v.requires_grad_())
    of_q, of_v = torch.autograd.grad(mixed.square().sum(), (q, v))  # that of k comes transposed
    assert order(of_q) == order(of_v) == order(q)


def test_a_frame_is_pooled_once():
    torch.manual_seed(0)
    unit, layer = ConvNorm(3, 8, 3), nn.MaxPool2d(3, 2, 1)
    frame = torch.rand(1, 2, 3, 8, 8)
    repeated = project(unit, frame.expand(4, -1, -1, -1, -1))
    pooled = pool(layer, repeated)
    assert pooled.shape == (4, 2, 8, 4, 4) and pooled.stride(0) == 0
    expected = layer(unit(frame[0])).expand_as(pooled)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn(pooled.shape)
    gradients = [torch.autograd.grad((x * weights).sum(), unit.conv.weight)[0] for x in (pooled, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_of_gradients_pass_an_ordered_gradient(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()

    def energy(x):
        return shown((x * 1)[None], 3).square().mean((-2, -1)).pow(2).sum()

    assert torch.autograd.gradgradcheck(energy, x)
