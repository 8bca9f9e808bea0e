"""Layers on spikes of a byte: Triton's kernel, in its interpreter without a GPU, against integers in 64 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdt_blocks.ops import bytes as ops
from sdt_blocks.ops import dense
from sdt_blocks.ops.bytes import spike_layer
from sdt_blocks.ops.dense import Neuron
from sdt_blocks.ops.integers import Windows
from sdt_blocks.ops.levels import levels_reference
from sdt_blocks.ops.lif import lif_reference
from sdt_blocks.ops.spec import ByteLayer, LevelSpec, NeuronSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", request.param)
    return request.param


def whole(*shape: int, most: int = 1) -> Tensor:
    return torch.randint(0, most + 1, shape, dtype=torch.int8, device=DEVICE)


def weights(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)


def powers(channels: int) -> Tensor:
    """Scales with which nothing is rounded: a product and a sum are exact, in one operation or two."""
    return 2.0 ** torch.randint(-9, -6, (channels,), device=DEVICE)


def shifts(channels: int) -> Tensor:
    return torch.randint(-256, 512, (channels,), device=DEVICE) / 512


def sums_of(x: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """In 64 bits, one window and one tap after the other."""
    (sy, sx), (py, px), (dy, dx) = windows
    _, height, width, _ = weight.shape
    rows, columns = windows.size(x.shape[2:4], weight.shape[1:3])
    padded = torch.nn.functional.pad(x.cpu().long(), (0, 0, px, px, py, py))
    total = torch.zeros(*x.shape[:2], rows, columns, len(weight), dtype=torch.int64)
    for i in range(height):
        for j in range(width):
            part = padded[:, :, i * dy :: sy, j * dx :: sx][:, :, :rows, :columns]
            total += part @ weight[:, i, j].cpu().long().T
    return total.to(x.device)


def spikes_of(u: Tensor, of: Neuron) -> Tensor:
    spec = NeuronSpec(of.threshold, of.reset, strict=of.strict, inv_tau=of.inv_tau.expand(u.shape[1:]))
    return lif_reference(u, spec)[0]


def check(x: Tensor, weight: Tensor, windows: Windows, neuron: Neuron, shortcut: bool) -> None:
    """Sums to the bit; membranes and spikes of them, alone and together, as from the exact sums."""
    out = len(weight)
    scale, shift = powers(out), shifts(out)
    layer = ByteLayer(weight, scale, shift, windows)
    sums = sums_of(x, weight, windows)
    ones = torch.ones(out, device=DEVICE)
    found, none = spike_layer(x, ByteLayer(weight, ones, ones * 0, windows), membrane=torch.float32)
    assert none is None and torch.equal(found.long(), sums), "sums"
    u = sums * scale + shift
    residual = torch.randint(-64, 64, u.shape, device=DEVICE) / 64 if shortcut else None
    u = u if residual is None else residual + u
    expected = spikes_of(u, neuron)
    for membrane in (None, torch.float32, torch.bfloat16):
        kept, spikes = spike_layer(x, layer, residual=residual, membrane=membrane, neuron=neuron)
        assert (kept is None) == (membrane is None) and spikes.dtype == torch.int8
        if kept is not None:
            # Triton's interpreter cuts bits off, where a GPU rounds.
            torch.testing.assert_close(kept.float(), u, rtol=0 if membrane == torch.float32 else 2**-7, atol=0)
        assert torch.equal(spikes.float(), expected)
    assert expected.any() or expected.numel() < 50


PLAIN = Windows()
CASES = {
    "linear": ((4, 2, 5, 7, 48), (72, 1, 1), PLAIN, {}),
    "odd channels": ((2, 1, 3, 3, 17), (13, 1, 1), PLAIN, {"channels": 13, "reset": "subtract"}),
    "wide": ((1, 1, 9, 8, 130), (144, 1, 1), PLAIN, {"reset": "none", "strict": True, "threshold": 0.7}),
    "3x3": ((4, 1, 6, 5, 40), (24, 3, 3), Windows(padding=(1, 1)), {"channels": 24}),
    "stride": ((2, 2, 7, 8, 16), (32, 3, 3), Windows((2, 2), (1, 1)), {"reset": "subtract", "strict": True}),
    "uneven": ((3, 1, 9, 8, 24), (8, 5, 2), Windows((3, 1), (2, 0), (1, 3)), {}),
    "many steps": ((8, 1, 2, 3, 16), (16, 1, 1), PLAIN, {"channels": 16}),
}


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_layer(backend: str, case: str, shortcut: bool) -> None:
    shape, (out, *kernel), windows, options = CASES[case]
    check(whole(*shape), weights(out, *kernel, shape[-1]), windows, neuron(**options), shortcut)


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("spec", [LevelSpec(), LevelSpec(5, 3.0, "up", 0.7), LevelSpec(127, 1.0, "even", 0.01)])
def test_levels(backend: str, spec: LevelSpec, shortcut: bool) -> None:
    x, weight = whole(2, 2, 5, 7, 48, most=4), weights(72, 1, 1, 48)
    scale, shift = powers(72), shifts(72)
    u = sums_of(x, weight, PLAIN) * scale + shift
    residual = torch.randint(-64, 64, u.shape, device=DEVICE) / 64 if shortcut else None
    if residual is not None:
        residual[0, 0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        u = residual + u
    expected = levels_reference(u, spec._replace(norm=1.0)).nan_to_num(0.0)
    for membrane in (None, torch.float32):
        layer = ByteLayer(weight, scale, shift)
        kept, levels = spike_layer(x, layer, residual=residual, membrane=membrane, neuron=spec)
        assert levels.dtype == torch.int8 and torch.equal(levels.float(), expected)
        assert (kept is None) == (membrane is None) and (kept is None or torch.equal(kept.nan_to_num(), u.nan_to_num()))
    assert expected.unique().numel() > 4 and expected.max() == spec.levels


def neuron(channels: int | None = None, threshold: float = 1.0, reset: str = "zero", strict: bool = False) -> Neuron:
    # Eighths keep the membranes exact for a few steps: a fused rounding and two are then the same.
    inv_tau = torch.tensor(0.5) if channels is None else torch.randint(2, 7, (channels,)) / 8
    return Neuron(inv_tau.to(DEVICE), threshold, reset, strict)


@pytest.mark.cuda
@settings(max_examples=12, deadline=None)
@given(
    steps=st.integers(1, 5),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 3),
    most=st.sampled_from([1, 4, 127]),
)
def test_any_shape(steps, size, channels, kernel, stride, most) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDT_BLOCKS_BACKEND", "triton")
        into, out = channels
        windows = Windows((stride, stride), (kernel // 2, kernel // 2))
        x = whole(steps, 2, *(side + 1 for side in size), into, most=most)
        weight = weights(out, kernel, kernel, into)
        ones = torch.ones(out, device=DEVICE)
        found, _ = spike_layer(x, ByteLayer(weight, ones, ones * 0, windows), membrane=torch.float32)
        assert torch.equal(found.long(), sums_of(x, weight, windows))


@pytest.mark.cuda
def test_spikes_as_bytes_pass_through_what_stands_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and pooling of spikes that have fired: with neurons that give what they are given."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    as_it_is = dense.as_it_is(DEVICE)
    spikes, gate = whole(4, 2, 5, 6, 16), neuron(threshold=0.6)
    pooled = dense.fire_and_pool(spikes, as_it_is, torch.int8, compiled=True)
    assert pooled.dtype == torch.int8 and torch.equal(pooled.float(), dense.pool(spikes.float()))
    for heads in (None, 2):
        qkv = whole(2, 1, 5, 6, 48)
        found = dense.attend(qkv, [as_it_is] * 3 + [gate], torch.int8, heads=heads, compiled=True)
        expected = dense.attend(qkv.float(), [as_it_is] * 3 + [gate], torch.float32, heads=heads)
        assert torch.equal(found.float(), expected) and expected.any()


def test_what_is_refused() -> None:
    x, ones = whole(1, 1, 2, 2, 16), torch.ones(8, device=DEVICE)
    layer = ByteLayer(weights(8, 1, 1, 16), ones, ones)
    with pytest.raises(ValueError, match=r"expected int8 .* got torch.float32 \[1, 1, 2, 2, 16\]"):
        spike_layer(x.float(), layer)
    with pytest.raises(ValueError, match=r"needs 16 inputs and 8 scales and shifts, got 12, \[8\]"):
        spike_layer(x[..., :12], layer)
    with pytest.raises(ValueError, match=r"must be \[1, 1, 2, 2, 8\] as the result is, got \[1, 1, 2, 2, 4\]"):
        spike_layer(x, layer, residual=torch.zeros(1, 1, 2, 2, 4, device=DEVICE))
    with pytest.raises(ValueError, match="start at rest"):
        spike_layer(x, layer, neuron=neuron()._replace(before=ones))
    with pytest.raises(ValueError, match="a byte holds levels up to 127, the neurons have 128"):
        spike_layer(x, layer, neuron=LevelSpec(levels=128))
    assert torch.iinfo(torch.int8).max == ops.LARGEST
