"""LIF and ParametricLIF against snnTorch's own step loop, float64, and what a neuron must not do."""

import copy
import gc
import pickle
import weakref
from functools import partial

import numpy as np
import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snntorch._neurons.neurons import SpikingNeuron
from torch import nn

from sdt_blocks import LIF, ParametricLIF
from sdt_blocks.neuron import make_neuron

RESETS = ("zero", "subtract", "none")


def snntorch_loop(x, *, tau, threshold, reset, spike_grad):
    """snnTorch's Leaky, one step after the other."""
    leaky = snntorch.Leaky(beta=1 - 1 / tau, threshold=threshold, spike_grad=spike_grad, reset_mechanism=reset)
    membrane, spikes = torch.zeros_like(x[0]), []
    for current in x / tau:
        fired, membrane = leaky(current, membrane)
        spikes.append(fired)
    return torch.stack(spikes), membrane


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("shape", [(1, 7), (4, 3, 5), (9, 2, 8, 3, 5)])
def test_snntorch_step_loop(reset, tau, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).mul(2).add(0.5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(shape)
    spike_grad = snntorch.surrogate.fast_sigmoid(slope=5)
    neuron = LIF(tau=tau, threshold=0.9, reset=reset, surrogate=spike_grad, strict=True)
    spikes, membrane = neuron(ours, return_membrane=True)
    expected, last = snntorch_loop(theirs, tau=tau, threshold=0.9, reset=reset, spike_grad=spike_grad)

    assert (spikes != expected).sum() == 0, "no input here comes within rounding of the threshold"
    torch.testing.assert_close(membrane, last, rtol=1e-5, atol=1e-6)
    ((spikes * weight).sum() + membrane.sum()).backward()
    ((expected * weight).sum() + last.sum()).backward()
    assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


def test_single_step_is_snntorchs_own():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 10)
    neuron, membrane, spikes = LIF(), None, []
    for x_t in x:
        fired, membrane = neuron.step(x_t, membrane)
        spikes.append(fired)
    whole, last = neuron(x, return_membrane=True)
    assert torch.equal(torch.stack(spikes), whole)
    torch.testing.assert_close(membrane, last)
    assert neuron.mem.numel() == 0
    fired, membrane = snntorch.Leaky.forward(neuron, x[0] / 2, torch.zeros(4, 10))
    assert torch.equal(fired, whole[0])


@pytest.mark.parametrize("tau", [2.0, 1.7])
@pytest.mark.parametrize("reset", RESETS)
def test_float64(tau, reset):
    torch.manual_seed(1)
    x = torch.randn(8, 20000)
    spikes = LIF(tau=tau, reset=reset)(x)
    exact = LIF(tau=tau, reset=reset)(x.double())
    assert exact.dtype == torch.float64 and spikes.dtype == torch.float32
    assert (spikes != exact).sum() <= 2


def test_equation_by_hand():
    """h = 0.75, silent; 0.375 + 0.5, silent; 0.4375 + 0.6 = 1.0375, fires and resets; 1.0, fires."""
    x = torch.tensor([1.5, 1.0, 1.2, 2.0]).view(4, 1)
    spikes, membrane = LIF()(x, return_membrane=True)
    assert spikes.flatten().tolist() == [0, 0, 1, 1]
    assert membrane.item() == 1.0
    assert LIF(strict=True)(x).flatten().tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_float32_state(dtype):
    x = torch.randn(5, 100).to(dtype)
    spikes, membrane = LIF(tau=3.0)(x, return_membrane=True)
    assert spikes.dtype == dtype and membrane.dtype == torch.float32
    assert torch.equal(spikes.float(), LIF(tau=3.0)(x.float()))


