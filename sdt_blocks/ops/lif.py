"""Leaky integrate-and-fire over a whole sequence, with or without a batch normalization in front of it.

Only the inputs are kept for the backward pass, which computes the membranes again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_known
from ..surrogate import KINDS, Scheduled, Surrogate, fire
from .bits import as_spikes, wants_bits
from .dispatch import fall_back, fused, kernels
from .processes import added_up
from .registered import registered
from .spec import (
    RESETS,
    Affine,
    Arriving,
    Layout,
    NeuronSpec,
    arrange,
    check_membrane,
    check_time_constants,
    schedule_of,
    state_dtype,
)


def lif_reference(x: Tensor, neuron: NeuronSpec, membrane: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The equations, one time step after the other; the reference for every fused version.

        r[t] = s[t-1]                                      resets where it fired
        u[t] = h[t-1] * (1 - r[t])        (reset "zero"),  else h[t-1]
        h[t] = u[t] + (x[t] - u[t]) / tau - r[t] * threshold (reset "subtract" only)
        s[t] = 1 if h[t] >= threshold else 0               (`>` if strict)

    As in snnTorch, the membrane argument and result are `h`, before its reset, and `r` is recomputed from it: so two
    halves of a sequence give the same as the whole, and snnTorch's own step can continue from it. The state is float32
    for half-precision input, otherwise it has the input's dtype.

    Shapes: x `[T, ...]`, or `[T, B, C, ...]` if `neuron.inv_tau` is `[C]`; membrane `x.shape[1:]`.
    Returns spikes like x, and the last membrane `x.shape[1:]` in the state's dtype.
    """
    threshold, reset, surrogate, detach_reset, strict, inv_tau = neuron
    dtype = state_dtype(x)
    if isinstance(surrogate, Scheduled) and not isinstance(inv_tau, Tensor):
        inv_tau = surrogate.inv_tau
    if isinstance(inv_tau, Tensor):
        inv_tau = inv_tau.to(dtype)
        if inv_tau.ndim == 1:
            inv_tau = inv_tau.view(-1, *[1] * (x.ndim - 3))
    h = x.new_zeros(x.shape[1:], dtype=dtype) if membrane is None else membrane.to(dtype)

    s = torch.zeros_like(h) if membrane is None else fire(h - threshold, surrogate, strict)
    spikes = []
    for x_t in x.unbind(0):
        r = s.detach() if detach_reset else s
        u = h * (1 - r) if reset == "zero" else h
        h = u + (x_t.to(dtype) - u) * inv_tau
        if reset == "subtract":
            h = h - r * threshold
        s = fire(h - threshold, surrogate, strict)
        spikes.append(s.to(x.dtype))
    return torch.stack(spikes), h


