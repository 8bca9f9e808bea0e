"""Checks of the sizes that blocks and models are built with."""

from __future__ import annotations

import numbers
from typing import Any


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


def _check_whole(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} must be a whole number, got {value!r}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises `ValueError` unless the heads share the channels evenly."""
    check_widths(num_heads=num_heads)
    check_multiple(dim, num_heads, "dim (for this number of heads)")
