"""Attention on packed spikes against its equations on unpacked ones, to the bit."""

from __future__ import annotations

import pytest
import torch
from convolutions import draw
from torch import Tensor

from sdt_blocks.ops.packed import PackedSpikes
from sdt_blocks.ops.packed_attention import (
    spike_attention,
    spike_attention_reference,
    spike_linear_attention,
    spike_linear_attention_reference,
    spike_token_attention,
    spike_token_attention_reference,
)
from sdt_blocks.ops.spec import NeuronSpec

NEURONS = [NeuronSpec(threshold=0.5), NeuronSpec(threshold=3.0, reset="subtract", strict=True)]
SIZES = [(1, (1, 1)), (4, (14, 14)), (3, (5, 60))]


def parts(
    count: int, steps: int, channels: int, size: tuple[int, int] = (4, 4), density: float = 0.3
) -> list[PackedSpikes]:
    """q, k and v, as parts of one tensor of words."""
    filled = -(-channels // 64) * 64
    spikes = draw(steps, 2, count * filled, *size, density=density).unflatten(2, (count, filled))
    spikes[:, :, :, channels:] = 0
    return PackedSpikes.pack(spikes.flatten(2, 3)).split([channels] * count)


def leaks(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(3)) * 0.8 + 0.1


@pytest.mark.parametrize("channels", [64, 100])
@pytest.mark.parametrize("steps,size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("neuron", NEURONS)
def test_spike_driven(steps, size, density, neuron, channels):
    qkv = parts(3, steps, channels, size, density)
    for leak in (None, leaks(channels)):
        found, expected = spike_attention(*qkv, neuron, leak), spike_attention_reference(*qkv, neuron, leak)
        assert torch.equal(found.words, expected.words) and found.channels == channels
    if density == 0.4 and size == (14, 14):
        assert 0 < found.count() <= qkv[0].count()


@pytest.mark.parametrize("channels,heads", [(64, 1), (96, 6), (120, 8), (192, 2), (70, 70)])
@pytest.mark.parametrize("steps,size", SIZES)
@pytest.mark.parametrize("neuron", NEURONS)
def test_of_tokens(steps, size, neuron, channels, heads):
    q, k = parts(2, steps, channels, size)
    for leak in (None, leaks(heads)):
        found = spike_token_attention(q, k, heads, neuron, leak)
        assert torch.equal(found.words, spike_token_attention_reference(q, k, heads, neuron, leak).words)
    if size == (14, 14) and channels // heads >= 15:
        assert 0 < found.count() <= k.count()


@pytest.mark.parametrize("channels,values,heads", [(64, 64, 1), (96, 96, 8), (48, 192, 3), (70, 130, 10)])
@pytest.mark.parametrize("planes", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (7, 9)])
def test_linear(channels, values, heads, planes, size, instructions):
    def levels(count: int, norm: float, seed: int) -> PackedSpikes:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(-planes, planes + 1, (2, 3, *size, count), generator=generator).clamp(min=0).float()
        return PackedSpikes.of_levels(drawn, planes, norm)

    q, k, v = levels(channels, 1.0, 0), levels(channels, 2.0, 1), levels(values, 4.0, 2)
    found = spike_linear_attention(q, k, v, heads, 0.125)
    expected = spike_linear_attention_reference(q, k, v, heads, 0.125)
    assert torch.equal(found, expected) and found.unique().numel() > planes


def test_a_cut_sequence_goes_on_from_where_the_neurons_stood():
    qkv, neuron = parts(3, 5, 128), NeuronSpec(threshold=0.9, reset="subtract")
    calls = {
        "spike-driven": (lambda cut, old: spike_attention(*cut, neuron, leaks(128), old), (2, 128)),
        "of tokens": (
            lambda cut, standing: spike_token_attention(*cut[:2], 4, neuron, leaks(4), standing),
            (2, 4, 4, 4),
        ),
    }
    for name, (call, shape) in calls.items():
        whole, standing, found = call(qkv, None), torch.zeros(shape), []
        for at in (slice(0, 1), slice(1, 4), slice(4, 5)):
            found.append(call([part.of(part.words[at]) for part in qkv], standing).words)
        assert torch.equal(torch.cat(found), whole.words) and 0.05 < whole.rate() < 0.95, name
        assert not torch.equal(call([part.of(part.words[4:]) for part in qkv], None).words, whole.words[4:]), name


def test_bad_input_is_named():
    q, k = parts(2, 2, 96)
    (other,), (longer,) = parts(1, 2, 64), parts(1, 3, 96)
    levels = PackedSpikes.pack_levels(torch.ones(2, 2, 2, 96, 4, 4), 1.0)
    with pytest.raises(ValueError, match=r"q, k, v must have .* q has \[2, 2, 4, 4\] and 96, v \[2, 2, 4, 4\] and 64"):
        spike_attention(q, k, other, NeuronSpec())
    with pytest.raises(ValueError, match=r"k \[3, 2, 4, 4\] and 96"):
        spike_token_attention(q, longer, 4, NeuronSpec())
    with pytest.raises(ValueError, match="in 7 equal heads"):
        spike_token_attention(q, k, 7, NeuronSpec())
    with pytest.raises(ValueError, match="k must be spikes, got 2 planes with norm 1"):
        spike_attention(q, levels, k, NeuronSpec())
    with pytest.raises(ValueError, match="standing must be float32"):
        spike_attention(q, k, k, NeuronSpec(), standing=torch.zeros(2, 96))
    with pytest.raises(ValueError, match=r"v must have frames .* a multiple of 3 channels, got .* and 64"):
        spike_linear_attention(q, k, other, 3, 1.0)
