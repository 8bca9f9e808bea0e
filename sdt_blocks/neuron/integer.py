"""Neurons with integer levels, as E-SpikeFormer trains them, and the binary steps that a level stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_known, check_positive
from ..ops import LevelSpec, levels
from ..ops.spec import ROUNDINGS


class IntegerNeuron(nn.Module):
    """`l / norm` with the level `l = round(clamp(x / threshold, 0, levels))`, a whole number (Yao et al., 2025).

    It has no memory: a level l stands for l spikes in `levels` binary steps (spike firing approximation,
    https://arxiv.org/abs/2411.16061), which `unfold` gives. The gradient is passed straight through where
    `x / threshold` lies in `[0, levels]`. `rounding` says how a half is rounded: "even" (2.5 becomes 2; the base
    family) or "up" (the large family, which passes no gradient at 0 and `levels` themselves). `norm` is `levels` by
    default.

    Shapes: any; the output has the shape of the input.

    Raises `ValueError` if levels is not a whole number of at least 1, if norm or threshold is not positive and finite,
    or for an unknown rounding, and `TypeError` for what is no number.

    >>> IntegerNeuron(levels=4)(torch.tensor([-1.0, 0.5, 0.6, 2.5, 9.0]))
    tensor([0.0000, 0.0000, 0.2500, 0.5000, 1.0000])
    """

    states = 0
    """How many numbers a neuron keeps from one time step to the next."""

    def __init__(
        self, *, levels: int = 4, norm: float | None = None, rounding: str = "even", threshold: float = 1.0
    ) -> None:
        super().__init__()
        norm = levels if norm is None else norm
        for name, value in (("levels", levels), ("norm", norm), ("threshold", threshold)):
            check_positive(name, value)
        if not float(levels).is_integer():
            raise ValueError(f"levels must be a whole number, got {levels}")
        check_known("rounding", rounding, ROUNDINGS)
        self.levels, self.norm, self.rounding, self.threshold = int(levels), float(norm), rounding, float(threshold)

    @property
    def spec(self) -> LevelSpec:
        """The neuron's constants, as the ops take them."""
        return LevelSpec(self.levels, self.norm, self.rounding, self.threshold)

    def level(self, x: Tensor) -> Tensor:
        """The levels l, whole numbers in the dtype of x."""
        return levels(x, self.spec._replace(norm=1))

    def forward(self, x: Tensor) -> Tensor:
        return levels(x, self.spec)

    def unfold(self, x: Tensor) -> Tensor:
        """The level as spikes `[levels, ...]`: step i is 1 where the level is above i; they sum to it."""
        steps = torch.arange(self.levels, device=x.device).view(-1, *[1] * x.ndim)
        return (self.level(x) > steps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, norm={self.norm:g}, rounding={self.rounding!r}"
