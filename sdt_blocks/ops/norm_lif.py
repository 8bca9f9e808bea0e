"""Batch normalization and the neurons behind it, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import as_spikes, wants_bits
from .dispatch import fused, kernels
from .lif import constants, lif_op, lif_reference
from .processes import merged_statistics
from .registered import registered, watched
from .spec import NeuronSpec, Norm, arrange, check_membrane, schedule_of, state_dtype


def batch_norm_lif_reference(
    x: Tensor,
    norm: Norm,
    neuron: NeuronSpec,
    membrane: Tensor | None = None,
    *,
    time_steps: int | None = None,
    return_membrane: bool = False,
) -> Any:
    """`lif(F.batch_norm(x, ...), neuron)` of the frames x `[T, B, C, ...]`, with the arguments in `norm`.

    With `time_steps`, x `[1, B, C, ...]` is shown at every step.
    """
    result = lif_reference(batch_norm_reference(x, norm, time_steps), neuron, membrane)
    return result if return_membrane else result[0]


def batch_norm_reference(x: Tensor, norm: Norm, time_steps: int | None = None) -> Tensor:
    """`F.batch_norm` of the frames x `[T, B, C, ...]`, or x `[1, B, C, ...]` shown at every step."""
    if time_steps is not None:
        x = x.expand(time_steps, *x.shape[1:])
    if norm.group:
        raise ValueError("a batch of several processes has no reference here; call nn.SyncBatchNorm instead")
    norm.count_batch()
    settings: list[Any] = [*norm._replace(momentum=float(norm.momentum))]
    return F.batch_norm(x.flatten(0, 1), *settings[:-2]).unflatten(0, x.shape[:2])


def batch_norm_lif(
    x: Tensor,
    norm: Norm,
    neuron: NeuronSpec,
    membrane: Tensor | None = None,
    *,
    time_steps: int | None = None,
    return_membrane: bool = False,
) -> Any:
    """Compute `batch_norm_lif_reference`, keeping only x for the backward pass.

    With the statistics of the batch it stays one op under `torch.compile` too, where its own equations would keep three
    times as much; with running statistics it is traced as its equations.

    Raises `ValueError` for what `fused_behind` and `lif` refuse.

    >>> x = torch.randn(4, 2, 8, 5, 5)
    >>> batch_norm_lif(x, Norm(training=True), NeuronSpec(threshold=1.0, inv_tau=0.5)).shape
    torch.Size([4, 2, 8, 5, 5])
    """
    runs, spec = fused_behind(x, norm, time_steps), constants(neuron, x.shape[2:3])
    check_membrane(membrane, x)
    if spec is None or not runs:
        return batch_norm_lif_reference(
            x, norm, neuron, membrane, time_steps=time_steps, return_membrane=return_membrane
        )
    steps = time_steps or x.shape[0]
    dtype = state_dtype(x)
    mean, inv_std = statistics(x, norm, steps // x.shape[0])
    spikes, last, bits = lif_op(
        x,
        steps,
        spec.encode(),
        neuron.inv_tau.to(dtype) if isinstance(neuron.inv_tau, Tensor) else None,
        None if membrane is None else membrane.to(dtype),
        return_membrane,
        wants_bits(x, neuron.inv_tau, membrane, norm.weight, norm.bias),
        mean.to(dtype),
        inv_std.to(dtype),
        None if norm.weight is None else norm.weight.to(dtype),
        None if norm.bias is None else norm.bias.to(dtype),
        norm.training,
        schedule_of(neuron),
        norm.group,
    )
    as_spikes(spikes, bits=bits)
    return (spikes, last) if return_membrane else spikes


def fused_behind(x: Tensor, norm: Norm, time_steps: int | None = None) -> bool:
    """Whether a fused kernel runs for the frames x `[T, B, C, ...]` behind a norm, otherwise its equations.

    These decide about a single value per channel, which has no variance; with a batch of several processes each may
    have just one.

    Raises `ValueError` for frames without channels, for several frames that `time_steps` does not count, and for a norm
    of other channels.
    """
    if x.ndim < 3:
        raise ValueError(f"a batch normalization takes frames [T, B, C, ...], got {list(x.shape)}")
    if time_steps is not None and x.shape[0] not in (1, time_steps):
        raise ValueError(f"time_steps={time_steps} shows one frame [1, B, C, ...] repeatedly, got {list(x.shape)}")
    of_channels = ("running_mean", norm.running_mean), ("running_var", norm.running_var)
    for name, value in (*of_channels, ("weight", norm.weight), ("bias", norm.bias)):
        if value is not None and value.shape != x.shape[2:3]:
            raise ValueError(
                f"{name} must have one value for each of the {x.shape[2]} channels, got {list(value.shape)}"
            )
    alone = norm.training and not norm.group
    return x.numel() > (x.shape[2] if alone else 0) and fused(x, even_traced=norm.training)


@torch.no_grad()
def statistics(x: Tensor, norm: Norm, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation for normalization; training also updates running statistics and counts the batch."""
    if fill := _at_once(x, norm):
        mean, inv_std = (x.new_empty(x.shape[2], dtype=state_dtype(x)) for _ in range(2))
        x, layout = arrange(x, x.shape[0], per_channel=True)
        fill([x], layout, [norm], repeats, mean, inv_std)
        return mean, inv_std
    if not norm.training:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("evaluation needs running_mean and running_var; give both, or training=True")
        return norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    return _of_batch([x], [norm], repeats)[0]


