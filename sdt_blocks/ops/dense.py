"""The operations between two products in evaluation: neurons fused with addition, pooling and the attention's mask.

Every function takes channels-last frames `[T, B, H, W, C]`, in float32 or bfloat16, or spikes in int8 (see
`as_it_is`), and returns spikes in the dtype that the next product needs. Membranes are float32. `lif_reference` has the
neuron's equations.

With `compiled`, the C++ kernels of `cpu/dense.cpp` run on a CPU, and the Triton kernels of `triton/dense.py` on a CUDA
device; there, streams and an attention with pooling use the equations with the neurons' own kernel. Elsewhere
`torch.compile` compiles the equations.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import bindings
from .cpu.build import BuildError
from .dispatch import by_triton, of_triton
from .levels import levels
from .lif import lif, lif_reference
from .pool import max_pool
from .spec import SIGMOID, LevelSpec, NeuronSpec, state_dtype


class Neuron(NamedTuple):
    """A layer of neurons: `inv_tau` is one float32 number or one per channel; the rest as in `lif_reference`."""

    inv_tau: Tensor
    threshold: float
    reset: str
    strict: bool
    before: Tensor | None = None
    """The membrane before the first step, in the memory order of the input; `None` at rest."""
    after: Tensor | None = None
    """A tensor that is filled with the membrane after the last step."""


def spec_of(neuron: Neuron) -> NeuronSpec:
    """The neuron's constants without the time constant, which kernels take separately."""
    # Not a property of the named tuple: a graph of PyTorch 2.6 would find none of its values.
    return NeuronSpec(neuron.threshold, neuron.reset, strict=neuron.strict)


