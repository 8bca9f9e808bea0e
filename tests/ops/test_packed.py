"""Event-driven ops against their dense equations, bit for bit where the order of the sums allows it."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from convolutions import SHAPES, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdt_blocks.ops.integers import IntegerWeight, RealWeight, pooled_product, real_product, spike_product_dense
from sdt_blocks.ops.levels import levels_reference
from sdt_blocks.ops.packed import (
    Epilogue,
    EventWeight,
    PackedSpikes,
    pad_to_words,
    real_pool,
    real_pool_reference,
    spike_neuron,
    spike_neuron_reference,
    spike_pool,
    spike_pool_reference,
    spike_product,
    spike_product_reference,
)
from sdt_blocks.ops.spec import LevelSpec, NeuronSpec


def draw_layer(out: int, into: int, kernel: int, neuron: NeuronSpec | LevelSpec | None) -> tuple[Tensor, Epilogue]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out, into, kernel, kernel, generator=generator) / (into * kernel**2) ** 0.5 * 3
    bias, scale, shift, inv_tau = torch.rand(4, out, generator=generator)
    epilogue = Epilogue(
        out, bias=bias - 0.3, scale=scale + 0.5, shift=shift, inv_tau=inv_tau * 0.8 + 0.1, neuron=neuron
    )
    return weight, epilogue


def ordered_sums(spikes: Tensor, weight: Tensor) -> Tensor:
    """float32 sums over taps, then channels, one addition after the other, for spikes `[T, B, C, H, W]`."""
    kernel = weight.shape[-1]
    frames = F.pad(spikes, [kernel // 2] * 4)
    height, width = spikes.shape[-2:]
    sums = torch.zeros(*spikes.shape[:2], height, width, len(weight))
    for dy, dx in itertools.product(range(kernel), repeat=2):
        window = frames[..., dy : dy + height, dx : dx + width]
        for channel in range(weight.shape[1]):
            active = window[:, :, channel].unsqueeze(-1).bool()
            sums = torch.where(active, sums + weight[:, channel, dy, dx], sums)
    return sums


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_product_is_the_ordered_sum_of_weight_rows_bit_for_bit(shape, density):
    steps, images, height, width, into, out, kernel = shape
    spikes = draw(steps, images, into, height, width, density=density)
    weight, _ = draw_layer(out, into, kernel, None)
    membrane, fired = spike_product(PackedSpikes.pack(spikes), EventWeight(weight), Epilogue(out), membrane=True)
    assert fired is None
    assert torch.equal(membrane, ordered_sums(spikes, weight))


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:6])
def test_product_with_its_epilogue_agrees_with_the_reference(shape, reset, strict):
    steps, images, height, width, into, out, kernel = shape
    neuron = NeuronSpec(threshold=0.75, reset=reset, strict=strict)
    weight, epilogue = draw_layer(out, into, kernel, neuron)
    spikes = PackedSpikes.pack(draw(steps, images, into, height, width, density=0.2))
    residual = torch.randn(steps, images, height, width, out, generator=torch.Generator().manual_seed(2))
    arguments = (spikes, EventWeight(weight), epilogue)
    membrane, fired = spike_product(*arguments, residual=residual, membrane=True)
    expected, expected_fired = spike_product_reference(*arguments, residual=residual, membrane=True)
    torch.testing.assert_close(membrane, expected, rtol=0, atol=2e-6)
    # A membrane that lies on the threshold within the rounding of its sum may fall on either side.
    assert (fired.unpack() != expected_fired.unpack()).float().mean() <= 1e-4


@pytest.mark.parametrize("levels,norm", [(4, 4.0), (8, 1.0), (3, 3.0), (1, 2.0)])
@pytest.mark.parametrize("shape", SHAPES[:6])
def test_levels_in_planes_agree_with_the_reference_and_with_dense_products(shape, levels, norm):
    steps, images, height, width, into, out, kernel = shape
    weight, epilogue = draw_layer(out, into, kernel, NeuronSpec())
    level = (draw(levels, steps, images, into, height, width, density=0.3).cumsum(0)[-1]).float()
    planes = (level > torch.arange(levels).view(-1, 1, 1, 1, 1, 1)).float()
    packed = PackedSpikes.pack_levels(planes, norm)
    assert torch.equal(packed.unpack(), level / norm) and torch.equal(packed.unpack_reference(), level / norm)
    assert packed.count() == level.sum() and packed.rate() == pytest.approx(planes.mean().item())
    assert torch.equal(
        spike_pool(packed).unpack(),
        F.max_pool2d(level.flatten(0, 1), 3, 2, 1).view_as(spike_pool(packed).unpack()) / norm,
    )
    arguments = (packed, EventWeight(weight / norm), epilogue)
    membrane, fired = spike_product(*arguments, membrane=True)
    expected, expected_fired = spike_product_reference(*arguments, membrane=True)
    torch.testing.assert_close(membrane, expected, rtol=1e-5, atol=1e-5)
    assert (fired.unpack() != expected_fired.unpack()).float().mean() <= 1e-3
    sums = F.conv2d((level / norm).flatten(0, 1).double(), weight.double(), padding=kernel // 2).movedim(1, -1)
    alone, _ = spike_product(packed, EventWeight(weight / norm), Epilogue(out), membrane=True)
    torch.testing.assert_close(alone.flatten(0, 1).double(), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 64, 70])
def test_sums_of_spikes_are_the_planes_of_both(channels, instructions):
    parts = [draw(3, 2, channels, 5, 4, density=density, seed=seed) for seed, density in enumerate((0.2, 0.5, 0.9))]
    packed = [PackedSpikes.pack(part) for part in parts]
    counts, total = packed[0].plus(packed[1]).plus(packed[2]), sum(parts)
    assert counts.planes == 3 and torch.equal(counts.unpack(), total) and total.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(counts.unpack_reference(), total) and counts.count() == total.sum()
    weight = IntegerWeight(torch.randint(-127, 128, (33, channels, 3, 3)).char())
    expected = F.conv2d(total.flatten(0, 1).double(), weight.weight.double(), padding=1).movedim(1, -1)
    for product in (spike_product, spike_product_dense):
        found, _ = product(counts, weight, Epilogue(33), membrane=True)
        assert torch.equal(found.flatten(0, 1).double(), expected)
    with pytest.raises(ValueError, match="one size, channels and norm"):
        counts.plus(packed[0].images(0, 1))


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_the_neuron_sees_exactly_the_membrane_that_is_kept(reset):
    neuron = NeuronSpec(threshold=0.9, reset=reset)
    weight, epilogue = draw_layer(96, 48, 3, neuron)
    spikes = PackedSpikes.pack(draw(4, 2, 48, 8, 8, density=0.2))
    membrane, fired = spike_product(spikes, EventWeight(weight), epilogue, membrane=True)
    _, again = spike_neuron_reference(membrane, Epilogue(96, neuron=neuron, inv_tau=epilogue.inv_tau), 4)
    assert torch.equal(fired.words, again.words)
    assert 0.05 < fired.rate() < 0.95


def test_the_membrane_may_replace_the_residual():
    weight, epilogue = draw_layer(40, 64, 1, NeuronSpec())
    spikes = PackedSpikes.pack(draw(4, 1, 64, 5, 5, density=0.1))
    residual = torch.randn(4, 1, 5, 5, 40)
    apart, fired = spike_product(spikes, EventWeight(weight), epilogue, residual=residual, membrane=True)
    written, fired_too = spike_product(spikes, EventWeight(weight), epilogue, residual=residual, membrane=residual)
    assert written is residual
    assert torch.equal(written, apart) and torch.equal(fired.words, fired_too.words)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_threads_and_batch_do_not_change_a_bit(threads, images):
    weight, epilogue = draw_layer(70, 64, 3, NeuronSpec())
    tiled = EventWeight(weight)
    spikes = PackedSpikes.pack(draw(4, 3, 64, 12, 11, density=0.15))
    whole = spike_product(spikes, tiled, epilogue)[1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        part = spike_product(spikes.images(0, images), tiled, epilogue)[1]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(part.words, whole.words[:, :images])


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_a_membrane_too_large_for_the_caches_is_the_same(reset):
    weight, epilogue = draw_layer(256, 5, 1, NeuronSpec(reset=reset))
    tiled = EventWeight(weight)
    spikes = PackedSpikes.pack(draw(4, 2, 5, 48, 48, density=0.3))
    whole, fired = spike_product(spikes, tiled, epilogue, membrane=True)
    assert 4 * whole.numel() > 16 << 20
    parts = [spike_product(spikes.images(i, i + 1), tiled, epilogue, membrane=True) for i in range(2)]
    assert torch.equal(whole, torch.cat([membrane for membrane, _ in parts], dim=1))
    assert torch.equal(fired.words, torch.cat([part.words for _, part in parts], dim=1))
    x = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    whole, fired = spike_neuron(x, epilogue, 4, membrane=True)
    # One float further on nothing is aligned, and the caches keep the membrane.
    unaligned = torch.empty(x.numel() + 1)[1:].view(x.shape)
    again, fired_again = spike_neuron(x, epilogue, 4, membrane=unaligned)
    assert torch.equal(whole, again) and torch.equal(fired.words, fired_again.words)


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize("channels", [1, 33, 64, 70])
def test_a_cut_sequence_goes_on_from_where_the_neurons_stood(reset, channels, instructions):
    weight, epilogue = draw_layer(channels, 48, 3, NeuronSpec(threshold=0.75, reset=reset))
    whole_numbers = IntegerWeight((weight * 20).char())
    spikes = PackedSpikes.pack(draw(5, 2, 48, 6, 7, density=0.2))
    residual = torch.randn(5, 2, 6, 7, channels, generator=torch.Generator().manual_seed(0))
    real = residual * 2
    calls = {
        "product": lambda at, **o: spike_product(spikes.of(spikes.words[at]), EventWeight(weight), epilogue, **o),
        "whole numbers": lambda at, **o: spike_product_dense(
            spikes.of(spikes.words[at]), whole_numbers, epilogue, residual=residual[at], **o
        ),
        "neuron": lambda at, **o: spike_neuron(real[at], epilogue, len(real[at]), membrane=True, **o),
    }
    for name, call in calls.items():
        _, whole = call(slice(None))
        standing, parts = torch.zeros(2, 6, 7, channels), []
        for first, last in ((0, 2), (2, 3), (3, 5)):
            parts.append(call(slice(first, last), standing=standing)[1].words)
        assert torch.equal(torch.cat(parts), whole.words), name
        assert not torch.equal(call(slice(3, 5))[1].words, whole.words[3:]), name
        expected = torch.zeros_like(standing)
        u, _ = call(slice(None), standing=expected)
        assert torch.equal(standing, expected)
        if u is not None:
            # What the reference leaves of the same input.
            left = torch.zeros_like(standing)
            bare = Epilogue(channels, neuron=epilogue.neuron, inv_tau=epilogue.inv_tau)
            spike_neuron_reference(u, bare, len(u), standing=left)
            assert torch.equal(standing, left)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("channels", [1, 32, 48, 96])
def test_neuron_on_real_input(frames, channels):
    x = torch.randn(frames, 3, 5, 7, channels, generator=torch.Generator().manual_seed(0)) * 2
    epilogue = draw_layer(channels, 1, 1, NeuronSpec(threshold=0.5))[1]
    membrane, fired = spike_neuron(x, epilogue, 4, membrane=True)
    expected, expected_fired = spike_neuron_reference(x, epilogue, 4, membrane=True)
    assert torch.equal(membrane, expected)
    assert torch.equal(fired.words, expected_fired.words)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (14, 13)])
def test_pooling(size):
    spikes = PackedSpikes.pack(draw(3, 2, 70, *size, density=0.1))
    assert torch.equal(spike_pool(spikes).words, spike_pool_reference(spikes).words)
    x = torch.randn(3, 2, *size, 37)
    out = torch.empty(3, 4, *real_pool(x).shape[2:])
    assert torch.equal(real_pool(x), real_pool_reference(x)) and torch.equal(
        real_pool(x[0:1], out=out[0:1, :2]), real_pool(x)[:1]
    )
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \[3, 2, "):
        real_pool(x, out=out[:, :2])


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 2, 130, 4, 5))),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_packing_keeps_every_spike(shape, density, seed):
    spikes = draw(*shape, density=density, seed=seed)
    packed = PackedSpikes.pack(spikes)
    assert torch.equal(packed.unpack(), spikes) and torch.equal(packed.unpack_reference(), spikes)
    assert torch.equal(packed.unpack(torch.uint8), spikes.byte())
    assert packed.count() == spikes.sum() and packed.rate() == pytest.approx(spikes.mean().item())


@pytest.mark.parametrize("channels,planes", [(1, 1), (64, 4), (70, 3), (130, 128)])
def test_levels_are_packed_and_unpacked(channels, planes, instructions):
    level = torch.randint(0, planes + 1, (2, 3, channels, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    steps = level > torch.arange(planes).view(-1, *[1] * 5)
    packed, expected = PackedSpikes.of_levels(level.movedim(2, -1), planes, 2.0), PackedSpikes.pack_levels(steps, 2.0)
    assert torch.equal(packed.words, expected.words) and packed.of(0) == expected.of(0)
    assert torch.equal(packed.unpack(), level / 2) and level.unique().numel() == planes + 1
    silent = PackedSpikes.of_levels(torch.full((1, 1, 1, 1, 70), torch.nan), planes)
    assert silent.count() == 0


@pytest.mark.parametrize("rounding", ["even", "up"])
@pytest.mark.parametrize("channels", [3, 24, 64, 70, 130])
def test_an_integer_neuron_behind_the_sums(channels, rounding, instructions):
    neuron = LevelSpec(levels=5, norm=3.0, rounding=rounding, threshold=0.7)
    weight, epilogue = draw_layer(channels, 48, 3, neuron)
    spikes = PackedSpikes.pack(draw(2, 3, 48, 6, 7, density=0.2))
    residual = torch.randn(2, 3, 6, 7, channels, generator=torch.Generator().manual_seed(0)) * 2
    whole = IntegerWeight((weight * 20).char())
    calls = {
        "product": partial(spike_product, spikes, EventWeight(weight), epilogue),
        "whole numbers": partial(spike_product_dense, spikes, whole, epilogue),
        "neuron": partial(spike_neuron, residual * 2, epilogue, 2),
        "one frame": partial(spike_neuron, residual[:1] * 2, epilogue, 2),
    }
    for name, call in calls.items():
        for shortcut in (None, residual):
            membrane, fired = call(residual=shortcut, membrane=True)
            level = levels_reference(membrane, neuron._replace(norm=1.0)).movedim(-1, 2)
            assert torch.equal(fired.unpack(), level / 3) and level.unique().numel() == 6, name
            assert (fired.channels, fired.planes, fired.norm) == (channels, 5, 3.0)
            alone = call(residual=shortcut)[1]
            assert torch.equal(alone.words, fired.words), name
    expected = spike_neuron_reference(residual * 2, epilogue, 2, residual=residual)[1]
    assert torch.equal(calls["neuron"](residual=residual)[1].words, expected.words)


def test_an_integer_neuron_in_front_of_a_pooling():
    x = torch.randn(2, 3, 9, 8, 3, generator=torch.Generator().manual_seed(0))
    weight, epilogue = draw_layer(70, 3, 3, LevelSpec())
    pooled = pooled_product(x, RealWeight(weight), epilogue, 2)
    assert torch.equal(pooled.words, spike_pool(real_product(x, RealWeight(weight), epilogue, 2)[1]).words)
    assert pooled.planes == 4 and pooled.unpack().unique().numel() == 5


def test_padding_to_words():
    padded = pad_to_words(torch.ones(65, 2))
    assert padded.shape == (128, 2) and padded.sum() == 130
    assert pad_to_words(torch.ones(64)).shape == (64,)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: PackedSpikes.pack(torch.full((1, 1, 1, 1, 1), 0.5)), "must be 0 or 1"),
        (lambda: PackedSpikes.pack(torch.ones(1, 1, 1)), r"\[T, B, C, H, W\]"),
        (lambda: PackedSpikes.pack_levels(torch.full((2, *[1] * 5), 0.5), 1.0), "must be 0 or 1"),
        (lambda: PackedSpikes.pack_levels(torch.full((2, *[1] * 5), torch.nan), 1.0), "must be 0 or 1"),
        (lambda: PackedSpikes.of_levels(torch.ones(1, 1, 1), 4), r"\[T, B, H, W, C\]"),
        (lambda: PackedSpikes.of_levels(torch.ones(*[1] * 5).double(), 4), "float32.*got torch.float64"),
        (lambda: PackedSpikes.pack(torch.ones(*[1] * 5)).unpack(torch.bfloat16), "or torch.uint8, got torch.bfloat16"),
        (lambda: _levels(2, 1.0).unpack(torch.uint8), "2 plane.* unpack to torch.float32, got torch.uint8"),
        (lambda: _levels(1, 2.0).unpack(torch.uint8), "norm 2 unpack to torch.float32, got torch.uint8"),
        (lambda: EventWeight(torch.ones(4, 4, 5, 5)), r"\[4, 4, 5, 5\]"),
        (lambda: EventWeight(torch.ones(1, 1 << 16, 1, 1)), "65536"),
        (lambda: _product(into=3), "3 and the epilogue"),
        (lambda: _product(residual=torch.ones(1, 1, 2, 2, 3)), "residual"),
        (lambda: _product(standing=torch.ones(1, 2, 2, 3)), "standing"),
        (lambda: spike_neuron(torch.ones(2, 1, 1, 1, 4), Epilogue(4), 3), "3 or 1"),
        (lambda: PackedSpikes.pack(torch.ones(1, 1, 96, 1, 1)).split([64, 65]), r"\[64, 65\] channels take 3 words"),
        (lambda: _levels(2, 1.0).split([2]), "1 words of one plane, got 2 of 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _levels(planes: int, norm: float) -> PackedSpikes:
    return PackedSpikes.pack_levels(torch.ones(planes, 1, 1, 2, 2, 2), norm)


def _product(into: int = 2, residual: Tensor | None = None, standing: Tensor | None = None) -> None:
    spikes = PackedSpikes.pack(torch.ones(1, 1, into, 2, 2))
    spike_product(spikes, EventWeight(torch.ones(4, 2, 1, 1)), Epilogue(4), residual=residual, standing=standing)
