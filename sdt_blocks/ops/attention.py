"""Spike-driven self-attention as one op: norms and neurons of q, k and v, the sum over tokens, its neuron, the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .bits import as_spikes, wants_bits
from .dispatch import kernels
from .lif import constants, gradients_of_equations, gradients_of_norm, lif, lif_gradients, lif_reference, normalized
from .norm_lif import batch_norm_lif, batch_norm_lif_reference, fused_behind, stacked_statistics
from .registered import registered
from .spec import (
    MOST_TOKENS,
    Affine,
    Arriving,
    Layout,
    Masks,
    NeuronSpec,
    Norm,
    Spikes,
    arrange,
    channels_last,
    schedule_of,
    state_dtype,
)


def attend_reference(x: Sequence[Tensor], norms: Sequence[Norm], neurons: Sequence[NeuronSpec]) -> Tensor:
    """`q * LIF(sum over tokens of k * v)` with q, k, v = LIF(BN(x)), for x three tensors `[T, B, C, ...]`.

    `norms` and `neurons` are those of q, k and v, `neurons` with a fourth for the sum. The sums are in float32 or
    better. Returns spikes `[T, B, C, ...]`.
    """
    return _compose(batch_norm_lif_reference, _spikes_of_reference, x, norms, neurons)


def attend(x: Sequence[Tensor], norms: Sequence[Norm], neurons: Sequence[NeuronSpec]) -> Tensor:
    """Compute `attend_reference` in one pass over x.

    For the backward pass it keeps x, and one byte per token and channel with the spikes of q, k and v. In training it
    stays one op under `torch.compile` too; in evaluation it is traced as its equations. If q, k and v have different
    neurons (in a graph: neurons that a schedule changes), norms in different modes or more than `MOST_TOKENS` tokens,
    each norm is fused with its neurons separately.

    Raises `ValueError` for what `fused_behind` and `lif` refuse.

    >>> x = [torch.randn(4, 2, 8, 5, 5) for _ in range(3)]
    >>> neurons = [NeuronSpec(threshold) for threshold in (1.0, 1.0, 1.0, 0.5)]
    >>> attend(x, [Norm(training=True)] * 3, neurons).shape
    torch.Size([4, 2, 8, 5, 5])
    """
    q, training = x[0], norms[0].training
    specs = [constants(neuron, q.shape[2:3]) for neuron in neurons]
    runs = [fused_behind(part, norm) for part, norm in zip(x, norms, strict=True)]
    alike = specs[0] == specs[1] == specs[2] and all(part.shape == q.shape and part.dtype == q.dtype for part in x)
    alike = alike and len({(norm.training, norm.weight is None, norm.bias is None, norm.group) for norm in norms}) == 1
    alike = alike and not any(schedule_of(neuron) is not None for neuron in neurons)
    fits = alike and q.numel() <= MOST_TOKENS * q.shape[:3].numel()
    if None in specs or not fits or not all(runs):
        return _compose(batch_norm_lif, lif, x, norms, neurons)
    mean, inv_std = stacked_statistics(x, norms)
    parameters = [norm.weight for norm in norms] + [norm.bias for norm in norms]
    parameters = [None if value is None else value.to(mean.dtype) for value in parameters]
    taus = [neuron.inv_tau for neuron in neurons]
    inv_tau = None
    if any(isinstance(tau, Tensor) for tau in taus):
        inv_tau = _stack_taus(taus, mean[0])
    numbers = [number for spec in specs if spec is not None for number in spec.encode()]
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in (*x, *parameters, inv_tau))
    keep = torch.is_grad_enabled() and differentiable
    keep_bits = wants_bits(*x, *parameters, inv_tau)
    masked, _, _, bits = attend_op(
        *x, numbers, inv_tau, mean, inv_std, *parameters, training, keep, keep_bits, norms[0].group
    )
    return as_spikes(masked, bits=bits)


def _compose(
    batch_norm_lif: Callable[..., Tensor],
    lif: Callable[..., Any],
    x: Sequence[Tensor],
    norms: Sequence[Norm],
    neurons: Sequence[NeuronSpec],
) -> Tensor:
    q, k, v = (batch_norm_lif(part, norm, neuron) for part, norm, neuron in zip(x, norms, neurons[:3], strict=True))
    tokens = tuple(range(3, q.ndim))
    mask: Tensor = lif((k * v).sum(tokens, keepdim=True, dtype=state_dtype(q)), neurons[3])
    return as_spikes(q * mask.to(q.dtype), q, mask)


def _spikes_of_reference(x: Tensor, neuron: NeuronSpec) -> Tensor:
    return lif_reference(x, neuron)[0]


# The schemas of registered ops are flat, as in `lif`.


@registered("sdt_blocks::attend")
def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neurons: Sequence[float],
    inv_tau: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_v: Tensor | None,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    of_batch: bool,
    keep: bool,
    keep_bits: bool = False,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The masked spikes; the codes of q, k and v, empty unless a gradient will need them; sums and mask; and the bits.

    The bits are those of the masked spikes, see `Layout.empty_bits`; they are empty unless `keep_bits`.

    `neurons` are four encoded `NeuronSpec`; inv_tau `[4, C]`; mean and inv_std `[3, C]`, weights and biases `[C]`, all
    or none.
    """
    (q, k, v), layout = _arranged(q, k, v)
    norm = _affine(mean, inv_std, (weight_q, weight_k, weight_v, bias_q, bias_k, bias_v), of_batch, group)
    masked, codes, sums, bits = _results(q, layout, keep, keep_bits)
    out = Spikes(masked, bits if bits.numel() else None)
    kernels(q).attend((q, k, v), out, codes if keep else None, sums, layout, _specs(neurons), norm, inv_tau)
    return masked, codes, sums, bits


