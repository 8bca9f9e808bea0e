"""Spikes kept at one bit each, and what a layer keeps in all."""

import pytest
import torch
from torch import nn

from sdt_blocks import LIF
from sdt_blocks.functional import convolve_spikes, normalize_and_fire
from sdt_blocks.ops.bits import SpikesAsBits
from sdt_blocks.ops.dispatch import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 511, 512, 513, 70001])
def test_round_trip(backend, device, size, dtype):
    torch.manual_seed(0)
    spikes = (torch.rand(size, device=device) < 0.3).to(dtype)
    bits = kernels(spikes).pack_bits(spikes)
    assert bits.numel() == (size + 7) // 8
    back = torch.full_like(spikes, 5)
    kernels(spikes).unpack_bits(bits, back)
    assert torch.equal(back, spikes)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_graded_spikes_are_kept_whole(monkeypatch, value):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    spikes = torch.zeros(3000)
    spikes[-1] = value
    assert kernels(spikes).pack_bits(spikes) is None
    weight = torch.ones(3000, requires_grad=True)
    with SpikesAsBits(spikes):
        y = spikes * weight
    torch.testing.assert_close(torch.autograd.grad(y.sum(), weight)[0], spikes, equal_nan=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_gradients(monkeypatch, kernel, autocast):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    conv, neuron = nn.Conv2d(6, 9, kernel, padding=kernel // 2), LIF()
    spikes = (torch.rand(2, 3, 6, 5, 5) < 0.3).float().requires_grad_()
    gradients = []
    for call in (
        lambda: convolve_spikes(conv, neuron, spikes),
        lambda: conv(spikes.flatten(0, 1)).unflatten(0, (2, 3)),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call()
        gradients.append(torch.autograd.grad(y.square().sum(), [spikes, *conv.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_change_in_place_is_noticed(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    conv = nn.Conv2d(2, 2, 1)
    y = convolve_spikes(conv, LIF(), torch.ones(1, 1, 2, 3, 3, requires_grad=True))
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5.0), (torch.bfloat16, 2.2)])
def test_memory_of_a_layer(monkeypatch, dtype, most):
    """Convolution, norm and neuron together keep the norm's input and one bit for each spike they are fed."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    conv, norm, neuron = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), LIF()
    spikes = (torch.rand(4, 2, 32, 16, 16) < 0.2).to(dtype).requires_grad_()
    conv.to(dtype)

    def layer():
        return normalize_and_fire(norm, neuron, convolve_spikes(conv, neuron, spikes))

    packed = []
    original = SpikesAsBits._pack
    monkeypatch.setattr(SpikesAsBits, "_pack", lambda self, t: packed.append(original(self, t)) or packed[-1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = layer()
    tensors = [part for part in (*kept, *(getattr(p, "bits", None) for p in packed)) if part is not None]
    total = sum(t.numel() * t.element_size() for t in tensors if not isinstance(t, nn.Parameter))
    assert any(hasattr(p, "bits") for p in packed)
    assert 0 < total / result.numel() <= most
