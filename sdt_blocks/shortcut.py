"""Membrane shortcut: the residual connection between membrane potentials."""

from __future__ import annotations

from torch import Tensor, nn


class MembraneShortcut(nn.Module):
    """`u + drop_path(branch(u))`: the branch starts with a neuron and ends in a membrane, so spikes stay binary.

    `drop_path` is the probability of leaving the branch out, drawn once a sample for all time steps (Huang et al.,
    2016, https://arxiv.org/abs/1603.09382); what is kept is scaled by `1 / (1 - drop_path)`.

    Shapes: `[T, B, ...] -> [T, B, ...]`.

    Raises `ValueError` where drop_path is outside [0, 1), or the branch changes the shape.

    >>> MembraneShortcut(SpikingMLP(64))(torch.randn(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(self, branch: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is a probability in [0, 1), got {drop_path!r}")
        self.branch = branch
        self.drop_path = drop_path

    def forward(self, membrane: Tensor) -> Tensor:
        change: Tensor = self.branch(membrane)
        if change.shape != membrane.shape:
            raise ValueError(
                f"the branch of a membrane shortcut must keep the shape; it made {list(change.shape)} of "
                f"{list(membrane.shape)}"
            )
        if self.training and self.drop_path:
            kept = 1 - self.drop_path
            mask = change.new_empty(1, change.shape[1], *[1] * (change.ndim - 2)).bernoulli_(kept).div_(kept)
            change = change * mask
        return membrane + change

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}"