def test_detached_reset_is_the_closed_form():
    """Two steps, the first fires: with the reset detached, x[0] reaches s[1] only through 1 - s[0] = 0."""
    derivative = LIF().surrogate.derivative
    x = torch.tensor([[3.0], [1.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(LIF()(x)[1].sum(), x)
    h0, h1 = torch.tensor(1.5), torch.tensor(0.5)
    torch.testing.assert_close(grad, torch.stack([torch.zeros(1), derivative(h1 - 1).view(1) / 2]))
    (grad,) = torch.autograd.grad(LIF(detach_reset=False)(x)[1].sum(), x)
    through_reset = derivative(h1 - 1) * 0.5 * (-h0) * derivative(h0 - 1) * 0.5
    torch.testing.assert_close(grad[0, 0], through_reset)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("detach_reset", [True, False])
def test_single_steps_have_the_gradient_of_the_sequence(detach_reset, reset):
    neuron, x = LIF(detach_reset=detach_reset, reset=reset), (3 * torch.rand(6, 50)).requires_grad_()
    membrane, spikes = None, []
    for x_t in x:
        fired, membrane = neuron.step(x_t, membrane)
        spikes.append(fired)
    stepwise, whole = (torch.autograd.grad(out.sum(), x)[0] for out in (torch.stack(spikes), neuron(x)))
    torch.testing.assert_close(stepwise, whole)


@pytest.mark.parametrize("make", [LIF, ParametricLIF, partial(ParametricLIF, init_tau=3.0, channels=5)])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_two_halves_give_exactly_the_whole(make, reset, cut):
    torch.manual_seed(2)
    x = torch.randn(7, 3, 5, 2, 3).add(0.5)
    neuron = make(reset=reset)
    whole, last = neuron(x, return_membrane=True)
    first, membrane = neuron(x[:cut], return_membrane=True)
    second, end = neuron(x[cut:], membrane, return_membrane=True)
    assert torch.equal(torch.cat([first, second]), whole) and torch.equal(end, last)


def test_gradient_flows_through_the_membrane_between_halves():
    x = torch.randn(6, 50, requires_grad=True)
    neuron = LIF()
    (whole,) = torch.autograd.grad(neuron(x).sum(), x)
    first, membrane = neuron(x[:2], return_membrane=True)
    (halves,) = torch.autograd.grad(first.sum() + neuron(x[2:], membrane).sum(), x)
    torch.testing.assert_close(halves, whole)


@pytest.mark.parametrize("channels", [None, 6, np.int64(6)])
def test_parametric_lif(channels):
    neuron = ParametricLIF(init_tau=3.0, channels=channels)
    torch.testing.assert_close(1 / neuron.inv_tau, torch.full_like(neuron.w, 3.0))
    torch.testing.assert_close(neuron.beta, 1 - neuron.inv_tau)
    assert list(neuron.state_dict()) == ["w"] and neuron.w.shape == (() if channels is None else (6,))
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 3, 3)
    assert torch.equal(neuron(x), LIF(tau=3.0)(x))
    neuron(x).square().sum().backward()
    # The gradient as a sum over positions of that of a time constant for each.
    w = neuron.w.detach().expand(6).clone().view(6, 1, 1).expand(2, 6, 3, 3).clone().requires_grad_()
    h, total = torch.zeros(2, 6, 3, 3), 0.0
    for x_t in x:
        u = h * (h < 1)
        h = u + (x_t - u) * w.sigmoid()
        total = total + neuron.surrogate(h - 1).square().sum()
    total.backward()
    expected = w.grad.sum() if channels is None else w.grad.sum((0, 2, 3))
    torch.testing.assert_close(neuron.w.grad, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    reset=st.sampled_from(RESETS),
    strict=st.booleans(),
    tau=st.floats(1, 20),
)
def test_any_shape(shape, reset, strict, tau):
    x = torch.randn(shape)
    spikes, membrane = LIF(tau=tau, reset=reset, strict=strict)(x, return_membrane=True)
    assert spikes.shape == x.shape and membrane.shape == x.shape[1:]
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}


def test_is_a_snntorch_neuron_that_leaves_no_trace():
    before = list(SpikingNeuron.instances)
    neuron = LIF()
    assert isinstance(neuron, snntorch.Leaky) and isinstance(ParametricLIF(), snntorch.SpikingNeuron)
    assert SpikingNeuron.instances == before
    assert dict(neuron.state_dict()) == {}
    neuron(torch.randn(4, 3, requires_grad=True))
    assert dict(neuron.state_dict()) == {}
    alive = weakref.ref(neuron)
    del neuron
    gc.collect()
    assert alive() is None


def test_deepcopy_and_pickle_at_any_moment():
    x = torch.randn(4, 3, requires_grad=True)
    for neuron in (LIF(tau=3.0, reset="subtract", surrogate="atan"), ParametricLIF(init_tau=3.0)):
        spikes = neuron(x)
        neuron.step(x[0])
        for twin in (copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))):
            assert torch.equal(twin(x), spikes)
            assert twin.step(x[0])[0].shape == x[0].shape
    with_snntorch = LIF(surrogate=snntorch.surrogate.atan())
    assert torch.equal(copy.deepcopy(with_snntorch)(x), with_snntorch(x))


