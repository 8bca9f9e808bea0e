"""Which version of an op runs: the equations, the CPU kernels or the Triton kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..surrogate import constant_in_graphs, transformed
from .kernels import Kernels, LevelKernels

BACKENDS = ("reference", "compiled", "triton")
"""The equations in PyTorch; the C++ kernels for CPU tensors; the Triton kernels for CUDA tensors."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fused(x: Tensor, *, even_traced: bool = False) -> bool:
    """Whether a fused kernel runs for x; otherwise the reference runs.

    `SDT_BLOCKS_BACKEND` forces a backend: "reference", "compiled" (CPU tensors) or "triton" (CUDA tensors; with
    `TRITON_INTERPRET=1` CPU tensors too). Without it, CUDA tensors use Triton and CPU tensors the compiled kernels. If
    these cannot run, one warning says why and the reference runs. While `torch.compile` traces CPU code it sees the
    reference, which it fuses with the code around it, unless `even_traced`. What `torch.export`, `torch.onnx` and
    `torch.jit` produce is for other runtimes, so they always see the reference. So do the transforms of `torch.func`
    and forward-mode gradients, with a warning.

    Raises `ValueError` for an unknown backend or one that does not run on the tensor's device, and `RuntimeError` if a
    forced backend cannot run.
    """
    if exporting():
        return False
    if transformed():
        fall_back("torch.func and forward-mode gradients are computed from the equations")
        return False
    if torch.compiler.is_compiling() and x.device.type == "cpu" and not even_traced:
        return False
    return _backend(x.device.type, x.dtype) != "reference"


def kernels(x: Tensor) -> Kernels:
    """The kernels for x, if `fused(x)`."""
    found: Kernels = _module(_backend(x.device.type, x.dtype), "training")
    return found


def level_kernels(x: Tensor) -> LevelKernels:
    """The kernels of integer neurons for x, if `fused(x)`."""
    found: LevelKernels = _module(_backend(x.device.type, x.dtype), "levels")
    return found


def by_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run for x, whole numbers included; does not build a CPU's own kernels to find out."""
    asked = x.device.type == "cuda" or os.environ.get("SDT_BLOCKS_BACKEND") == "triton"
    return asked and _backend(x.device.type, x.dtype if x.is_floating_point() else torch.float32) == "triton"


def of_triton(name: str) -> Any:
    """A module of Triton kernels, if `by_triton(x)`."""
    return _module("triton", name)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Within it, `SDT_BLOCKS_BACKEND` is this backend."""
    before = os.environ.get("SDT_BLOCKS_BACKEND")
    os.environ["SDT_BLOCKS_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["SDT_BLOCKS_BACKEND"]
        else:
            os.environ["SDT_BLOCKS_BACKEND"] = before


def exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit is running."""
    if torch.jit.is_tracing():
        return True
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    # PyTorch 2.6 cannot tell a strict export, which goes through TorchDynamo, from torch.compile.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


@constant_in_graphs
def fall_back(reason: str) -> None:
    """One visible warning for each reason why the reference runs."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"the unfused reference runs instead of a fused kernel: {reason}", stacklevel=4)


_warned: set[str] = set()


@constant_in_graphs
def _backend(device: str, dtype: torch.dtype) -> str:
    forced = os.environ.get("SDT_BLOCKS_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"SDT_BLOCKS_BACKEND={forced!r} is unknown; choose one of {', '.join(BACKENDS)}")
    backend = forced or {"cpu": "compiled", "cuda": "triton"}.get(device, "reference")
    if backend == "reference" or device == "meta":
        return "reference"
    if backend == "compiled" and device != "cpu":
        raise ValueError(f"SDT_BLOCKS_BACKEND=compiled runs on CPU tensors, got one on {device!r}")
    if backend == "triton" and device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"SDT_BLOCKS_BACKEND=triton runs on CUDA tensors (and under TRITON_INTERPRET=1, slowly, on CPU tensors), "
            f"got one on {device!r}"
        )
    problem = _problem(backend) if dtype in DTYPES else f"none is written for {dtype}"
    if problem is None:
        return backend
    if forced:
        raise RuntimeError(f"SDT_BLOCKS_BACKEND={backend} cannot run: {problem}")
    fall_back(problem)
    return "reference"


@functools.cache
def _problem(backend: str) -> str | None:
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    from .cpu import build

    try:
        build.library()
    except build.BuildError as error:
        return str(error)
    return None


@functools.cache
def _module(backend: str, name: str) -> Any:
    # Imported late: Triton may be missing, and reads TRITON_INTERPRET when it is imported.
    folder = "triton" if backend == "triton" else "cpu"
    return importlib.import_module(f".{folder}.{name}", __package__)