@attend_op.register_fake
def _(q, k, v, neurons, inv_tau, mean, inv_std, wq, wk, wv, bq, bk, bv, of_batch, keep, keep_bits=False, group=""):
    (q, _, _), layout = _arranged(q, k, v)
    return _results(q, layout, keep, keep_bits)


@registered("sdt_blocks::attend_backward")
def attend_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Tensor,
    sums: Tensor,
    neurons: Sequence[float],
    inv_tau: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_v: Tensor | None,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    of_batch: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, inv_tau (empty if not given), and weight and bias `[3, C]`."""
    x, layout = _arranged(q, k, v)
    norm = _affine(mean, inv_std, (weight_q, weight_k, weight_v, bias_q, bias_k, bias_v), of_batch, group)
    specs, module, grad = _specs(neurons), kernels(q), layout.frames(grad)
    sums, mask = sums.unbind()
    of_mask = torch.empty_like(sums)
    module.mask_gradient(grad, codes, of_mask, layout)
    sums, channels = arrange(sums, layout.steps, per_channel=True)
    of_its_tau = None if inv_tau is None else inv_tau[3]
    of_sums, of_tau, *_ = lif_gradients(Arriving(of_mask), sums, channels, specs[3], None, of_its_tau, None)
    of_x, found = module.attend_backward(grad, Masks(mask, of_sums, codes), x, layout, specs, norm, inv_tau)
    of_weight, of_bias = gradients_of_norm(of_x, x, layout, norm, found)
    of_q, of_k, of_v = of_x
    of_inv_tau = mean.new_empty(0)
    if of_tau is not None:
        of_inv_tau = torch.cat([found[:, 0].sum(1, dtype=torch.float64).to(of_tau), of_tau[None]])
    return of_q, of_k, of_v, of_inv_tau, of_weight, of_bias


@attend_backward_op.register_fake
def _(grad, q, k, v, codes, sums, neurons, inv_tau, mean, *others):
    x, layout = _arranged(q, k, v)
    of_x = (layout.empty(part, layout.steps) for part in x)
    of_inv_tau = mean.new_empty(0) if inv_tau is None else torch.empty_like(inv_tau)
    return *of_x, of_inv_tau, torch.empty_like(mean), torch.empty_like(mean)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, neurons, inv_tau, mean, inv_std, *parameters, of_batch, _, _, group = inputs
    _, codes, sums, bits = output
    ctx.save_for_backward(q, k, v, codes, sums, inv_tau, mean, inv_std, *parameters)
    ctx.neurons, ctx.of_batch, ctx.group = neurons, of_batch, group
    ctx.mark_non_differentiable(codes, sums, bits)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, codes, sums, inv_tau, *norm = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (q, k, v, inv_tau, *norm[2:])
        with torch.enable_grad():
            masked = _equations((q, k, v), _specs(ctx.neurons), inv_tau, norm, ctx.of_batch, ctx.group)
        found = gradients_of_equations((masked,), inputs, (grad,))
        return *found[:3], None, found[3], None, None, *found[4:], None, None, None, None
    *of_x, of_inv_tau, of_weight, of_bias = attend_backward_op(
        grad, q, k, v, codes, sums, ctx.neurons, inv_tau, *norm, ctx.of_batch, ctx.group
    )
    rows = (*of_weight.unbind(), *of_bias.unbind())
    of_norms = (None if value is None else row for value, row in zip(norm[2:], rows, strict=True))
    return *of_x, None, None if inv_tau is None else of_inv_tau, None, None, *of_norms, None, None, None, None


attend_op.register_autograd(_gradients, keep=_keep)


def _equations(
    x: Sequence[Tensor],
    specs: Sequence[NeuronSpec],
    inv_tau: Tensor | None,
    norm: Sequence[Any],
    of_batch: bool,
    group: str,
) -> Tensor:
    """The masked spikes, computed from the op's arguments by its equations."""
    if inv_tau is not None:
        specs = [spec._replace(inv_tau=inv_tau[i]) for i, spec in enumerate(specs)]
    mean, inv_std, *parameters = norm
    frames = [
        normalized(x[i], mean[i], inv_std[i], parameters[i], parameters[3 + i], of_batch, group) for i in range(3)
    ]
    q, k, v = (lif_reference(part, spec)[0] for part, spec in zip(frames, specs[:3], strict=True))
    mask = lif_reference((k * v).sum(tuple(range(3, q.ndim)), keepdim=True), specs[3])[0]
    return (q * mask).to(x[0].dtype)