def _of_batch(x: Sequence[Tensor], norms: Sequence[Norm], repeats: int) -> list[tuple[Tensor, Tensor]]:
    """`statistics` of inputs of one shape, for norms that train in one group of processes, with one exchange."""
    found, count, group = [channel_statistics(part) for part in x], x[0].numel() // x[0].shape[2], norms[0].group
    number: Any = count
    if group:
        means, variances = (torch.stack(values) for values in zip(*found, strict=True))
        means, variances, number = merged_statistics(means, variances, count, group)
        found = list(zip(means, variances, strict=True))
    for norm, (mean, variance) in zip(norms, found, strict=True):
        _update(norm, mean, variance, number * repeats)
    return [(mean, (variance + norm.eps).rsqrt()) for norm, (mean, variance) in zip(norms, found, strict=True)]


def _update(norm: Norm, mean: Tensor, variance: Tensor, count: Any) -> None:
    """Count the batch, with `count` values per channel, and update the running statistics.

    A frame that is shown repeatedly changes only the unbiased variance.
    """
    norm.count_batch()
    if norm.running_mean is not None and norm.running_var is not None:
        dtype, momentum = norm.running_mean.dtype, norm.momentum
        share: Any = momentum.to(dtype) if isinstance(momentum, Tensor) else momentum
        norm.running_mean.lerp_(mean.to(dtype), share)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(dtype), share)


@torch.no_grad()
def stacked_statistics(x: Sequence[Tensor], norms: Sequence[Norm]) -> tuple[Tensor, Tensor]:
    """`statistics` of three inputs, `[3, C]`, in the state's dtype; their norms are in one mode and one group."""
    dtype = state_dtype(x[0])
    if fill := _at_once(x[0], *norms):
        mean, inv_std = (x[0].new_empty(len(x), x[0].shape[2], dtype=dtype) for _ in range(2))
        parts, layouts = zip(*(arrange(part, len(part), per_channel=True) for part in x), strict=True)
        if layouts[0] == layouts[1] == layouts[2] and _settled_alike(norms):
            fill(parts, layouts[0], norms, 1, mean, inv_std)
        else:
            for i, part in enumerate(parts):
                fill([part], layouts[i], [norms[i]], 1, mean[i], inv_std[i])
        return mean, inv_std
    training = all(norm.training for norm in norms)
    found = (
        _of_batch(x, norms, 1) if training else [statistics(part, norm) for part, norm in zip(x, norms, strict=True)]
    )
    mean, inv_std = (torch.stack(values).to(dtype) for values in zip(*found, strict=True))
    return mean, inv_std


def _settled_alike(norms: Sequence[Norm]) -> bool:
    """Whether norms differ in their tensors only, and no two of them change the same one."""
    settings = {(norm.momentum, norm.eps, norm.batches is None) for norm in norms}
    means = {id(norm.running_mean): norm.running_mean.dtype for norm in norms if norm.running_mean is not None}
    return len(settings) == 1 and len(means) in (0, len(norms)) and len(set(means.values())) <= 1


def _at_once(x: Tensor, *norms: Norm) -> Callable[..., None] | None:
    """The kernels' `batch_statistics`, unless something has to see the single steps."""
    plain = all(norm.training and not isinstance(norm.momentum, Tensor) and not norm.group for norm in norms)
    return kernels(x).batch_statistics if plain and not watched() else None


@registered("sdt_blocks::channel_statistics")
def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[C]` of every channel of x `[T, B, C, ...]`, in float32 or better."""
    x, layout = arrange(x, x.shape[0], per_channel=True)
    mean, variance = kernels(x).channel_statistics(x, layout)
    return mean, variance


@channel_statistics.register_fake
def _(x):
    return x.new_empty(x.shape[2], dtype=torch.float64), x.new_empty(x.shape[2], dtype=torch.float64)
