"""Neurons of integer levels: what E-SpikeFormer trains, and what D binary steps make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..surrogate import transformed

ROUNDINGS = ("even", "up")
"""Of a level and a half: to the even neighbour, as `torch.round`, or up."""


class _Levels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, levels: int, rounding: str) -> Tensor:  # type: ignore[override]
        clamped = x.clamp(0, levels)
        return clamped.round() if rounding == "even" else (clamped + 0.5).floor()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(_inside(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class _ForwardLevels(_Levels):
    """With the rule of forward-mode gradients, which torch.compile takes no function with."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inside = _inside(*inputs)
        ctx.save_for_backward(inside)
        ctx.save_for_forward(inside)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        result: Tensor = tangent * inside
        return result


def _inside(x: Tensor, levels: int, rounding: str) -> Tensor:
    """Where the gradient passes: an open window has none at its ends, where silent neurons lie."""
    return (x >= 0) & (x <= levels) if rounding == "even" else (x > 0) & (x < levels)


class IntegerNeuron(nn.Module):
    """`l / norm` with the level `l = round(clamp(x / threshold, 0, levels))`, a whole number (Yao et al., 2025).

    It has no memory: a level stands for so many spikes in `levels` binary steps (spike firing approximation,
    https://arxiv.org/abs/2411.16061), which `unfold` gives. The gradient is passed straight through where x is within
    `[0, levels]`. `rounding` says what becomes of a half: "even" (2.5 becomes 2; the base family) or "up" (the large
    family, which passes no gradient at 0 and `levels` themselves). `norm` is `levels` unless given.

    Shapes: any, the same.

    Raises `ValueError` for levels below 1, a norm or a threshold that is not positive, or an unknown rounding.

    >>> IntegerNeuron(levels=4)(torch.tensor([-1.0, 0.5, 0.6, 2.5, 9.0]))
    tensor([0.0000, 0.0000, 0.2500, 0.5000, 1.0000])
    """

    states = 0
    """Numbers kept from one time step to the next."""

    def __init__(
        self, *, levels: int = 4, norm: float | None = None, rounding: str = "even", threshold: float = 1.0
    ) -> None:
        super().__init__()
        norm = float(levels) if norm is None else norm
        if levels < 1 or not norm > 0 or not threshold > 0:
            raise ValueError(
                f"levels must be at least 1, norm and threshold positive, got {levels}, {norm} and {threshold}"
            )
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        self.levels, self.norm, self.rounding, self.threshold = levels, norm, rounding, threshold

    def level(self, x: Tensor) -> Tensor:
        """The whole numbers, in the dtype of x."""
        x = x if self.threshold == 1 else x / self.threshold
        function = _ForwardLevels if transformed() else _Levels
        levels: Tensor = function.apply(x, self.levels, self.rounding)
        return levels

    def forward(self, x: Tensor) -> Tensor:
        return self.level(x) / self.norm

    def unfold(self, x: Tensor) -> Tensor:
        """The level as spikes: step i of `[levels, ...]` is 1 where the level is above i, and their sum the level."""
        steps = torch.arange(self.levels, device=x.device).view(-1, *[1] * x.ndim)
        return (self.level(x) > steps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, norm={self.norm:g}, rounding={self.rounding!r}"
