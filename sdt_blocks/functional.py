"""How the blocks' layers are joined over time: the seam where fused versions come in."""

from __future__ import annotations

from torch import Tensor, nn


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Applies a module for `[N, C, H, W]` to every frame of x `[T, B, C, H, W]`."""
    frames: Tensor = module(x.flatten(0, 1))
    return frames.unflatten(0, x.shape[:2])


def normalize_and_fire(norm: nn.Module, neuron: nn.Module, x: Tensor) -> Tensor:
    """`neuron(norm(x))` for x `[T, B, C, H, W]`."""
    spikes: Tensor = neuron(per_frame(norm, x))
    return spikes


def check_sequence(x: Tensor, channels: int, owner: str) -> None:
    """Raises `ValueError` unless x is `[T, B, channels, H, W]` with T >= 1."""
    if x.ndim != 5 or x.shape[2] != channels or x.shape[0] == 0:
        raise ValueError(f"{owner} expects [T, B, {channels}, H, W] with T >= 1, got {list(x.shape)}")


def check_multiple(value: int, of: int, what: str) -> None:
    """Raises `ValueError` unless value is a positive multiple of `of`."""
    if value < 1 or value % of:
        raise ValueError(f"{what} must be a positive multiple of {of}, got {value}")
