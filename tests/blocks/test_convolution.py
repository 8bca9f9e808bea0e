"""Downsampling, separable convolution, convolution block and linear attention, each alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdt_blocks import LIF, ParametricLIF, calibrate_norms
from sdt_blocks.blocks import (
    ConvolutionBlock,
    Downsampling,
    LinearSpikeAttention,
    LinearSpikeMixer,
    SeparableConvolution,
    SpikingSelfAttention,
)

BLOCKS = {
    "downsampling": lambda **options: Downsampling(8, 8, **options),
    "separable": lambda **options: SeparableConvolution(8, **options),
    "block": lambda **options: ConvolutionBlock(8, **options),
    "attention": lambda **options: LinearSpikeAttention(8, num_heads=1, **options),
}


def calibrated(block, *shape):
    """The block in eval mode, its norms fitted to membranes `shape` so that its neurons fire, and these membranes."""
    torch.manual_seed(0)
    membrane = torch.randn(*shape) * 2
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 2.0, 0.3)
    calibrate_norms(block, membrane)
    return block.eval(), membrane


def normalized(norm, x):
    """The batch normalization in eval mode, written out, of every frame."""
    mean, variance, weight, bias = (
        part.view(-1, 1, 1) for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


def convolved(conv, x, **options):
    """The convolution of every frame, with the options of the equation instead of the layer's."""
    return torch.stack([F.conv2d(frame, conv.weight, conv.bias, **options) for frame in x])


def fires(spikes):
    return 0.05 < spikes.mean() < 0.95


@torch.no_grad()
def test_the_equations_of_the_convolution_block():
    block, membrane = calibrated(ConvolutionBlock(6), 3, 2, 6, 5, 7)
    first = block.separable.branch
    wide = LIF()(normalized(first.expand.norm, convolved(first.expand.conv, LIF()(membrane))))
    assert fires(wide) and wide.shape[2] == 12
    depthwise, pointwise = first.separable.conv
    change = convolved(pointwise, convolved(depthwise, wide, padding=3, groups=12))
    u = membrane + normalized(first.separable.norm, change)
    wide = LIF()(normalized(block.conv1.norm, convolved(block.conv1.conv, LIF()(u), padding=1)))
    assert fires(wide) and wide.shape[2] == 24
    u = u + normalized(block.conv2.norm, convolved(block.conv2.conv, wide, padding=1))
    torch.testing.assert_close(block(membrane), u, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False])
