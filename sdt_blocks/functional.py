"""How the blocks' layers are joined over time: the seam where fused versions come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .neuron import LIF, ParametricLIF
from .ops import attend, batch_norm_lif, max_pool
from .ops.bits import SpikesAsBits, are_spikes, as_spikes
from .ops.dispatch import fused
from .surrogate import Surrogate

NEURONS = (LIF, ParametricLIF)


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Applies a module for `[N, C, H, W]` to every frame of x `[T, B, C, H, W]`; spikes its gradient keeps as bits."""
    if not are_spikes(x):
        frames: Tensor = module(x.flatten(0, 1))
    else:
        with SpikesAsBits(x, _autocast_dtype(module, x)) as spikes:
            frames = module(spikes.flatten(0, 1))
    return frames.unflatten(0, x.shape[:2])


def _autocast_dtype(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """What autocast would cast x to within a convolution; within another module nobody can know."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64 or not is_plain(module, nn.Conv2d):
        return None
    return torch.get_autocast_dtype(x.device.type)


def normalize_and_fire(norm: nn.Module, neuron: nn.Module, x: Tensor, time_steps: int | None = None) -> Tensor:
    """`neuron(norm(x))` for x `[T, B, C, H, W]`; with `time_steps`, x `[1, B, C, H, W]` is shown at every step.

    One fused op does both where `norm` is an `nn.BatchNorm2d`, `neuron` one of the kit's and neither has a hook.
    """
    if _fusible(norm, neuron, x):
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(neuron, LIF)
        training = norm.training or norm.running_mean is None
        return batch_norm_lif(
            x, **_norm_arguments(norm), **_neuron_arguments(neuron), training=training, time_steps=time_steps
        )
    repeated = time_steps is not None and time_steps != x.shape[0]
    spikes: Tensor = neuron(repeat_frame(norm, x, time_steps or 1) if repeated else per_frame(norm, x))
    return spikes


def fused_attention(
    norms: Sequence[nn.Module], neurons: Sequence[nn.Module], x: Sequence[Tensor], between: Sequence[nn.Module]
) -> Tensor | None:
    """`q * neuron(sum over tokens of k * v)`, one op with the norms and neurons of q, k and v; `None` where none fits.

    It takes what `normalize_and_fire` takes, in one mode, with nothing to see or do in the modules `between`.
    """
    idle = all(is_plain(module, nn.Identity) for module in between) and is_plain(neurons[3], *NEURONS)
    fusible = all(_fusible(norm, neuron, part) for norm, neuron, part in zip(norms, neurons, x, strict=False))
    modes = {norm.training or norm.running_mean is None for norm in norms}
    if not (idle and fusible and len(modes) == 1):
        return None
    return attend(x, [_norm_arguments(n) for n in norms], [_neuron_arguments(n) for n in neurons], training=modes.pop())


def pool_frames(pool: nn.Module, x: Tensor) -> Tensor:
    """`per_frame(pool, x)`, by the fused op where `pool` is the 3x3 maximum of stride 2."""
    if is_plain(pool, nn.Identity):
        return x
    if is_plain(pool, nn.MaxPool2d):
        settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
        if settings == (3, 2, 1, 1, False, False):
            return as_spikes(max_pool(x.flatten(0, 1)).unflatten(0, x.shape[:2]), x)
    return per_frame(pool, x)


def repeat_frame(norm: Any, x: Tensor, time_steps: int) -> Tensor:
    """`norm` of the frame x `[1, B, C, H, W]` as if it came at every step: a view `[time_steps, B, C, H, W]`.

    Mean and biased variance of a repeated batch are those of the batch; the running variance alone depends on the
    number of repetitions, by its factor n / (n - 1), and is set to what the repeated batch would give.
    """
    variance = getattr(norm, "running_var", None)
    before = variance.clone() if norm.training and variance is not None else None
    y = per_frame(norm, x)
    if before is not None:
        n = x.numel() // x.shape[2]
        total = n * time_steps
        with torch.no_grad():
            momentum = norm.momentum if norm.momentum is not None else 1 / int(norm.num_batches_tracked)
            new = norm.running_var - (1 - momentum) * before
            # `.data`: autograd has noted the buffer's version, though the backward of a training pass never reads it.
            norm.running_var.data.sub_(new * (1 - (n - 1) / n * total / (total - 1)))
    return y.expand(time_steps, *y.shape[1:])


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module does what one of `types` does and nothing more: no subclass, no hook, no replaced forward."""
    everywhere = nn.modules.module
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        everywhere._global_forward_hooks,
        everywhere._global_forward_pre_hooks,
        everywhere._global_backward_hooks,
        everywhere._global_backward_pre_hooks,
    )
    return type(module) in types and not any(hooks) and "forward" not in module.__dict__


def _fusible(norm: nn.Module, neuron: nn.Module, x: Tensor) -> bool:
    if not (fused(x, even_traced=norm.training) and is_plain(norm, nn.BatchNorm2d) and is_plain(neuron, *NEURONS)):
        return False
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(neuron, LIF)
    return isinstance(neuron.surrogate, Surrogate) and x.shape[2] == norm.num_features < x.numel()


def _norm_arguments(norm: Any) -> dict[str, Any]:
    """What the fused ops are told of an `nn.BatchNorm2d`, which counts the batch."""
    momentum = norm.momentum or 0.0
    tracked = norm.track_running_stats or not norm.training
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / int(norm.num_batches_tracked)
    return {
        "running_mean": norm.running_mean if tracked else None,
        "running_var": norm.running_var if tracked else None,
        "weight": norm.weight,
        "bias": norm.bias,
        "momentum": momentum,
        "eps": norm.eps,
    }


def _neuron_arguments(neuron: Any) -> dict[str, Any]:
    return {
        "inv_tau": neuron.inv_tau,
        "threshold": neuron.threshold,
        "reset": neuron.reset_mechanism,
        "surrogate": neuron.surrogate,
        "detach_reset": neuron.detach_reset,
        "strict": neuron.strict,
    }


def check_sequence(x: Tensor, channels: int, owner: str) -> None:
    """Raises `ValueError` unless x is `[T, B, channels, H, W]` with T >= 1."""
    if x.ndim != 5 or x.shape[2] != channels or x.shape[0] == 0:
        raise ValueError(f"{owner} expects [T, B, {channels}, H, W] with T >= 1, got {list(x.shape)}")


def check_multiple(value: int, of: int, what: str) -> None:
    """Raises `ValueError` unless value is a positive multiple of `of`."""
    if value < 1 or value % of:
        raise ValueError(f"{what} must be a positive multiple of {of}, got {value}")