def fire(
    x: Tensor, neuron: Neuron, dtype: torch.dtype, *, shortcut: Tensor | None = None, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """`(u, spikes of u)` with `u = shortcut + x` in float32; without a shortcut u is x itself.

    Shapes: x, shortcut and results `[T, B, H, W, C]`; x may be one frame expanded along T.
    """
    if compiled and _by_triton(x, neuron):
        return of_triton("dense").fire(_frames(x), spec_of(neuron), neuron.inv_tau, dtype, shortcut)
    if compiled and _native(x):
        x = _frames(x)
        spikes = x.new_empty(x.shape, dtype=dtype)
        total = x if shortcut is None else x.new_empty(x.shape, dtype=torch.float32)
        before = None if shortcut is None else shortcut.contiguous()
        into = None if before is None else total
        _call("fire", x, spikes, len(x), x[0].numel(), x, x.stride(0), before, into, _layers((neuron,)))
        return total, spikes
    run = _traced(_fire, dynamic=True) if compiled and not by_triton(x) else _fire
    flat = functools.partial(torch.flatten, start_dim=1, end_dim=-2 if neuron.inv_tau.ndim else -1)
    total, spikes = run(flat(x), neuron, dtype, None if shortcut is None else flat(shortcut))
    return x if shortcut is None else total.view(x.shape), spikes.view(x.shape)


def fire_levels(
    x: Tensor, neuron: LevelSpec, dtype: torch.dtype, *, shortcut: Tensor | None = None, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Like `fire`, for integer neurons: `(u, l / norm of u)`, in int8 `(u, l)`.

    Their own kernel runs even without `compiled`.
    """
    neuron = neuron._replace(norm=1.0) if dtype == torch.int8 else neuron
    if compiled and by_triton(x):
        total, values = of_triton("levels").fire_levels(x.contiguous(), neuron, dtype, shortcut)
        return x if shortcut is None else total, values
    total = x if shortcut is None else shortcut + x
    return total, levels(total.to(state_dtype(total)), neuron).to(dtype)


def fire_and_pool(x: Tensor, neuron: Neuron, dtype: torch.dtype, *, compiled: bool = False) -> Tensor:
    """Spikes of x after 3x3 max pooling of stride 2, `[T, B, H, W, C] -> [T, B, ceil(H / 2), ceil(W / 2), C]`."""
    if compiled and _by_triton(x, neuron):
        if len(x) > of_triton("dense").BITS:
            spikes: Tensor = pool(fire(x, neuron, dtype, compiled=True)[1])
            return spikes
        return of_triton("dense").fire_and_pool(_frames(x), spec_of(neuron), neuron.inv_tau, dtype)
    if compiled and _native(x):
        x = _frames(x)
        steps, batch, height, width, channels = x.shape
        out = x.new_empty(steps, batch, (height + 1) // 2, (width + 1) // 2, channels, dtype=dtype)
        _call("fire_and_pool", x, out, _sizes(*x.shape), x, x.stride(0), _layers((neuron,)))
        return out
    run = _traced(_fire_and_pool) if compiled and not by_triton(x) else _fire_and_pool
    pooled: Tensor = run(x, neuron, dtype)
    return pooled


def attend(
    qkv: Tensor, neurons: Sequence[Neuron], dtype: torch.dtype, *, heads: int | None = None, compiled: bool = False
) -> Tensor:
    """`q * LIF(sum over tokens of k * v)` from the inputs of q, k and v, `[T, B, H, W, 3 C] -> [T, B, H, W, C]`.

    `neurons` are those of q, k, v and of the sum. With `heads`, k and v, k * v, and the result are pooled as in
    `SpikeDrivenSelfAttention(event_pooling=True)`.
    """
    if compiled and heads is None and _by_triton(qkv, *neurons):
        found = _attend_by_triton(qkv, neurons, dtype)
        if found is not None:
            return found
    elif compiled and heads is None and _native(qkv):
        qkv = qkv.contiguous()
        steps, batch, height, width, channels = qkv.shape
        out = qkv.new_empty(steps, batch, height, width, channels // 3, dtype=dtype)
        shape = _sizes(steps, batch, height * width, channels // 3)
        _call("attend", qkv, out, shape, qkv, _layers(tuple(neurons)))
        return out
    # An attention with pooling, and very many steps and tokens, use the equations with fused neurons.
    run = _traced(_attend) if compiled and not by_triton(qkv) and not _native(qkv) else _attend
    masked: Tensor = run(qkv, neurons, dtype, heads)
    return masked


def as_it_is(device: torch.device | str) -> Neuron:
    """A neuron that returns its input spikes: with it, `fire_and_pool` and `attend` take spikes of one byte each."""
    return Neuron(torch.ones((), device=device), 0.5, "none", False)


def pool(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 2, `[T, B, H, W, C] -> [T, B, ceil(H / 2), ceil(W / 2), C]`."""
    return max_pool(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _by_triton(x: Tensor, *neurons: Neuron) -> bool:
    """Whether a Triton kernel runs, which starts at rest; otherwise the equations with the neurons' own kernel."""
    return by_triton(x) and all(neuron.before is None and neuron.after is None for neuron in neurons)


def _attend_by_triton(qkv: Tensor, neurons: Sequence[Neuron], dtype: torch.dtype) -> Tensor | None:
    """`None` if q, k and v have different neurons, or the kernel has no room for so many steps and tokens."""
    specs = [spec_of(neuron) for neuron in neurons]
    if not specs[0] == specs[1] == specs[2]:
        return None
    inv_taus = torch.stack([neuron.inv_tau.expand(qkv.shape[-1] // 3) for neuron in neurons])
    masked: Tensor | None = of_triton("dense").attend(_frames(qkv), specs, inv_taus, dtype)
    return masked


# The equations.


def _spikes(x: Tensor, neuron: Neuron) -> Tensor:
    x = x if x.is_floating_point() else x.float()
    # All by name: a graph of PyTorch 2.6 takes neither a surrogate for a default nor `_replace`.
    spec = NeuronSpec(neuron.threshold, neuron.reset, SIGMOID, strict=neuron.strict, inv_tau=neuron.inv_tau)
    before = None if neuron.before is None else neuron.before.reshape(x.shape[1:])
    if torch.compiler.is_compiling():
        spikes, last = lif_reference(x, spec, before)
    else:
        result = lif(x, spec, before, return_membrane=True)
        assert isinstance(result, tuple)
        spikes, last = result
    if neuron.after is not None:
        neuron.after.copy_(last.view(neuron.after.shape))
    return spikes


def _fire(x: Tensor, neuron: Neuron, dtype: torch.dtype, shortcut: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x if shortcut is None else shortcut + x
    return total, _spikes(total, neuron).to(dtype)


def _fire_and_pool(x: Tensor, neuron: Neuron, dtype: torch.dtype) -> Tensor:
    spikes = _spikes(x.flatten(1, -2), neuron).view(x.shape)
    return pool(spikes).to(dtype)


def _attend(qkv: Tensor, neurons: Sequence[Neuron], dtype: torch.dtype, heads: int | None) -> Tensor:
    batch, height, width = qkv.shape[1:-1]
    parts = qkv.flatten(1, 3).chunk(3, -1)
    q, k, v = (_spikes(part, neuron).unflatten(1, (batch, -1)) for part, neuron in zip(parts, neurons[:3], strict=True))
    if heads:
        k, v = _pool_plane(k, height), _pool_plane(v, height)
    kv = k * v
    if heads:
        kv = _pool_tokens(kv, heads)
    a = _spikes(kv.sum(2, dtype=torch.float32), neurons[3]).unsqueeze(2)
    masked = q * a
    if heads:
        masked = _pool_tokens(masked, heads)
    return masked.to(dtype).unflatten(2, (height, width))


def _pool_plane(spikes: Tensor, height: int) -> Tensor:
    """3x3 maximum over (H, W) of `[T, B, H * W, C]`."""
    plane = spikes.unflatten(2, (height, -1)).movedim(-1, 2)
    return _maximum(plane).flatten(3).movedim(2, -1)


def _pool_tokens(spikes: Tensor, heads: int) -> Tensor:
    """3x3 maximum over (tokens, channels of a head) of `[T, B, tokens, C]`."""
    by_head = spikes.unflatten(-1, (heads, -1)).movedim(3, 2)
    return _maximum(by_head).movedim(2, 3).flatten(3)


def _maximum(plane: Tensor) -> Tensor:
    return F.max_pool2d(plane.flatten(0, 1), 3, stride=1, padding=1).unflatten(0, plane.shape[:2])


# What compiles.


@functools.cache
def _traced(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=dynamic)

    def call(*arguments: Any) -> Any:
        if not _uncompiled:
            try:
                return compiled(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                _warn_uncompiled(error)
        return function(*arguments)

    return call


def _native(x: Tensor) -> bool:
    """Whether the C++ kernels can run for x."""
    if x.device.type != "cpu" or x.dtype not in _DTYPES or not x.is_floating_point() or _uncompiled:
        return False
    try:
        bindings.built("dense.cpp")
    except BuildError as error:
        _warn_uncompiled(error)
        return False
    return True


def _frames(x: Tensor) -> Tensor:
    """x with every frame contiguous; one frame expanded along T remains one frame in memory."""
    return x.contiguous() if x.stride(0) or len(x) == 1 else x[:1].contiguous().expand(x.shape)


_uncompiled: list[str] = []


def _warn_uncompiled(error: Exception) -> None:
    _uncompiled.append(str(error).splitlines()[0])
    warnings.warn(f"nothing can be compiled, evaluation runs slower than it could: {_uncompiled[0]}", stacklevel=3)


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 2}
# Number of elements from which a second thread pays.
_WORTH_SHARING = 1 << 14


class _Layer(ctypes.Structure):
    _fields_ = (
        ("neuron", bindings.Neuron),
        ("inv_tau", c_void_p),
        ("constants", c_int64),
        ("before", c_void_p),
        ("after", c_void_p),
    )


def _sizes(*sizes: int) -> Any:
    return (c_int64 * len(sizes))(*sizes)


def _layers(neurons: tuple[Neuron, ...]) -> Any:
    layers = tuple((bindings.address(n.inv_tau), n.inv_tau.numel(), n.threshold, n.reset, n.strict) for n in neurons)
    if all(neuron.before is None and neuron.after is None for neuron in neurons):
        return _structures(layers)
    structures = _structures.__wrapped__(layers)
    for structure, neuron in zip(structures, neurons, strict=True):
        structure.before = None if neuron.before is None else bindings.address(neuron.before)
        structure.after = None if neuron.after is None else bindings.address(neuron.after)
    return structures


@functools.lru_cache(maxsize=1024)
def _structures(layers: tuple[tuple[int, int, float, str, bool], ...]) -> Any:
    return (_Layer * len(layers))(
        *(
            _Layer(bindings.Neuron.of(NeuronSpec(threshold, reset, strict=strict)), inv_tau, constants)
            for inv_tau, constants, threshold, reset, strict in layers
        )
    )


def _call(name: str, x: Tensor, out: Tensor, *arguments: Any) -> None:
    threads = bindings.threads(x.numel(), _WORTH_SHARING)
    bindings.call("dense.cpp", name, _DTYPES[x.dtype], _DTYPES[out.dtype], *arguments, out, threads)