def test_the_equation_of_the_downsampling(first):
    make = Downsampling(3, 8, kernel_size=7, neuron=None) if first else Downsampling(3, 8)
    block, membrane = calibrated(make, 3, 2, 3, 9, 7)
    x, padding = (membrane, 3) if first else (LIF()(membrane), 1)
    expected = normalized(block.conv.norm, convolved(block.conv.conv, x, stride=2, padding=padding))
    assert expected.shape == (3, 2, 8, 5, 4) and block.conv.conv.bias.any()
    torch.testing.assert_close(block(membrane), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    time_steps=st.integers(1, 4),
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 5]),
    width=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_the_linear_mixer_counts_coincidences(time_steps, batch, heads, width, size):
    """`sum over tokens n and channels d of q[m, d] k[n, d] v[n, e]`, in whole numbers, head by head."""
    q, k, v = torch.randint(0, 2, (3, time_steps, batch, heads * width, *size))

    def by_head(x):
        return x.view(time_steps, batch, heads, width, -1)

    counts = torch.einsum("tbhdm,tbhdn,tbhen->tbhem", *map(by_head, (q, k, v))).reshape(q.shape)
    got = LinearSpikeMixer(heads * width, num_heads=heads)(q.float(), k.float(), v.float())
    assert torch.equal(got, counts.double().div(8).float())
    got = LinearSpikeMixer(heads * width, num_heads=heads, scale=0.3)(q.double(), k.double(), v.double())
    torch.testing.assert_close(got, counts * torch.tensor(0.3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_of_many_tokens_are_whole_under_mixed_precision(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.rand(3, 1, 2, 8, 60, 60) < 0.7).float()
    mixer = LinearSpikeMixer(8, num_heads=1)
    expected = mixer(q.double(), k.double(), v.double())
    assert expected.max() > 2048 / 8, "more than half precision holds exactly"
    with torch.autocast("cpu", dtype):
        assert torch.equal(mixer(q, k, v).double(), expected)
    low = mixer(q.to(dtype), k.to(dtype), v.to(dtype))
    assert low.dtype == dtype and torch.equal(low, expected.to(dtype))


def test_gradients_of_the_mixer():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 6, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(LinearSpikeMixer(6, num_heads=2), (q, k, v))


@torch.no_grad()
def test_the_equation_of_the_linear_attention():
    block, membrane = calibrated(LinearSpikeAttention(16, num_heads=4), 4, 2, 16, 3, 5)
    spikes = LIF()(membrane)

    def unit(u, x):
        return torch.stack([normalized(u.norm, u.conv(frame)) for frame in x])

    q, k, v = (LIF()(unit(u, spikes)) for u in (block.q, block.k, block.v))
    a = LIF(threshold=0.5)(block.mixer(q, k, v))
    assert all(map(fires, (q, k, v, a)))
    torch.testing.assert_close(block(membrane), unit(block.proj, a), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [LinearSpikeAttention, SpikingSelfAttention])
def test_the_mixer_has_the_scale_and_heads_of_its_attention(attention):
    mixer = attention(8, num_heads=2, scale=0.3).mixer
    assert (mixer.scale, mixer.num_heads) == (0.3, 2)


def test_a_tie_fires():
    """Eight coincidences make 8 / 8, which the neuron halves to its threshold; seven stay below."""
    spikes = torch.ones(3, 1, 1, 8, 2, 4)
    block = LinearSpikeAttention(8)
    assert block.mixer(*spikes).eq(1).all() and block.mixer_neuron(block.mixer(*spikes)).all()
    spikes[1, ..., 0, 0] = 0
    assert block.mixer(*spikes).eq(7 / 8).all() and not block.mixer_neuron(block.mixer(*spikes)).any()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("neuron", ["lif", "plif", {"name": "plif", "channels": True}, ParametricLIF])
@pytest.mark.parametrize("shape", [(1, 2, 8, 3, 5), (4, 1, 8, 2, 3), (8, 2, 8, 1, 4)])
def test_every_parameter_learns_at_any_size(name, neuron, shape):
    block, u = calibrated(BLOCKS[name](neuron=neuron), *shape)
    u.requires_grad_()
    y = block.train()(u)
    size = tuple(-(-side // 2) for side in shape[3:]) if name == "downsampling" else shape[3:]
    assert y.shape == (*shape[:3], *size)
    (y * torch.randn_like(y)).sum().backward()
    for what, gradient in {"u": u.grad, **{n: p.grad for n, p in block.named_parameters()}}.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), what


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 1, 7, 4, 4), (0, 1, 8, 4, 4), (2, 1, 8, 0, 4)])
def test_what_does_not_fit_is_refused_at_the_door(name, shape):
    with pytest.raises(ValueError, match=r"expects \[T, B, 8, H, W\] with T >= 1 and nothing empty, got \[\d"):
        BLOCKS[name]()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Downsampling(0, 8), "in_channels must be positive, got 0"),
        (lambda: Downsampling(3, 8, kernel_size=4), "kernel_size must be odd and positive, got 4"),
        (lambda: Downsampling(3, 8, stride=0), "stride must be positive, got 0"),
        (lambda: SeparableConvolution(8, hidden=-1), "hidden must be positive, got -1"),
        (lambda: ConvolutionBlock(0), "dim must be positive, got 0"),
        (
            lambda: LinearSpikeAttention(10),
            r"dim \(for this number of heads\) must be a positive multiple of 8, got 10",
        ),
        (lambda: LinearSpikeMixer(8, num_heads=0), "num_heads must be positive, got 0"),
        (lambda: LinearSpikeMixer(8, scale=0.0), "scale must be positive and finite, got 0.0"),
        (lambda: LinearSpikeMixer(8, scale=float("inf")), "scale must be positive and finite, got inf"),
        (lambda: LinearSpikeMixer(8, scale="1"), "scale must be a number, got '1'"),
    ],
)
def test_what_no_block_can_be_built_with_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
