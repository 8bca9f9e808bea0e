"""The steps that a block's `forward` is made of: each is one fused op in training and one node of an inference plan.

A block calls these, `+` and its submodules, and branches only on its settings, never on a tensor. In training every
step is eager Python. `torch.fx` tracing records a step with the leaves that it was given (units, neurons, mixers,
poolings), which have folded and event-driven forms of their own; see `sdt_blocks.inference`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .checks import check_number
from .neuron import LIF, IntegerNeuron, remembers, spikes_of
from .ops import Norm, attend, batch_norm_levels, batch_norm_lif, max_pool
from .ops.batch_norm import batch_norm
from .ops.bits import SpikesAsBits, are_spikes, as_spikes, bits_of
from .ops.convolution import convolve_spikes, depthwise_convolution, has_own_gradient
from .ops.dispatch import fall_back, fused
from .ops.processes import gathered
from .surrogate import Scheduled, Surrogate, constant_in_graphs, transformed

Function = TypeVar("Function", bound=Callable[..., Any])


def step(function: Function) -> Function:
    """Marks a function of modules and tensors as a step: tracing records the call and does not enter it."""

    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, fx.Proxy):
                given = _by_name(argument.tracer, signature.bind(*args, **kwargs).args)
                return argument.tracer.create_proxy("call_function", call, given, {})
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _by_name(tracer: Any, given: tuple[Any, ...]) -> Any:
    """The arguments of a traced step; modules are replaced by their names unless the tracer takes modules."""

    def named(value: Any) -> Any:
        if not isinstance(value, nn.Module):
            return value
        return tracer.create_proxy("get_attr", tracer.path_of_module(value), (), {})

    return given if getattr(tracer, "takes_modules", False) else fx.node.map_aggregate(given, named)


class Unit(nn.Module):
    """Weights followed by a batch normalization, on frames: `norm(conv(x))`.

    `conv` is linear and `norm` an `nn.BatchNorm2d`, so that training can fuse the norm with the neuron that follows.
    For inference, `kernel` and `chain` give `conv` as plain convolutions.

    Shapes: `[N, C, H, W] -> [N, C', H', W']`.
    """

    conv: nn.Module
    norm: nn.Module

    def forward(self, frames: Tensor) -> Tensor:
        normalized: Tensor = self.norm(self.conv(frames))
        return normalized

    def kernel(self) -> nn.Conv2d | None:
        """`conv` as one convolution; `None` if it is not one, or if its layers are not those that the unit built."""
        return self.conv if isinstance(self.conv, nn.Conv2d) else None

    def chain(self) -> list[nn.Conv2d] | None:
        """`conv` as a chain of convolutions in eval mode; `None` if it is a single one, or no such chain."""
        if type(self.conv) is not nn.Sequential:
            return None
        layers: Any = list(self.conv)
        return layers if all(type(layer) is nn.Conv2d for layer in layers) else None


# ---- the steps


@step
def present(x: Tensor, time_steps: int, channels: int) -> Tensor:
    """A sequence `[T, B, C, H, W]`: images `[B, C, H, W]` shown at every step, or frames `[B, T, C, H, W]`, any T >= 1.

    Raises `ValueError` unless x has `channels` channels and no empty axis, `TypeError` for integer tensors.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor of images or frames, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"expected images or frames in floating point, got {x.dtype}: scale them as in training")
    if x.ndim not in (4, 5) or x.shape[-3] != channels or 0 in x.shape:
        raise ValueError(
            f"expected images [B, {channels}, H, W] or frames [B, T, {channels}, H, W], got {list(x.shape)}"
        )
    return x.expand(time_steps, *x.shape) if x.ndim == 4 else x.transpose(0, 1)


