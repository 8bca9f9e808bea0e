"""Checks of the numbers that blocks and models are built with."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import check_positive, check_whole


def check_widths(**widths: int) -> None:
    """Raises `TypeError` for what is no whole number, `ValueError` unless it is positive, and a kernel_size odd."""
    for name, value in widths.items():
        check_whole(name, value)
        if value < 1 or (name == "kernel_size" and value % 2 == 0):
            raise ValueError(f"{name} must be {'odd and ' if name == 'kernel_size' else ''}positive, got {value}")


def check_multiple(value: int, of: int, what: str) -> None:
    """Raises `TypeError` for what is no whole number, `ValueError` unless it is a positive multiple of `of`."""
    check_whole(what, value)
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
        check_whole(f"each size in {name}={tuple(shape)!r}", size)
    if any(size < 1 for size in shape) or dimensions not in (None, len(shape)):
        raise ValueError(f"{expected}, got {tuple(shape)!r}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises `ValueError` unless the heads share the channels evenly."""
    check_widths(num_heads=num_heads)
    check_multiple(dim, num_heads, "dim (for this number of heads)")


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """The hidden channels of an MLP: `dim * mlp_ratio`, rounded down.

    Raises `TypeError` for what is no number, `ValueError` if no channel is left.
    """
    check_widths(dim=dim)
    check_positive("mlp_ratio", mlp_ratio)
    hidden = int(dim * mlp_ratio)
    if hidden < 1:
        raise ValueError(f"mlp_ratio must leave at least one hidden channel of dim={dim}, got {mlp_ratio!r}")
    return hidden
