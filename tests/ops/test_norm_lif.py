"""Norm and neuron as one op against `nn.BatchNorm2d` and the reference neuron, module by module."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from sdt_blocks import LIF, ParametricLIF
from sdt_blocks.ops import (
    LevelSpec,
    NeuronSpec,
    Norm,
    attend,
    batch_norm_levels,
    batch_norm_lif,
    batch_norm_lif_reference,
)
from sdt_blocks.steps import normalize_and_fire
from sdt_blocks.surrogate import KINDS

NORMS = {
    "usual": {},
    "cumulative": {"momentum": None},
    "without_parameters": {"affine": False},
    "untracked": {"track_running_stats": False},
    "quick": {"momentum": 0.7, "eps": 1e-2},
}


def channels_last(x):
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def trained(module):
    for parameter in module.parameters():
        parameter.data.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("time_steps", [None, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("channels", [5, 130])
def test_modules(backend, device, norm_options, training, time_steps, channels):
    torch.manual_seed(0)
    norm = trained(nn.BatchNorm2d(channels, **norm_options)).to(device).train(training)
    other = copy.deepcopy(norm)
    neuron = ParametricLIF(init_tau=1.5).to(device)
    twin = copy.deepcopy(neuron)
    frames = 1 if time_steps else 3
    for round_number in range(2):
        x = torch.randn(frames, 2, channels, 3, 5, device=device) * 2 + 1
        x = channels_last(x) if round_number else x
        fused, plain = x.clone().requires_grad_(), x.contiguous().requires_grad_()
        spikes = normalize_and_fire(norm, neuron, fused, time_steps)
        repeated = plain.expand(time_steps or frames, *x.shape[1:])
        expected = twin(other(repeated.flatten(0, 1)).unflatten(0, repeated.shape[:2]))
        assert spikes.grad_fn.name() == "sdt_blocks_lifBackward"
        assert (spikes != expected).sum() <= 1, "only an input within rounding of the threshold may differ"
        weight = torch.randn_like(spikes)
        (spikes * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-3, atol=1e-4)
    for (name, a), b in zip(
        [*norm.named_parameters(), *neuron.named_parameters()], [*other.parameters(), twin.w], strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
    for name, b in other.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("frames", [1, 11])
def test_a_sequence_goes_on(backend, device, frames):
    """From a membrane, to one that has a gradient, over steps that no segment of the backward pass divides."""
    shape = (2, 3, 2, 3)
    leaves = [torch.randn(frames, *shape), torch.rand(3) + 0.5, torch.rand(3), torch.randn(shape)]
    x, weight, bias, membrane = leaves = [leaf.to(device).double().requires_grad_() for leaf in leaves]
    options = {"time_steps": 11 if frames == 1 else None, "return_membrane": True}
    results, weights = [], [torch.randn(size).to(x) for size in ((11, *shape), shape)]
    for op in (batch_norm_lif, batch_norm_lif_reference):
        out = op(x, Norm(weight=weight, bias=bias, training=True), NeuronSpec(0.5), membrane, **options)
        results.append([*out, *torch.autograd.grad(out, leaves, weights)])
    for found, expected in zip(*results, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected)


def test_half_precision_is_rounded_once(backend, device):
    """The norm's output stays float32 inside the op: spikes are those of the float32 norm of the same input."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 5, 5, device=device).bfloat16()
    options = Norm(training=True), NeuronSpec(threshold=0.9)
    spikes = batch_norm_lif(x, *options)
    expected = batch_norm_lif_reference(x.float(), *options)
    assert spikes.dtype == torch.bfloat16
    assert (spikes.float() != expected).sum() <= 1


def test_a_large_mean_costs_no_precision(backend, device):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 7, 7, device=device) + 1000
    spikes = batch_norm_lif(x, Norm(training=True), NeuronSpec())
    exact = batch_norm_lif_reference(x.double(), Norm(training=True), NeuronSpec())
    assert (spikes.double() != exact).float().mean() < 2e-3