def lif(
    x: Tensor, neuron: NeuronSpec, membrane: Tensor | None = None, *, return_membrane: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Spikes of leaky integrate-and-fire neurons for a whole sequence; see `lif_reference` for the equations.

    Returns spikes `[T, ...]`, and with `return_membrane` the last membrane too.

    Raises `ValueError` for an empty sequence, a wrong `membrane` shape, a wrong `inv_tau` shape or an unknown `reset`;
    `TypeError` for input that is not floating point, or a tensor as threshold.

    >>> lif(torch.ones(4, 2), NeuronSpec(threshold=0.8, inv_tau=0.5)).sum(0)
    tensor([1., 1.])
    """
    if not x.is_floating_point():
        raise TypeError(f"a neuron's input must be a floating-point tensor, got {x.dtype}")
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"a sequence needs at least one time step on its first axis, got the shape {list(x.shape)}")
    check_membrane(membrane, x)
    inv_tau, spec = neuron.inv_tau, constants(neuron, x.shape[2:3])
    if spec is not None and x.numel() and fused(x):
        dtype = state_dtype(x)
        spikes, last, bits = lif_op(
            x,
            x.shape[0],
            spec.encode(),
            inv_tau.to(dtype) if isinstance(inv_tau, Tensor) else None,
            None if membrane is None else membrane.to(dtype),
            return_membrane,
            wants_bits(x, inv_tau, membrane),
            *_NO_NORM,
            schedule_of(neuron),
        )
        as_spikes(spikes, bits=bits)
    else:
        spikes, last = lif_reference(x, neuron, membrane)
        if spec is not None and x.numel() and torch.compiler.is_compiling() and fused(x, even_traced=True):
            as_spikes(spikes)
    return (spikes, last) if return_membrane else spikes


def constants(neuron: NeuronSpec, channels: Sequence[int]) -> NeuronSpec | None:
    """The neurons' constants as a fused kernel takes them; `None`, with a warning, if no kernel knows the surrogate.

    Raises `ValueError` for an unknown reset or time constants that are not those of the `channels`, and `TypeError` for
    a tensor as threshold, which would get no gradient.
    """
    threshold, reset, surrogate, detach_reset, strict, inv_tau = neuron
    check_time_constants(inv_tau, channels)
    check_known("reset", reset, RESETS)
    if isinstance(threshold, Tensor):
        raise TypeError(f"threshold must be a number, got a {type(threshold).__name__}: it is not learned")
    if isinstance(surrogate, Scheduled):
        surrogate = surrogate.fixed
    if not isinstance(surrogate, Surrogate):
        name = getattr(surrogate, "__qualname__", type(surrogate).__qualname__)
        fall_back(
            f"the surrogate gradient {name} is not one of sdt_blocks.surrogate, of which {', '.join(KINDS)} are fused"
        )
        return None
    number = 0.0 if isinstance(inv_tau, Tensor) else float(inv_tau)
    return NeuronSpec(threshold, reset, surrogate, detach_reset, strict, number)


_NO_NORM = (None, None, None, None, False)
"""The arguments mean, inv_std, weight, bias and of_batch of a `lif_op` without a norm."""

# A registered op takes tensors, numbers and lists of numbers, but no tuples of our own: its schema is flat, with an
# argument for each field of the tuples. Its body puts them together again.


@registered("sdt_blocks::lif")
def lif_op(
    x: Tensor,
    steps: int,
    neuron: Sequence[float],
    inv_tau: Tensor | None = None,
    membrane: Tensor | None = None,
    keep_membrane: bool = False,
    keep_bits: bool = False,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    of_batch: bool = False,
    scheduled: Tensor | None = None,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes `[steps, ...]` of x `[steps or 1, ...]`; the last membrane, empty unless `keep_membrane`; and the bits.

    The bits are those of `Layout.empty_bits`, empty unless `keep_bits`.

    `neuron` is an encoded `NeuronSpec`; `inv_tau`, `membrane` and the normalization's values have the state's dtype.
    With `mean` the input of the neurons is `(x - mean) * inv_std * weight + bias`, per channel; `of_batch` says that
    mean and inv_std are computed from x, so that the gradient flows through them too, and `group` that they are
    computed from the x of all its processes. `scheduled` numbers (see `Scheduled`) replace the neuron's own.
    """
    x, layout = _arranged(x, steps, inv_tau, mean)
    norm, spec = _affine(mean, inv_std, weight, bias, of_batch, group), _spec(neuron, scheduled)
    bits = layout.empty_bits(x, keep_bits)
    into = bits if bits.numel() else None
    spikes, last = kernels(x).lif_forward(
        x, layout, spec, norm, inv_tau, membrane, keep_membrane=keep_membrane, bits=into
    )
    return spikes, x.new_empty(0, dtype=state_dtype(x)) if last is None else last, bits


@lif_op.register_fake
def _(x, steps, neuron, inv_tau=None, membrane=None, keep_membrane=False, keep_bits=False, mean=None, *_norm):
    x, layout = _arranged(x, steps, inv_tau, mean)
    dtype = state_dtype(x)
    last = layout.empty_frame(x, dtype) if keep_membrane else x.new_empty(0, dtype=dtype)
    return layout.empty(x, steps), last, layout.empty_bits(x, keep_bits)


@registered("sdt_blocks::lif_backward")
def lif_backward_op(
    grad: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    steps: int,
    neuron: Sequence[float],
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    mean: Tensor | None,
    inv_std: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    of_batch: bool,
    scheduled: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, inv_tau, membrane, weight and bias, empty for arguments that were not given."""
    x, layout = _arranged(x, steps, inv_tau, mean)
    arriving, norm = Arriving(grad, grad_last), _affine(mean, inv_std, weight, bias, of_batch, group)
    gradients = lif_gradients(arriving, x, layout, _spec(neuron, scheduled), norm, inv_tau, membrane)
    # A registered op returns only tensors, and none of them twice.
    of_x, of_inv_tau, of_membrane, of_weight, of_bias = (
        x.new_empty(0, dtype=state_dtype(x)) if gradient is None else gradient for gradient in gradients
    )
    return of_x, of_inv_tau, of_membrane, of_weight, of_bias


def lif_gradients(
    arriving: Arriving,
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    norm: Affine | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, inv_tau, membrane and the norm's weight and bias; `None` for arguments that were not given."""
    grad_x, grad_membrane, sums = kernels(x).lif_backward(arriving, x, layout, neuron, norm, inv_tau, membrane)
    grad_inv_tau = grad_weight = grad_bias = None
    if norm is not None:
        grad_weight, grad_bias = gradients_of_norm([grad_x], [x], layout, norm, sums)
    if inv_tau is not None:
        grad_inv_tau = sums[0, 0].sum(0 if inv_tau.ndim else None, dtype=torch.float64).to(state_dtype(x))
    return grad_x, grad_inv_tau, grad_membrane, grad_weight, grad_bias


def gradients_of_norm(
    grad: Sequence[Tensor], x: Sequence[Tensor], layout: Layout, norm: Affine, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn the gradients of the normalized x into those of x, in place; returns those of weight and bias, like mean.

    x are one input or three, see `Kernels.norm_gradients`.
    """
    of_weight, of_bias = torch.empty_like(norm.mean), torch.empty_like(norm.mean)
    count = layout.size // layout.channels * x[0].shape[0] if norm.of_batch else None
    frames = dataclasses.replace(layout, steps=x[0].shape[0])
    own = sums.sum(2, keepdim=True, dtype=torch.float64) if norm.group else None
    if own is not None and count is not None:
        total, counts = added_up(own[:, 1:], count, norm.group)
        # A kernel divides by the count of its own process.
        sums = torch.cat([own[:, :1], total * (count / counts)], 1)
    kernels(x[0]).norm_gradients(grad, x, frames, norm, sums, count, of_weight, of_bias)
    if own is not None:
        # Training code for several processes adds these up.
        of_bias.copy_(own[:, 1, 0].view_as(of_bias))
        of_weight.copy_(own[:, 2, 0].view_as(of_weight) * norm.inv_std)
    return of_weight, of_bias


@lif_backward_op.register_fake
def _(grad, grad_last, x, steps, neuron, inv_tau, membrane, mean, inv_std, weight, bias, of_batch, scheduled, group):
    x, layout = _arranged(x, steps, inv_tau, mean)
    empty = [x.new_empty(0, dtype=state_dtype(x)) for _ in range(4)]
    return (
        layout.empty(x, x.shape[0]),
        empty[0] if inv_tau is None else torch.empty_like(inv_tau),
        empty[1] if membrane is None else layout.empty_frame(x, membrane.dtype),
        empty[2] if mean is None else torch.empty_like(mean),
        empty[3] if mean is None else torch.empty_like(mean),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, steps, neuron, inv_tau, membrane, keep_membrane, _, *norm, of_batch, scheduled, group = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, inv_tau, membrane, *norm, scheduled)
    ctx.steps, ctx.neuron, ctx.keep_membrane, ctx.of_batch, ctx.group = steps, neuron, keep_membrane, of_batch, group
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    x, inv_tau, membrane, mean, inv_std, weight, bias, scheduled = ctx.saved_tensors
    if not ctx.keep_membrane:
        grad_last = None
    if torch.is_grad_enabled():
        with torch.enable_grad():
            frames = normalized(x, mean, inv_std, weight, bias, ctx.of_batch, ctx.group)
            spec = _spec(ctx.neuron, scheduled)
            spec = spec if inv_tau is None else spec._replace(inv_tau=inv_tau)
            outputs = lif_reference(frames.expand(ctx.steps, *x.shape[1:]), spec, membrane)
        found = gradients_of_equations(outputs, (x, inv_tau, membrane, weight, bias), (grad, grad_last))
        of_x, of_inv_tau, of_membrane, of_weight, of_bias = found
        return of_x, None, None, of_inv_tau, of_membrane, *[None] * 4, of_weight, of_bias, None, None, None
    of_x, of_inv_tau, of_membrane, of_weight, of_bias = lif_backward_op(
        *(grad, grad_last, x, ctx.steps, ctx.neuron, inv_tau, membrane, mean, inv_std, weight, bias, ctx.of_batch),
        scheduled,
        ctx.group,
    )
    given = (
        None if of is None else gradient
        for of, gradient in ((inv_tau, of_inv_tau), (membrane, of_membrane), (weight, of_weight), (bias, of_bias))
    )
    of_inv_tau, of_membrane, of_weight, of_bias = given
    return of_x, None, None, of_inv_tau, of_membrane, *[None] * 4, of_weight, of_bias, None, None, None


lif_op.register_autograd(_gradients, keep=_keep_inputs)


def normalized(
    x: Tensor,
    mean: Tensor | None,
    inv_std: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    of_batch: bool,
    group: str = "",
) -> Tensor:
    """`(x - mean) * inv_std * weight + bias` per channel, with mean and inv_std as functions of x; x if mean is `None`.

    In the state's dtype if there is a mean. Raises `RuntimeError` for a batch of several processes.
    """
    if mean is None or inv_std is None:
        return x
    if group:
        raise RuntimeError(
            "gradients of gradients (create_graph=True) end at a norm whose batch is that of several processes; use "
            "nn.BatchNorm2d, or take them in one process"
        )
    x = x.to(state_dtype(x))
    if of_batch:
        axes = [axis for axis in range(x.ndim) if axis != 2]
        variance, batch_mean = torch.var_mean(x, axes, correction=0)
        eps = inv_std.detach() ** -2 - variance.detach()
        mean, inv_std = batch_mean, (variance + eps).rsqrt()
    scale = inv_std if weight is None else inv_std * weight
    shape = (-1, *[1] * (x.ndim - 3))
    result = (x - mean.view(shape)) * scale.view(shape)
    return result if bias is None else result + bias.view(shape)


def gradients_of_equations(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], arriving: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the inputs, computed by functions that can be differentiated again, which kernels cannot.

    The first call warns of it.
    """
    fall_back("gradients of gradients (create_graph=True) are computed from the equations")
    wanted = [i for i, value in enumerate(inputs) if value is not None and value.requires_grad]
    pairs = [(out, grad) for out, grad in zip(outputs, arriving, strict=True) if grad is not None and out.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if wanted and pairs:
        of, grads = zip(*pairs, strict=True)
        given = [inputs[i] for i in wanted]
        gradients = torch.autograd.grad(of, given, grads, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
        for i, gradient in zip(wanted, gradients, strict=True):
            found[i] = gradient
    return found


def _arranged(x: Tensor, steps: int, inv_tau: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Layout]:
    return arrange(x, steps, per_channel=mean is not None or (inv_tau is not None and inv_tau.ndim == 1))


def _spec(neuron: Sequence[float], scheduled: Tensor | None) -> NeuronSpec:
    spec = NeuronSpec.decode(neuron)
    if scheduled is None:
        return spec
    assert isinstance(spec.surrogate, Surrogate)
    alpha, inv_tau = scheduled.tolist()
    return spec._replace(surrogate=Surrogate(spec.surrogate.kind, alpha), inv_tau=inv_tau)


def _affine(
    mean: Tensor | None,
    inv_std: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    of_batch: bool,
    group: str,
) -> Affine | None:
    return None if mean is None or inv_std is None else Affine.of_one(mean, inv_std, weight, bias, of_batch, group)