@step
def check_sequence(x: Tensor, channels: int, owner: str) -> None:
    """Raises `ValueError` unless x is `[T, B, channels, H, W]` without an empty axis.

    Raises `TypeError` for anything but a tensor in floating point.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner} expects a tensor [T, B, {channels}, H, W], got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{owner} expects [T, B, {channels}, H, W] in floating point, got {x.dtype}")
    if x.ndim != 5 or x.shape[2] != channels or 0 in x.shape:
        raise ValueError(f"{owner} expects [T, B, {channels}, H, W] with T >= 1 and nothing empty, got {list(x.shape)}")


@step
def project(unit: Any, x: Tensor) -> Tensor:
    """`unit(frame)` for every frame of x `[T, B, C, H, W]`: a membrane `[T, B, C', H', W']`.

    `unit` is a `Unit`, or any module for `[N, C, H, W]`. Spikes are kept for the gradient at one bit each.
    """
    if not is_unit(unit):
        _tell_unfused(unit)
        y = per_frame(unit, shown_frame(x) if _treats_alike(unit, nn.Conv2d) else x)
        return shown(y, len(x))
    return normalize(unit.norm, _convolve(unit, x), len(x))


@step
def fire(neuron: nn.Module, membrane: Tensor) -> Tensor:
    """Spikes `[T, ...]` of a membrane `[T, ...]`.

    Raises `TypeError` for a neuron that takes single steps, or keeps a state from one call to the next.
    """
    if remembers(neuron):
        name = type(neuron).__name__
        raise TypeError(
            f"{name} remembers its last call, and may take one time step where a sequence [T, ...] is given: "
            f"put over_time({name}(...)) in its place"
        )
    return spikes_of(neuron(membrane), type(neuron).__name__)


@step
def project_and_fire(unit: Any, neuron: nn.Module, x: Tensor) -> Tensor:
    """`fire(neuron, project(unit, x))`, with the unit's norm and the neuron as one op."""
    if not is_unit(unit):
        return fire(neuron, project(unit, x))
    return normalize_and_fire(unit.norm, neuron, _convolve(unit, x), len(x))


@step
def project_and_mix(units: Sequence[Any], neurons: Sequence[nn.Module], mixer: Any, spikes: Tensor) -> Tensor:
    """`mixer(*(project_and_fire(unit, neuron, spikes) ...))`: q, k and v, and the attention's mixing of them.

    If the mixer has `fused(norms, neurons, x)`, it gets the outputs x of the units' convolutions and computes all of it
    as one op, or returns `None` if it cannot. A mixer with a hook, or with a forward that its `fused` does not know, is
    called instead.
    """
    mixed = None
    if _has_fused(mixer) and all(map(is_unit, units)):
        x = [_convolve(unit, spikes) for unit in units]
        mixed = mixer.fused([unit.norm for unit in units], neurons, x) if len(x[0]) == len(spikes) else None
        fired = (
            normalize_and_fire(unit.norm, neuron, part, len(spikes))
            for unit, neuron, part in zip(units, neurons, x, strict=True)
        )
    else:
        _tell_unfused(mixer)
        fired = (project_and_fire(unit, neuron, spikes) for unit, neuron in zip(units, neurons, strict=True))
    result: Tensor = mixer(*fired) if mixed is None else mixed
    return result