@pytest.mark.cuda
@pytest.mark.parametrize("most", [65535, 5, 1])
def test_more_positions_than_programs_beside_each_other(monkeypatch, most):
    """An axis of CUDA's grid has at most 65535 programs: the rest stand on the next one, some behind the last."""
    tiles = pytest.importorskip("sdt_blocks.ops.triton.tiles")
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    monkeypatch.setattr(tiles, "MOST_PROGRAMS", most)
    monkeypatch.setattr(tiles, "_tile", tiles._tile.__wrapped__)  # which remembers the tiles of other limits
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norm, neuron = trained(nn.BatchNorm2d(40)).to(device).double(), ParametricLIF(channels=40).to(device).double()
    other, twin = copy.deepcopy(norm), copy.deepcopy(neuron)
    x = channels_last(torch.randn(2, 3, 40, 9, 9, device=device, dtype=torch.float64) * 2 + 1)
    fused, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    spikes = normalize_and_fire(norm, neuron, fused)
    expected = twin(other(plain.flatten(0, 1)).unflatten(0, (2, 3)))
    weight = torch.randn_like(spikes)
    (spikes * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(spikes, expected) and 0.1 < spikes.mean() < 0.9
    pairs = [(fused.grad, plain.grad), (norm.running_var, other.running_var), (neuron.w.grad, twin.w.grad)]
    pairs += [(ours.grad, theirs.grad) for ours, theirs in zip(norm.parameters(), other.parameters(), strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="memory that nothing touches is free on a CPU alone")
@pytest.mark.parametrize("op", [batch_norm_lif, batch_norm_levels])
@pytest.mark.parametrize("far", ["steps", "images"])
def test_more_elements_than_32_bits_count(monkeypatch, op, far):
    """Between the frames of a view, or between the images of a frame."""
    pytest.importorskip("triton")
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    shape, spec = (3, 3, 8, 3, 3), LevelSpec() if op is batch_norm_levels else NeuronSpec(threshold=0.5)
    strides = (2**30, 72, 9, 3, 1) if far == "steps" else (72, 2**30, 9, 3, 1)
    memory = [torch.from_numpy(np.zeros(2**31 + 1024, np.float16)) for _ in range(2)]
    x, weight = (wide.as_strided(shape, strides).copy_(torch.randn(shape)) for wide in memory)
    leaves = [x.detach().requires_grad_(), x.clone(memory_format=torch.contiguous_format).requires_grad_()]
    found, expected = (op(leaf, Norm(training=True), spec) for leaf in leaves)
    assert torch.equal(found, expected) and found.any()
    gradients = [torch.autograd.grad(*given, weight) for given in zip((found, expected), leaves, strict=True)]
    torch.testing.assert_close(*(gradient.contiguous() for (gradient,) in gradients))


@pytest.mark.parametrize("hooked", ["norm", "neuron", "subclass", "forward"])
def test_what_watches_is_not_skipped(hooked, monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    seen = []

    class Watching(LIF):
        def forward(self, x, membrane=None, **options):
            seen.append(x)
            return super().forward(x, membrane, **options)

    norm, neuron = nn.BatchNorm2d(3), Watching() if hooked == "subclass" else LIF()
    if hooked == "forward":
        forward = norm.forward
        norm.forward = lambda x: (seen.append(x), forward(x))[1]
    elif hooked != "subclass":
        {"norm": norm, "neuron": neuron}[hooked].register_forward_hook(lambda *args: seen.append(args))
    normalize_and_fire(norm, neuron, torch.randn(2, 2, 3, 4, 4))
    assert len(seen) == 1


def test_one_value_a_channel_is_refused_as_by_the_norm():
    x, norm = torch.randn(1, 1, 3, 1, 1), Norm(torch.zeros(3), torch.ones(3), training=True)
    for call in (
        lambda: normalize_and_fire(nn.BatchNorm2d(3), LIF(), x),
        lambda: batch_norm_lif(x, norm, NeuronSpec()),
        lambda: attend([x] * 3, [norm] * 3, [NeuronSpec()] * 4),
        lambda: batch_norm_levels(x, norm, LevelSpec()),
    ):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            call()


def test_evaluation_needs_statistics(backend, device):
    with pytest.raises(ValueError, match="running_mean"):
        batch_norm_lif(torch.randn(2, 1, 3, 2, 2, device=device), Norm(training=False), NeuronSpec())


def through_attention(x, norm, neuron):
    return attend([x] * 3, [TRAINED, TRAINED, norm], [NeuronSpec(), neuron, NeuronSpec(), NeuronSpec()])


def through_levels(x, norm, neuron=None, **options):
    return batch_norm_levels(x, norm, LevelSpec(), **options)


TRAINED, SEEN = Norm(training=True), Norm(torch.zeros(4), torch.ones(4))
REFUSED = {
    "shown": (batch_norm_lif, TRAINED, {}, {"time_steps": 4}, r"time_steps=4 shows one frame .* got \[2, 1, 8, 3, 3\]"),
    "shown levels": (through_levels, TRAINED, {}, {"time_steps": 4}, r"time_steps=4 shows one frame"),
    "statistics": (batch_norm_lif, SEEN, {}, {}, r"running_mean must have one value .* 8 channels, got \[4\]"),
    "statistics of levels": (through_levels, SEEN, {}, {}, "running_mean must have one value"),
    "weight": (through_attention, TRAINED._replace(weight=torch.ones(4)), {}, {}, r"weight .* got \[4\]"),
    "one value": (batch_norm_lif, TRAINED._replace(bias=torch.ones(1)), {}, {}, r"bias .* got \[1\]"),
    "membrane": (
        batch_norm_lif,
        TRAINED,
        {},
        {"membrane": torch.ones(8, 3, 3)},
        r"shape \[1, 8, 3, 3\], got \[8, 3, 3\]",
    ),
    "tau": (batch_norm_lif, TRAINED, {"inv_tau": torch.ones(16)}, {}, r"one value for each channel .* got \[16\]"),
    "tau of k": (
        through_attention,
        TRAINED,
        {"inv_tau": torch.ones(1)},
        {},
        r"one value for each channel .* got \[1\]",
    ),
    "reset": (batch_norm_lif, TRAINED, {"reset": "hard"}, {}, "reset 'hard' is unknown; choose one of zero"),
    "reset of k": (through_attention, TRAINED, {"reset": "hard"}, {}, "reset 'hard' is unknown"),
}


@pytest.mark.parametrize("name", ["reference", "compiled"])
@pytest.mark.parametrize(("op", "norm", "neuron", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(monkeypatch, name, op, norm, neuron, options, message):
    """A kernel would read beyond the end of what is too short."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", name)
    with pytest.raises(ValueError, match=message):
        op(torch.rand(2, 1, 8, 3, 3), norm, NeuronSpec(**neuron), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(backend, device, value, kind):
    """In the running statistics and in every gradient, as module by module."""
    norm, neuron = nn.BatchNorm2d(3).to(device), LIF(surrogate=kind)
    other = copy.deepcopy(norm)
    x = torch.randn(2, 2, 3, 4, 4, device=device)
    x[0, 1, 2, 3, 3] = value
    fused, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    normalize_and_fire(norm, neuron, fused).sum().backward()
    neuron(other(plain.flatten(0, 1)).unflatten(0, (2, 2))).sum().backward()
    assert norm.running_mean.isfinite().tolist() == [True, True, False]
    assert not fused.grad[:, :, 2].isfinite().any() and fused.grad[:, :, :2].isfinite().all()
    pairs = [(fused.grad, plain.grad), (norm.running_mean, other.running_mean), (norm.running_var, other.running_var)]
    pairs += [(ours.grad, theirs.grad) for ours, theirs in zip(norm.parameters(), other.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def unknown(shift):
    """A surrogate that no kernel knows."""
    return (shift >= 0).to(shift) + shift - shift.detach()


@pytest.mark.parametrize("known", [True, False])
def test_a_batch_is_counted_once(backend, device, known):
    """Whether a kernel counts it or the equations do, and however many programs take their channels."""
    neuron = NeuronSpec() if known else NeuronSpec(surrogate=unknown)
    counted = [torch.tensor(number, device=device) for number in (0, 7, 40)]
    for batches in counted:
        batch_norm_lif(torch.randn(2, 2, 20, 3, 3, device=device), Norm(training=True, batches=batches), neuron)
    assert [int(batches) for batches in counted] == [1, 8, 41]
    evaluated = Norm(torch.zeros(20, device=device), torch.ones(20, device=device), batches=counted[0])
    batch_norm_lif(torch.randn(2, 2, 20, 3, 3, device=device), evaluated, neuron)
    assert int(counted[0]) == 1
