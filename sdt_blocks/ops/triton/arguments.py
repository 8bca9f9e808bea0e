"""Arguments of a kernel launch: pointers, numbers that kernels are not specialized on, and compile-time constants."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..spec import RESETS, Affine, Layout, NeuronSpec, state_dtype
from .lif import MOST_STEPS
from .tiles import ROUNDED

STATES = {torch.float32: tl.float32, torch.float64: tl.float64}
"""The type that a kernel computes in, by the dtype of the state."""


def unrolled(x: Tensor, layout: Layout) -> dict[str, Any]:
    return {"STEPS": layout.steps, "UNROLL": min(layout.steps, MOST_STEPS), "STATE": STATES[state_dtype(x)]}


def as_number(x: Tensor, value: float) -> float | int:
    """A number that kernels are not specialized on; Triton passes floats as float32, so a float64 goes as its bits."""
    return as_bits(value) if x.dtype == torch.float64 else float(value)


def as_bits(value: float) -> int:
    found: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return found


def numbers(x: Tensor, neuron: NeuronSpec) -> dict[str, float | int]:
    assert not isinstance(neuron.inv_tau, Tensor)
    return {"inv_tau_number": as_number(x, neuron.inv_tau), "threshold_number": as_number(x, neuron.threshold)}


def constants(
    x: Tensor, layout: Layout, neuron: NeuronSpec, norm: Affine | None, inv_tau: Tensor | None, before: Tensor | None
) -> dict[str, Any]:
    return {
        "STEPS": layout.steps,
        "RESET": RESETS.index(neuron.reset),
        "STRICT": neuron.strict,
        "AFFINE": norm_kind(norm),
        "TAU": 0 if inv_tau is None else 2 if inv_tau.ndim else 1,
        "BEFORE": before is not None,
        "STATE": STATES[state_dtype(x)],
        **ROUNDED,
    }


def affine(norm: Affine | None, x: Tensor) -> Sequence[Tensor]:
    mean, inv_std, weight, _, _, bias, *_ = affines(norm, x)
    return mean, inv_std, weight, bias


def affines(norm: Affine | None, x: Tensor) -> Sequence[Tensor]:
    """Mean, inverse standard deviation, three weights and three biases."""
    if norm is None:
        return [x] * 8
    return norm.mean, norm.inv_std, *three(norm.weight or [x]), *three(norm.bias or [x])


def three(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """The arguments of a kernel that takes up to three inputs: a single one fills all three places."""
    return values if len(values) == 3 else [values[0]] * 3


def norm_kind(norm: Affine | None) -> int:
    """Three bits: whether there is a norm, whether it has a weight, and whether it has a bias."""
    return 0 if norm is None else 1 + 2 * (norm.weight is not None) + 4 * (norm.bias is not None)


def given(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """The tensor, or a stand-in: a kernel needs a pointer even for what it is told not to read."""
    return stand_in if tensor is None else tensor
