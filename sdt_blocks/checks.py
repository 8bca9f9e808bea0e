"""Checks of the values that neurons, surrogates, blocks and ops are built with."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

from torch import Tensor


def check_number(name: str, value: float) -> None:
    """Raise `TypeError` for what is no number."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}: it is not learned")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise `TypeError` for what is no number, `ValueError` unless it is positive and finite."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_whole(name: str, value: int) -> None:
    """Raise `TypeError` for what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """Raise `TypeError` for anything but `True` and `False`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_known(name: str, value: str, known: Sequence[str]) -> None:
    """Raise `ValueError` for a value that is not one of the `known`."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