def test_memory_is_flat_over_a_thousand_passes():
    neuron = nn.Sequential(nn.Linear(16, 16), LIF())
    x = torch.randn(4, 8, 16)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    neuron(x).sum().backward()
    before = tensors()
    for _ in range(1000):
        neuron(x).sum().backward()
    assert tensors() <= before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LIF(tau=0.5), ValueError, "tau must be at least 1.*got 0.5"),
        (lambda: LIF(tau=torch.tensor(2.0)), TypeError, "tau must be a number, got a Tensor: it is not learned"),
        (lambda: LIF(threshold=0), ValueError, "threshold must be positive and finite, got 0"),
        (lambda: LIF(reset="soft"), ValueError, "'soft' is unknown; choose one of subtract, zero, none"),
        (lambda: LIF(surrogate="relu"), ValueError, "'relu' is unknown"),
        (lambda: ParametricLIF(init_tau=1), ValueError, "above 1, got 1"),
        (lambda: ParametricLIF(channels=0), ValueError, "got 0"),
        (lambda: ParametricLIF(channels=2.0), TypeError, "channels must be a whole number, got 2.0"),
        (lambda: ParametricLIF(tau=3.0), TypeError, "learns its tau; init_tau=3.0 is what it starts from"),
        (lambda: LIF()(torch.ones(3, 2, dtype=torch.int)), TypeError, "floating-point.*int32"),
        (lambda: LIF()(torch.zeros(0, 2)), ValueError, r"at least one time step.*\[0, 2\]"),
        (lambda: LIF()(torch.zeros(4, 2), torch.zeros(3)), ValueError, r"the shape \[2\], got \[3\]"),
        (lambda: ParametricLIF(channels=3)(torch.zeros(4, 2, 5)), ValueError, "one value for each channel"),
        (lambda: ParametricLIF(channels=3).step(torch.zeros(2, 3)), ValueError, "one time constant a layer"),
        (lambda: LIF().step(torch.zeros(2, 3), torch.zeros(4, 3)), ValueError, r"shape \[2, 3\] of x, got \[4, 3\]"),
        (lambda: make_neuron("iaf", channels=1), ValueError, "'iaf' is unknown; choose one of lif, plif"),
        (lambda: make_neuron(LIF(), channels=1), TypeError, "a factory that makes a new module for each layer"),
        (lambda: make_neuron(lambda: LIF(), channels=1), TypeError, "must accept threshold="),
        (lambda: make_neuron(partial(LIF, 3.0), channels=1), TypeError, "give options by name, as in partial"),
    ],
)
def test_errors_name_value_and_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_factories():
    assert make_neuron("lif", channels=8, threshold=0.5).threshold == 0.5
    assert make_neuron(partial(LIF, tau=3.0), channels=8).tau == 3.0
    assert make_neuron(ParametricLIF, channels=8).w.ndim == 0
    foreign = partial(LIF, threshold=3.0, surrogate=snntorch.surrogate.atan())
    assert make_neuron(foreign, channels=8, threshold=0.5).threshold == 1.5
    per_channel = make_neuron(
        lambda threshold, channels: ParametricLIF(threshold=threshold, channels=channels), channels=8
    )
    assert per_channel.w.shape == (8,)