def _arranged(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Layout]:
    """q, k and v in one memory order, images outermost, copied if they are in another one."""
    order = (0, 1, *range(3, q.ndim), 2) if channels_last(q) else tuple(range(q.ndim))
    back = [order.index(axis) for axis in range(q.ndim)]
    q, k, v = (part.permute(order).contiguous().permute(back) for part in (q, k, v))
    q, layout = arrange(q, q.shape[0], per_channel=True)
    return (q, k, v), layout


def _results(q: Tensor, layout: Layout, keep: bool, keep_bits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = layout.empty(q, layout.steps, torch.uint8) if keep else q.new_empty(0, dtype=torch.uint8)
    sums = q.new_empty(2, *q.shape[:3], dtype=state_dtype(q))
    return layout.empty(q, layout.steps), codes, sums, layout.empty_bits(q, keep_bits)


def _specs(neurons: Sequence[float]) -> list[NeuronSpec]:
    length = len(neurons) // 4
    return [NeuronSpec.decode(neurons[i * length : (i + 1) * length]) for i in range(4)]


def _affine(mean: Tensor, inv_std: Tensor, parameters: Sequence[Tensor | None], of_batch: bool, group: str) -> Affine:
    weights, biases = ([value for value in values if value is not None] for values in (parameters[:3], parameters[3:]))
    return Affine(mean, inv_std, weights or None, biases or None, of_batch, group)


def _stack_taus(taus: Sequence[float | Tensor], like: Tensor) -> Tensor:
    # A number is filled in on its device: a copy from the host would be waited for.
    filled = (tau.to(like) if isinstance(tau, Tensor) else like.new_full((), tau) for tau in taus)
    return torch.stack([tau.expand_as(like) for tau in filled])