@step
def pool(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(frame)` for every frame of x `[T, B, C, H, W]`; the 3x3 maximum of stride 2 is a fused op."""
    if is_plain(layer, nn.Identity):
        return x
    frames = shown_frame(x) if _treats_alike(layer, nn.MaxPool2d, nn.AvgPool2d) else x
    if not halves(layer):
        return shown(per_frame(layer, frames), len(x))
    pooled = max_pool(frames.flatten(0, 1), spikes=are_spikes(x))
    return shown(as_spikes(pooled.unflatten(0, frames.shape[:2]), x, bits=bits_of(pooled)), len(x))


@step
def shortcut(membrane: Tensor, change: Tensor, drop_path: float = 0.0) -> Tensor:
    """`membrane + change`, both `[T, B, ...]`; each sample's change is left out with the probability `drop_path`.

    Raises `ValueError` if the shapes differ, or `drop_path` is outside [0, 1).
    """
    if change.shape != membrane.shape:
        raise ValueError(
            f"the branch of a membrane shortcut must keep the shape; it made {list(change.shape)} of "
            f"{list(membrane.shape)}"
        )
    if drop_path:
        check_drop_path(drop_path)
        kept = 1 - drop_path
        mask = change.new_empty(1, change.shape[1], *[1] * (change.ndim - 2)).bernoulli_(kept).div_(kept)
        change = change * mask
    result = membrane + change
    _order_gradient(result)
    return result


# ---- what they are made of


def check_drop_path(drop_path: float) -> None:
    """Raises `TypeError` for what is no number, `ValueError` for a number outside [0, 1)."""
    check_number("drop_path", drop_path)
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is a probability in [0, 1), got {drop_path!r}")


def _order_gradient(result: Any) -> None:
    """Makes the gradient of a result continue in the result's memory order.

    The gradient of a mean over positions, or of a frame shown at every step, comes in PyTorch's default order. It would
    keep that order along all shortcuts, and the backward pass of a norm is several times slower if its inputs differ.
    """
    if torch.compiler.is_compiling() or transformed() or result.grad_fn is None:
        return
    strides = result.stride()

    def ordered(grads: tuple[Tensor | None, ...]) -> tuple[Tensor] | None:
        (grad,) = grads
        if grad is None or grad.stride() == strides:
            return None
        return (grad.new_empty_strided(grad.shape, strides).copy_(grad),)

    result.grad_fn.register_prehook(ordered)


def shown(frame: Tensor, time_steps: int) -> Tensor:
    """The frame `[1, ...]` at every step, a view `[time_steps, ...]`; frames `[time_steps, ...]` as they are."""
    if len(frame) == time_steps:
        return frame
    _order_gradient(frame)
    return frame.expand(time_steps, *frame.shape[1:])


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Applies a module for `[N, C, H, W]` to every frame of x `[T, B, C, H, W]`; its gradient keeps spikes as bits."""
    spikes = are_spikes(x)
    if not spikes or torch.compiler.is_compiling():
        frames = _through(module, x.flatten(0, 1), bits=spikes)
    else:
        with SpikesAsBits(x, dtype=_autocast_dtype(module, x)) as (kept,):
            frames = _through(module, kept.flatten(0, 1))
    return frames.unflatten(0, x.shape[:2])


def _through(module: Any, frames: Tensor, *, bits: bool = False) -> Tensor:
    """`module(frames)`; convolutions, alone or in a chain, are ops where those have a gradient of their own.

    With `bits` the frames are spikes, of which the first convolution keeps bits.
    """
    if is_sequence(module) and len(module):
        for layer in module:
            frames, bits = _through(layer, frames, bits=bits), False
        return frames
    if is_plain(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        if bits or has_own_gradient(frames, module.weight, *geometry):
            dtype = _autocast_dtype(module, frames) or frames.dtype
            bias = None if module.bias is None else module.bias.to(dtype)
            given = frames.to(dtype), module.weight.to(dtype), bias
            return convolve_spikes(*given, *geometry) if bits else depthwise_convolution(*given)
    result: Tensor = module(frames)
    return result


def _autocast_dtype(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """What autocast casts x to within a convolution or a chain of them; `None` without autocast or in other modules."""
    if isinstance(module, nn.Sequential) and not has_hooks(module) and len(module):
        return _autocast_dtype(module[0], x)
    # Meta tensors have no autocast.
    if (
        x.is_meta
        or not torch.is_autocast_enabled(x.device.type)
        or x.dtype == torch.float64
        or not is_plain(module, nn.Conv2d)
    ):
        return None
    return torch.get_autocast_dtype(x.device.type)


def normalize_and_fire(norm: nn.Module, neuron: nn.Module, x: Tensor, time_steps: int | None = None) -> Tensor:
    """`neuron(norm(x))` for x `[T, B, C, H, W]`; with `time_steps`, x `[1, B, C, H, W]` is shown at every step.

    One fused op does both if `norm` is an `nn.BatchNorm2d` or `nn.SyncBatchNorm`, `neuron` one of the kit's and neither
    has a hook. In training one warning says what prevents this.
    """
    if _fusible(norm, neuron, x):
        settings = norm_settings(norm)
        if isinstance(neuron, IntegerNeuron):
            return batch_norm_levels(x, settings, neuron.spec, time_steps=time_steps)
        assert isinstance(neuron, LIF)
        if neuron.carrier is None:
            return batch_norm_lif(x, settings, neuron.spec, time_steps=time_steps)
        before = neuron.carrier.membrane(neuron, x.shape[1:])
        spikes, last = batch_norm_lif(x, settings, neuron.spec, before, time_steps=time_steps, return_membrane=True)
        neuron.carrier.keep_state(neuron, last)
        return spikes
    return fire(neuron, normalize(norm, x, time_steps))


def normalize(norm: nn.Module, x: Tensor, time_steps: int | None = None) -> Tensor:
    """`norm` of the frames of x `[T, B, C, H, W]`; with `time_steps`, x `[1, B, C, H, W]` is shown at every step."""
    steps = time_steps or len(x)
    once = steps != len(x) and _treats_alike(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
    # A graph refuses to change the running variance again, which a norm has kept for its gradient.
    changed_twice = once and norm.training and torch.compiler.is_compiling()
    ours = changed_twice or (group_of(norm) and is_plain(norm, nn.SyncBatchNorm))
    if ours and fused(x, even_traced=True):
        return batch_norm(x, norm_settings(norm), time_steps=steps)
    if once and not changed_twice:
        return repeat_frame(norm, x, steps)
    return per_frame(norm, x if steps == len(x) else x.expand(steps, *x.shape[1:]))


def fused_attention(
    norms: Sequence[nn.Module], neurons: Sequence[Any], x: Sequence[Tensor], between: Sequence[nn.Module]
) -> Tensor | None:
    """`q * neuron(sum over tokens of k * v)`, one op with the norms and neurons of q, k and v; `None` if it cannot be.

    Norms and neurons must be such as `normalize_and_fire` fuses, and the modules `between` must do nothing.
    """
    idle = all(is_plain(module, nn.Identity) for module in between) and all(map(is_neuron, neurons))
    fusible = all(_fusible(norm, neuron, part) for norm, neuron, part in zip(norms, neurons[:3], x, strict=True))
    streamed = any(getattr(neuron, "carrier", None) is not None for neuron in neurons)
    if not (idle and fusible) or streamed:
        return None
    return attend(x, [norm_settings(norm) for norm in norms], [neuron.spec for neuron in neurons])


def repeat_frame(norm: Any, x: Tensor, time_steps: int) -> Tensor:
    """`norm` of the frame x `[1, B, C, H, W]` as if it came at every step: a view `[time_steps, B, C, H, W]`.

    Mean and biased variance of a repeated batch are those of the batch. Only the running variance depends on the number
    of repetitions, by its factor n / (n - 1), and is set to the value that the repeated batch would give.
    """
    variance = getattr(norm, "running_var", None)
    before = variance.clone() if norm.training and variance is not None else None
    y = per_frame(norm, x)
    if before is not None:
        n: Any = x.numel() // x.shape[2]
        if group := group_of(norm):
            n = gathered(torch.full_like(before[:1], n), group).sum()
        total = n * time_steps
        with torch.no_grad():
            momentum = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
            new = norm.running_var - (1 - momentum) * before
            # `.data`: autograd checks the buffer's version, although the backward of a training pass never reads it.
            norm.running_var.data.sub_(new * (1 - (n - 1) / n * total / (total - 1)))
    return shown(y, time_steps)


def _convolve(unit: Any, x: Tensor) -> Tensor:
    """`unit.conv` of every frame of x, or of the one frame `[1, B, C, H, W]` that x repeats at every step."""
    return per_frame(unit.conv, shown_frame(x) if _treats_alike(unit.conv, nn.Conv2d) else x)


def _treats_alike(layer: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether one frame can stand for identical ones: the layer is one of these types, or nothing in it is training.

    In training others may draw random numbers, and the norms within a chain have to count all frames.
    """
    return is_plain(layer, *types) or not any(part.training for part in layer.modules())


def shown_frame(x: Tensor) -> Tensor:
    """The frame `[1, ...]` if x `[T, ...]` is that frame expanded over all steps, else x."""
    return x[:1] if len(x) > 1 and x.stride(0) == 0 else x


def halves(layer: Any) -> bool:
    """Whether a layer is a plain `nn.MaxPool2d` that takes the 3x3 maximum with stride 2."""
    if not is_plain(layer, nn.MaxPool2d):
        return False
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices)
    return settings == (3, 2, 1, 1, False, False)


# ---- what a module is


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is exactly one of `types`: no subclass, no hook, no replaced forward."""
    return type(module) in types and not has_hooks(module)


def is_sequence(module: nn.Module) -> bool:
    """Whether a module is an `nn.Sequential` that only calls its layers in turn: no hook, no replaced forward."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not has_hooks(module)


def is_bare(layer: nn.Module, size: int, *, padding: int = 0, groups: int = 1) -> bool:
    """Whether a layer is a plain `nn.Conv2d` with this square kernel: stride 1, no bias, padded with zeros."""
    if type(layer) is not nn.Conv2d or layer.bias is not None or layer.padding_mode != "zeros":
        return False
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    return settings == ((size, size), (1, 1), (padding, padding), (1, 1), groups)


def is_affine(norm: nn.Module) -> bool:
    """Whether a module is a batch normalization that in eval mode is a fixed scale and shift."""
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return False
    return all(getattr(norm, name) is not None for name in ("weight", "bias", "running_var"))


def is_unit(module: nn.Module) -> bool:
    """Whether a module is a `Unit` with the forward of `Unit` and no hook on it as a whole."""
    return isinstance(module, Unit) and type(module).forward is Unit.forward and not has_hooks(module)


def is_neuron(module: nn.Module) -> bool:
    """Whether a module is a `LIF`, or of a subclass with the same forward, without a hook."""
    return isinstance(module, LIF) and type(module).forward is LIF.forward and not has_hooks(module)


def find_mixers(model: nn.Module) -> dict[str, Any]:
    """The mixers by name: modules that say what they emit and how many additions their own forward needs."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "emits") and tells(m, "additions")}


def emits_spikes(leaf: Any) -> bool:
    """Whether a leaf says that it emits zeros and ones, and no hook could change that."""
    return tells(leaf, "emits") and leaf.emits == "spikes" and not has_hooks(leaf)


def fires_spikes(neuron: Any) -> bool:
    """Whether a neuron is one of the kit's, or says that it emits zeros and ones."""
    return (isinstance(neuron, nn.Module) and is_neuron(neuron)) or emits_spikes(neuron)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does anything besides the class's own forward."""
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
    return any(hooks) or "forward" in module.__dict__ or _has_call(type(module))


@constant_in_graphs
def _has_call(kind: type) -> bool:
    """Whether a class has its own `__call__`; that of an fx.GraphModule only calls its forward."""
    return kind.__call__ is not nn.Module.__call__ and not issubclass(kind, fx.GraphModule)


def _has_fused(mixer: Any) -> bool:
    """Whether a mixer has a fused form of its forward, and no hook."""
    return tells(mixer, "fused") and not (isinstance(mixer, nn.Module) and has_hooks(mixer))


def tells(leaf: Any, name: str) -> bool:
    """Whether a leaf has an attribute that describes its forward: another form of it, or a property of its result.

    A class with its own forward does not inherit what its base classes say about theirs.
    """
    return hasattr(leaf, name) and (name in getattr(leaf, "__dict__", {}) or _tells_of_its_forward(type(leaf), name))


@constant_in_graphs
def _tells_of_its_forward(kind: type, name: str) -> bool:
    """Whether an attribute comes from the class that defines the forward, or from one derived from it."""
    lineage = kind.__mro__
    forward = next((one for one in lineage if {"forward", "__call__"} & vars(one).keys()), lineage[-1])
    return any(name in vars(one) for one in lineage[: lineage.index(forward) + 1])


def _fusible(norm: nn.Module, neuron: nn.Module, x: Tensor) -> bool:
    of_levels = is_plain(neuron, IntegerNeuron)
    known = is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm) and (of_levels or is_neuron(neuron))
    if not known:
        _tell_unfused(norm, neuron)
        return False
    assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    known = of_levels or isinstance(neuron.told_surrogate, (Surrogate, Scheduled))
    return known and x.shape[2] == norm.num_features and fused(x, even_traced=norm.training)


def _tell_unfused(*modules: Any) -> None:
    """One warning for each reason, which the user could remove, why a part of a network is trained unfused."""
    if not torch.is_grad_enabled():
        return
    for module in modules:
        if not isinstance(module, nn.Module) or not module.training:
            continue
        name = type(module).__name__
        kinds = (Unit, nn.BatchNorm2d, nn.SyncBatchNorm, LIF, IntegerNeuron)
        if has_hooks(module) and (isinstance(module, kinds) or tells(module, "fused")):
            reason = _of_hooks(name, any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__))
            fall_back(reason + (_IN_ALL if any(map(group_of, modules)) else ""))


_IN_ALL = (
    "; where norms take the batches of several processes for one, all processes need the same hooks, or they wait for "
    "each other"
)


def _of_hooks(name: str, sharded: bool) -> str:
    if sharded:
        return (
            f"{name} is sharded by itself, and its parameters are whole only while it is called: let fully_shard take "
            "the block around it instead"
        )
    return (
        f"a hook, or a forward of its own, on a {name} has to see it called; it runs by itself in training until that "
        "is removed (a hook on the whole block costs nothing)"
    )


def norm_settings(norm: Any) -> Norm:
    """The settings and statistics of a batch normalization for the fused ops, which also count the batch.

    With `momentum=None`, a mean over all batches, the batch is already counted here.
    """
    momentum: Any = norm.momentum or 0.0
    tracked = norm.track_running_stats or not norm.training
    batches = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
    if norm.momentum is None and batches is not None:
        # Kept as a tensor: reading the number back would wait for the device.
        momentum, batches = 1 / batches.add_(1), None
    return Norm(
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        norm.weight,
        norm.bias,
        norm.training or norm.running_mean is None,
        momentum,
        norm.eps,
        batches,
        group_of(norm),
    )


def group_of(norm: nn.Module) -> str:
    """The name of the process group whose batches a norm in training shares; empty if there is no other process."""
    distributed = torch.distributed
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return ""
    if not distributed.is_available() or not distributed.is_initialized():
        return ""
    group: Any = norm.process_group or distributed.group.WORLD
    name: str = group.group_name
    return name if distributed.get_world_size(group) > 1 else ""
