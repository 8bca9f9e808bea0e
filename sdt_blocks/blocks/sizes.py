"""Checks of the numbers that blocks and models are built with."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from ..ops.spec import check_number


def check_widths(**widths: int) -> None:
    """Raises `TypeError` for what is no whole number, `ValueError` unless it is positive, and a kernel_size odd."""
    for name, value in widths.items():
        _check_whole(value, name)
        if value < 1 or (name == "kernel_size" and value % 2 == 0):
            raise ValueError(f"{name} must be {'odd and ' if name == 'kernel_size' else ''}positive, got {value}")


def check_multiple(value: int, of: int, what: str) -> None:
    """Raises `TypeError` for what is no whole number, `ValueError` unless it is a positive multiple of `of`."""
    _check_whole(value, what)
    if value < 1 or value % of:
        raise ValueError(f"{what} must be a positive multiple of {of}, got {value}")


def check_shape(name: str, shape: Sequence[int], dimensions: int | None = None) -> None:
    """Raises `TypeError` for what is no sequence of whole numbers, `ValueError` unless they are positive.

    With `dimensions` there must be that many.
    """
    expected = f"{name} must be {'' if dimensions is None else f'{dimensions} '}whole numbers of at least 1"
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"{expected}, got {shape!r}")
    for size in shape:
        _check_whole(size, f"each size in {name}={tuple(shape)!r}")
    if any(size < 1 for size in shape) or len(shape) != (len(shape) if dimensions is None else dimensions):
        raise ValueError(f"{expected}, got {tuple(shape)!r}")


def _check_whole(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} must be a whole number, got {value!r}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises `ValueError` unless the heads share the channels evenly."""
    check_widths(num_heads=num_heads)
    check_multiple(dim, num_heads, "dim (for this number of heads)")


def check_positive(value: float, what: str) -> None:
    """Raises `TypeError` for what is no number, `ValueError` unless it is positive and finite."""
    check_number(what, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{what} must be positive and finite, got {value!r}")


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """The hidden channels of an MLP: `dim * mlp_ratio`, rounded down.

    Raises `TypeError` for what is no number, `ValueError` if no channel is left.
    """
    check_widths(dim=dim)
    check_positive(mlp_ratio, "mlp_ratio")
    hidden = int(dim * mlp_ratio)
    if hidden < 1:
        raise ValueError(f"mlp_ratio must leave at least one hidden channel of dim={dim}, got {mlp_ratio!r}")
    return hidden
