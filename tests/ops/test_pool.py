"""The fused max pooling against PyTorch's, ties and NaN included."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdt_blocks import SpikingPatchSplitting
from sdt_blocks.ops import max_pool, max_pool_reference
from sdt_blocks.ops import pool as pool_op
from sdt_blocks.ops.bits import are_spikes, as_spikes, bits_of
from sdt_blocks.ops.dispatch import kernels
from sdt_blocks.steps import pool as pool_frames

SHAPES = [(2, 3, 7, 9), (1, 70, 6, 4), (2, 1, 1, 1), (1, 5, 2, 1), (1, 2, 1, 2), (2, 300, 3, 3), (1, 1, 3, 1030)]


def run(op, x, grad):
    x = x.detach().requires_grad_()
    out = op(x)
    return out, torch.autograd.grad(out, x, grad.to(out))[0]


TAKEN = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}


def worst(x, seed=0):
    """The largest error of the gradient, relative above 1; infinite where a maximum differs."""
    size = ((x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    grad = torch.randn(*x.shape[:2], *size, generator=torch.Generator().manual_seed(seed))
    (ours, of_ours), (theirs, of_theirs) = run(max_pool, x, grad), run(max_pool_reference, x, grad)
    if ours.dtype != theirs.dtype or not torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True):
        return float("inf")
    return ((of_ours - of_theirs).abs().double() / (1 + of_theirs.abs().double())).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spikes_and_reals(backend, device, shape, memory_format, dtype):
    torch.manual_seed(0)
    for x in ((torch.rand(shape) < 0.3).to(dtype), torch.randn(shape).to(dtype)):
        assert worst(x.to(device).contiguous(memory_format=memory_format)) <= TAKEN[dtype]


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, n) for n in (2, 5, 11, 11)]), st.integers(0, 2**31), st.booleans())
def test_any_size(shape, seed, channels_last):
    torch.manual_seed(seed)
    x = torch.randint(-1, 2, shape).double()
    assert worst(x.contiguous(memory_format=torch.channels_last) if channels_last else x, seed) <= TAKEN[x.dtype]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_and_infinity(backend, device, memory_format):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 9, 9).double()
    x[torch.rand_like(x) < 0.1] = torch.nan
    x[:, 1] = -torch.inf
    assert worst(x.to(device).contiguous(memory_format=memory_format)) <= TAKEN[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_signs_of_nan_and_zero(backend, device, memory_format, dtype):
    """NaN of either sign is above infinity; of zeros of either sign, and of infinities, the first has the gradient."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 12).to(dtype)
    x[:, 0] = torch.where(torch.rand(9, 12) < 0.5, -0.0, 0.0)
    x[:, 1] = -torch.inf
    x[:, 2:4] = x[:, 2:4].masked_fill(torch.rand(2, 9, 12) < 0.5, torch.inf)
    # One in a window: which of several has the gradient is not said.
    x[:, 3::2, ::4, ::4] = torch.nan
    bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[:, 5, ::4, ::4] |= torch.iinfo(bits.dtype).min
    assert x[0, 3::2, 0, 0].isnan().all() and torch.signbit(x[0, 3::2, 0, 0]).tolist() == [False, True, False]
    assert worst(x.to(device).contiguous(memory_format=memory_format)) <= TAKEN[x.dtype]


def test_a_view_with_gaps(backend, device):
    torch.manual_seed(0)
    assert worst(torch.randn(2, 4, 9, 9, 2, device=device)[..., 0]) <= TAKEN[torch.float32]


def test_opcheck(backend, device):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 5, 6, device=device).contiguous(memory_format=memory_format).requires_grad_()
        torch.library.opcheck(pool_op.max_pool_op.op, (x, True))
        torch.library.opcheck(pool_op.max_pool_op.op, (x.detach(), False))
        spikes = (torch.rand(2, 8, 5, 16, device=device) < 0.2).float().contiguous(memory_format=memory_format)
        torch.library.opcheck(pool_op.max_pool_op.op, (spikes.requires_grad_(), True, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "width", "memory_format", "written"),
    [
        (3, 16, torch.contiguous_format, True),
        (3, 14, torch.contiguous_format, False),
        (16, 3, torch.channels_last, True),
        (8, 9, torch.channels_last, True),
        (12, 16, torch.channels_last, False),
    ],
)
def test_bits_of_pooled_spikes(backend, device, monkeypatch, channels, width, memory_format, written, dtype):
    """They lie in the order of the frames, and need not be packed again."""
    torch.manual_seed(0)
    x = (torch.rand(4, channels, 9, width, device=device) < 0.1).to(dtype).contiguous(memory_format=memory_format)
    monkeypatch.setattr(kernels(x), "writes_bits", True)
    spikes = as_spikes(x.requires_grad_().unflatten(0, (2, 2)))
    pooled = pool_frames(nn.MaxPool2d(3, 2, 1), spikes)
    assert 0.2 < pooled.float().mean() < 0.9 and are_spikes(pooled)
    bits = bits_of(pooled)
    assert (bits is not None) == written
    if bits is not None:
        assert torch.equal(bits, kernels(x).pack_bits(pooled.detach()))


def test_kept_for_the_gradient(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    x, kept = torch.randn(2, 8, 32, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        max_pool(x)
    assert sum(t.untyped_storage().nbytes() for t in kept) == x.numel() // 4


def test_compiles_whole(monkeypatch):
    """The gradient is the op's in a compiled graph too; without one the equations are traced."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    compiled = torch.compile(max_pool, fullgraph=True, backend="aot_eager")
    x = (torch.rand(2, 3, 7, 7) < 0.3).double().requires_grad_()
    grad = torch.randn(2, 3, 4, 4).double()
    (ours, of_ours), (theirs, of_theirs) = run(compiled, x, grad), run(max_pool_reference, x, grad)
    assert torch.equal(ours, theirs) and torch.equal(of_ours, of_theirs)
    with torch.no_grad():
        assert torch.equal(compiled(x), theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"ceil_mode": True}, {"padding": 0}, {"stride": 1}, {"kernel_size": 2, "padding": 1}, {"dilation": 2}],
)
def test_other_pools_are_left_alone(monkeypatch, options):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    pool = nn.MaxPool2d(**{"kernel_size": 3, "stride": 2, "padding": 1, **options})
    called = []
    original = pool_op.max_pool_op
    monkeypatch.setattr(pool_op, "max_pool_op", lambda *given: called.append(1) or original(*given))
    x = torch.randn(2, 1, 3, 8, 8)
    assert torch.equal(pool_frames(pool, x)[:, 0], pool(x[:, 0]))
    assert len(called) == (not options)
    seen = []
    pool.register_forward_hook(lambda *given: seen.append(1))
    pool_frames(pool, x)
    assert len(called) == (not options) and len(seen) == 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_the_patch_splitting(backend, device, monkeypatch, channels_last):
    torch.manual_seed(0)
    patch = SpikingPatchSplitting(16, pooling="1101").double().to(device)
    x = torch.randn(2, 2, 3, 16, 16, device=device).double()
    if channels_last:
        patch = patch.to(memory_format=torch.channels_last)
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 2))
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(pool_op, "max_pool_op", None)
            monkeypatch.setattr(pool_op, "fused", lambda *_, **__: False)
        patch.zero_grad()
        out = patch(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in patch.parameters() if p.grad is not None)])
    assert F.relu(results[0][0]).sum() > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
