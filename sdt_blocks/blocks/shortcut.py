"""Membrane shortcut: the residual connection between membrane potentials."""

from __future__ import annotations

from torch import Tensor, nn

from ..steps import check_drop_path, shortcut


class MembraneShortcut(nn.Module):
    """`u + drop_path(branch(u))`: the branch starts with a neuron and ends in a membrane, so spikes stay binary.

    `drop_path` is the probability of leaving out the branch in training, drawn once per sample for all time steps
    (Huang et al., 2016, https://arxiv.org/abs/1603.09382); otherwise the branch is scaled by `1 / (1 - drop_path)`.

    Shapes: `[T, B, ...] -> [T, B, ...]`.

    Raises `ValueError` if drop_path is outside [0, 1) or the branch changes the shape, and `TypeError` if drop_path is
    not a number or the branch not a module.

    >>> MembraneShortcut(SpikingMLP(64))(torch.randn(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(self, branch: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__()
        check_branch(branch)
        check_drop_path(drop_path)
        self.branch = branch
        self.drop_path = drop_path

    def forward(self, membrane: Tensor) -> Tensor:
        return shortcut(membrane, self.branch(membrane), self.drop_path if self.training else 0.0)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}"


def check_branch(branch: nn.Module) -> None:
    """Raises `TypeError` for what is no module, whose weights would not be found."""
    if not isinstance(branch, nn.Module):
        raise TypeError(f"the branch must be an nn.Module, got {type(branch).__name__}")
