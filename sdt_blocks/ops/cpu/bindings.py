"""How Python calls the C++ kernels: structures as in their files, and one function for all calls."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..spec import RESETS, ROUNDINGS, LevelSpec, NeuronSpec
from .build import library


class Neuron(ctypes.Structure):
    """`Neuron` of neuron.h: the same fields in the same order."""

    _fields_ = (
        *((name, c_double) for name in ("inv_tau", "threshold", "alpha")),
        *((name, c_int64) for name in ("reset", "detach_reset", "strict", "surrogate")),
    )

    @staticmethod
    def of(spec: NeuronSpec) -> Neuron:
        kind, alpha = spec.gradient()
        reset = RESETS.index(spec.reset)
        return Neuron(spec.inv_tau, spec.threshold, alpha, reset, spec.detach_reset, spec.strict, kind)


class Levels(ctypes.Structure):
    """`Levels` of levels.h: the same fields in the same order."""

    _fields_ = (*((name, c_double) for name in ("levels", "norm", "threshold")), ("up", c_int64))


@functools.lru_cache(maxsize=256)
def levels(spec: LevelSpec) -> Levels:
    return Levels(spec.levels, spec.norm, spec.threshold, ROUNDINGS.index(spec.rounding))


@functools.lru_cache(maxsize=256)
def neurons(*specs: NeuronSpec) -> Any:
    """An array of `Neuron`."""
    return (Neuron * len(specs))(*map(Neuron.of, specs))


def call(source: str, name: str, *arguments: Any) -> int:
    """Call the kernel `name` of a C++ file in this folder, and return its result, if it has one.

    Tensors are passed as addresses, `None` as a null address, numbers and truth values as 64 bits, arrays and
    structures by reference, and other ctypes values unchanged.
    """
    result: int = _function(source, name)(*map(_argument, arguments))
    return result


def address(tensor: Tensor) -> int:
    """Where a tensor lies in memory. Raises `RuntimeError` for one on another device, whose memory is not the CPU's."""
    if not tensor.is_cpu:
        raise RuntimeError(
            f"a kernel on the CPU got a tensor on {tensor.device}: input, neurons, norms and states must be on one "
            "device; move them with .to()"
        )
    return tensor.data_ptr()


def threads(elements: int, worth_sharing: int) -> int:
    """PyTorch's number of threads, or 1 if there are too few elements for a second thread to pay."""
    return torch.get_num_threads() if elements > worth_sharing else 1


def built(source: str) -> ctypes.CDLL:
    """The kernels of a C++ file in this folder; raises `BuildError` if they cannot be built."""
    return library(Path(__file__).with_name(source))


@functools.cache
def _function(source: str, name: str) -> Any:
    function = getattr(built(source), name)
    function.restype = c_int64
    return function


def _argument(value: Any) -> Any:
    convert = _CONVERT.get(type(value))
    if convert is not None:
        return convert(value)
    if isinstance(value, Tensor):
        return c_void_p(address(value))
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


_CONVERT: dict[type, Callable[[Any], Any]] = {
    Tensor: lambda tensor: c_void_p(address(tensor)),
    type(None): lambda _: c_void_p(),
    int: c_int64,
    bool: c_int64,
}
