"""Products with whole numbers against sums in 64 bits, and products of real values in a fixed order."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from convolutions import SHAPES, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdt_blocks.ops.integers import (
    IntegerWeight,
    RealWeight,
    Windows,
    byte_product,
    depthwise_product,
    largest,
    pooled_product,
    quantize,
    real_product,
    spike_product_dense,
)
from sdt_blocks.ops.packed import Epilogue, PackedSpikes, spike_neuron, spike_pool_reference, spike_product
from sdt_blocks.ops.spec import NeuronSpec


def draw_weight(*shape: int, pieces: int, seed: int = 1) -> IntegerWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return IntegerWeight(quantize(weight, pieces)[0])


def true_sums(frames: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """The convolution `[T, B, C, H, W] -> [T, B, H', W', out]` as the nearest float32.

    float64 holds whole numbers up to 2^53, so no sum here is rounded in any order.
    """
    options = {"stride": windows.stride, "padding": windows.padding, "dilation": windows.dilation}
    columns = F.unfold(frames.flatten(0, 1).double(), weight.shape[2:], **options)
    sums = columns.mT @ weight.flatten(1).double().T
    return sums.float().view(*frames.shape[:2], *windows.size(frames.shape[3:], weight.shape[2:]), len(weight))


def test_sums_are_those_of_64_bit_integers_by_events_and_densely(instructions):
    for shape, pieces in itertools.product(SHAPES, (1, 3)):
        steps, images, height, width, into, out, kernel = shape
        weight = draw_weight(out, into, kernel, kernel, pieces=pieces)
        for density in (0.0, 0.2, 1.0):
            spikes = draw(steps, images, into, height, width, density=density)
            expected = true_sums(spikes, weight.weight, Windows.same(weight.weight))
            assert density < 1 or expected.abs().max() > 0
            for product in (spike_product, spike_product_dense):
                found, _ = product(PackedSpikes.pack(spikes), weight, Epilogue(out), membrane=True)
                assert torch.equal(found, expected), (shape, density, pieces, product.__name__)


def test_products_of_the_library_in_turn_with_ours_keep_their_bits():
    """Both may set up the same matrix units of a processor, each in its own way."""
    weight, packed = draw_weight(64, 64, 3, 3, pieces=1), PackedSpikes.pack(draw(2, 2, 64, 9, 8, density=0.3))
    x, rows = torch.randn(40, 256).bfloat16(), torch.randn(72, 256).bfloat16()
    ours, theirs = (
        lambda: spike_product_dense(packed, weight, Epilogue(64), membrane=True)[0],
        lambda: F.linear(x, rows),
    )
    expected = theirs(), ours()
    assert all(result.std() > 1 for result in expected)
    for _ in range(3):
        assert torch.equal(theirs(), expected[0]) and torch.equal(ours(), expected[1])


@pytest.mark.parametrize("sign", [1, -1])
def test_no_partial_sum_overflows(instructions, sign):
    into = 60_001
    packed = PackedSpikes.pack(torch.ones(2, 1, into, 1, 3))
    for weight, dtype in ((127, torch.int8), (2**31 // into - 1, torch.int32)):
        whole = IntegerWeight(torch.full((3, into, 1, 1), sign * weight, dtype=dtype))
        expected = torch.tensor(sign * weight * into).float()
        for product in (spike_product, spike_product_dense):
            assert (product(packed, whole, Epilogue(3), membrane=True)[0] == expected).all()


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("planes,norm", [(8, 1.0), (128, 3.0)])
def test_levels(instructions, pieces, planes, norm):
    level = (draw(planes, 2, 1, 37, 5, 4, density=0.6)).sum(0)
    level[0, 0, 0] = planes
    unfolded = (level > torch.arange(planes).view(-1, 1, 1, 1, 1, 1)).float()
    packed = PackedSpikes.pack_levels(unfolded, norm)
    weight = torch.randn(20, 37, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = IntegerWeight(quantize(weight, pieces, planes)[0])
    expected = true_sums(level, whole.weight, Windows.same(weight))
    for product in (spike_product, spike_product_dense):
        assert torch.equal(product(packed, whole, Epilogue(20), membrane=True)[0], expected)
    frames = level.flatten(0, 1).movedim(1, -1).to(torch.uint8)
    assert torch.equal(byte_product(frames, whole, Epilogue(20)), expected.flatten(0, 1))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 2, 70, 9, 8, 40))),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    seed=st.integers(0, 1000),
)
def test_any_windows(sizes, kernel, stride, padding, dilation, seed):
    steps, images, into, height, width, out = sizes
    windows = Windows(stride, padding, dilation)
    weight = draw_weight(out, into, *kernel, pieces=1, seed=seed)
    if min(windows.size((height, width), weight.weight.shape[2:])) < 1:
        return
    spikes = draw(steps, images, into, height, width, density=0.3, seed=seed)
    packed = PackedSpikes.pack(spikes)
    found, _ = spike_product_dense(packed, weight, Epilogue(out), windows=windows, membrane=True)
    assert torch.equal(found, true_sums(spikes, weight.weight, windows))
    # Small whole numbers are exact in float32 too.
    frames = spikes.movedim(2, -1)
    options = {"windows": windows, "membrane": True}
    real, _ = real_product(frames, RealWeight(weight.weight), Epilogue(out), steps, **options)
    assert torch.equal(real, found)
    one, _ = real_product(frames[:1], RealWeight(weight.weight), Epilogue(out), 3, **options)
    assert torch.equal(one, found[:1].expand(3, *found.shape[1:]))
    depthwise = depthwise_product(
        frames.flatten(0, 1), weight.weight[:1, :, :, :].movedim(0, 1).float(), windows=windows
    )
    expected = F.conv2d(
        spikes.flatten(0, 1), weight.weight[0, :, None].float(), None, stride, padding, dilation, groups=into
    )
    assert torch.equal(depthwise.movedim(-1, 1), expected)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_the_epilogue_sees_the_sums(pieces, reset):
    neuron = NeuronSpec(threshold=0.9, reset=reset)
    packed = PackedSpikes.pack(draw(4, 2, 48, 8, 7, density=0.2))
    weight, scale = quantize(torch.randn(70, 48, 3, 3, generator=torch.Generator().manual_seed(0)) / 7, pieces)
    epilogue = Epilogue(70, scale=scale, shift=torch.rand(70), inv_tau=torch.rand(70) * 0.8 + 0.1, neuron=neuron)
    residual = torch.randn(4, 2, 8, 7, 70)
    whole = IntegerWeight(weight)
    sums, _ = spike_product_dense(packed, whole, Epilogue(70), membrane=True)
    expected, fired = spike_neuron(sums, epilogue, 4, residual=residual, membrane=True)
    for product in (spike_product, spike_product_dense):
        found, spikes = product(packed, whole, epilogue, residual=residual, membrane=True)
        assert torch.equal(found, expected) and torch.equal(spikes.words, fired.words)
    assert 0.05 < fired.rate() < 0.95


def test_real_products_are_the_ordered_sum_and_near_the_true_one(instructions):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 9, 7, 5, generator=generator), torch.randn(37, 5, 3, 3, generator=generator)
    found, _ = real_product(x, RealWeight(weight), Epilogue(37), 2, membrane=True)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    sums = torch.zeros(found.shape)
    for i in range(3):
        for j in range(3):
            for channel in range(5):
                part = padded[:, :, i : i + 9, j : j + 7, channel, None].double()
                # In float64 a product of two float32 is exact, and the sum rounded once more hardly ever matters.
                sums = (sums + part * weight[:, channel, i, j].double()).float()
    torch.testing.assert_close(found, sums, rtol=0, atol=1e-6)
    true = F.conv2d(x.flatten(0, 1).movedim(-1, 1).double(), weight.double(), padding=1).movedim(1, -1)
    torch.testing.assert_close(found.flatten(0, 1).double(), true, rtol=0, atol=1e-5)


def test_spikes_of_few_inputs_are_pooled_on_the_way(instructions):
    generator = torch.Generator().manual_seed(0)
    draws = [(1, 3, 1, 1), (2, 3, 7, 6), (1, 2, 40, 9), (3, 1, 5, 250)]
    for (images, into, height, width), frames, out in itertools.product(draws, (1, 4), (16, 48, 70)):
        weight = RealWeight(torch.randn(out, into, 3, 3, generator=generator))
        # Images in PyTorch's order, as they are given.
        x = torch.rand(frames, images, into, height, width, generator=generator).movedim(2, -1)
        epilogue = Epilogue(out, scale=torch.full((out,), 0.7), shift=torch.rand(out) * 2, neuron=NeuronSpec())
        _, fired = real_product(x, weight, epilogue, 4)
        sums, _ = real_product(x.contiguous(), weight, Epilogue(out), 4, membrane=True)
        assert torch.equal(fired.words, spike_neuron(sums, epilogue, 4)[1].words) and 0 < fired.rate() < 1
        found = pooled_product(x, weight, epilogue, 4)
        assert torch.equal(found.words, spike_pool_reference(fired).words)


def test_real_products_are_the_same_for_every_machine_batch_and_number_of_threads(instructions, reference_bits):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 3, 9, 7, 19, generator=generator), torch.randn(37, 19, 3, 3, generator=generator)
    whole, _ = real_product(x, RealWeight(weight), Epilogue(37), 4, membrane=True)
    per_channel = torch.randn(19, 1, 3, 3, generator=generator)
    depthwise = depthwise_product(x.flatten(0, 1), per_channel)
    reference_bits.append((whole, depthwise))
    assert all(torch.equal(a, b) for a, b in zip(reference_bits[0], (whole, depthwise), strict=True))
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            part, _ = real_product(x[:, 1:2], RealWeight(weight), Epilogue(37), 4, membrane=True)
            assert torch.equal(part, whole[:, 1:2])
            assert torch.equal(depthwise_product(x[:, 1], per_channel), depthwise.unflatten(0, (4, 3))[:, 1])
        finally:
            torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference_bits() -> list[tuple[Tensor, Tensor]]:
    """What the first instructions gave."""
    return []


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_batch_do_not_change_a_bit(threads):
    neuron = Epilogue(70, scale=torch.full((70,), 0.01), neuron=NeuronSpec())
    weight = draw_weight(70, 64, 3, 3, pieces=1)
    packed = PackedSpikes.pack(draw(4, 3, 64, 12, 11, density=0.15))
    whole = spike_product(packed, weight, neuron)[1]
    assert 0.01 < whole.rate() < 0.99
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for product in (spike_product, spike_product_dense):
            assert torch.equal(product(packed.images(1, 2), weight, neuron)[1].words, whole.words[:, 1:2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pieces", [1, 3])
def test_whole_numbers_are_as_near_as_they_can_be(pieces):
    weight = torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[2] = 0
    integers, scale = quantize(weight, pieces)
    assert integers.dtype == (torch.int8 if pieces == 1 else torch.int32)
    assert (integers.long().abs().amax((1, 2, 3))[[0, 1, 3]] >= largest(pieces) - 1).all() and (integers[2] == 0).all()
    error = (integers.double() * scale.double().view(-1, 1, 1, 1) - weight).abs()
    assert (error <= 0.5001 * scale.view(-1, 1, 1, 1)).all()


@pytest.mark.parametrize("planes", [1, 8])
def test_sums_of_24_bits_fit_32(planes):
    weight = torch.ones(2, 3000, 3, 3)
    weight[1] = -torch.rand(3000, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, scale = quantize(weight, 3, planes)
    most = (integers.long().sum((1, 2, 3)) * planes).abs()
    assert (most < 2**31).all() and (most > 2**30).all()
    error = (integers.double() * scale.double().view(-1, 1, 1, 1) - weight).abs()
    assert (error <= 0.5001 * scale.view(-1, 1, 1, 1)).all()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: IntegerWeight(torch.ones(2, 2, 1, 1)), "torch.float32"),
        (lambda: IntegerWeight(torch.full((2, 2, 1, 1), -128, dtype=torch.int8)), "-127..127"),
        (lambda: IntegerWeight(torch.ones(2, 2, 5, 5, dtype=torch.int8)).tiles, r"\[2, 2, 5, 5\]"),
        (lambda: real_product(torch.ones(2, 1, 1, 1, 4), RealWeight(torch.ones(4, 4, 1, 1)), Epilogue(4), 3), "3 or 1"),
        (lambda: real_product(torch.ones(1, 1, 1, 1, 4), RealWeight(torch.ones(4, 4, 1, 1)), Epilogue(5), 1), "has 5"),
        (lambda: _pooled(4, Epilogue(4)), "needs a neuron"),
        (lambda: _pooled(300, Epilogue(4, neuron=NeuronSpec())), "at most 256 inputs an output, got 300"),
        (
            lambda: byte_product(torch.ones(1, 1, 1, 4), IntegerWeight(torch.ones(2, 4, 1, 1).char()), Epilogue(2)),
            "uint8",
        ),
        (lambda: depthwise_product(torch.ones(1, 1, 1, 4), torch.ones(4, 4, 1, 1)), r"\[4, 4, 1, 1\]"),
        (lambda: _too_many_levels(), "at most 128, got 129"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _too_many_levels() -> None:
    packed = PackedSpikes.pack_levels(torch.ones(129, 1, 1, 2, 1, 1), 1.0)
    spike_product_dense(packed, IntegerWeight(torch.ones(2, 2, 1, 1, dtype=torch.int8)), Epilogue(2))


def _pooled(into: int, epilogue: Epilogue) -> None:
    pooled_product(torch.ones(1, 1, 1, 1, into), RealWeight(torch.ones(4, into, 1, 1)), epilogue, 1)
