"""A model on batches of data, without training it: what a batch is, where it goes, and the mode of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Batches = Tensor | Iterable[Any]
"""A tensor (one batch), or an iterable of tensors or of tuples whose first entry is the input."""


def each_of(batches: Batches) -> Iterable[Any]:
    """The batches one after another; a tensor is one. Raises `TypeError` for what holds no batches."""
    if not isinstance(batches, Tensor | Iterable):
        raise TypeError(f"expected batches, a tensor or an iterable of tensors, got {type(batches).__name__}")
    return [batches] if isinstance(batches, Tensor) else batches


def input_of(batch: Any) -> Tensor:
    """The input of a batch: a tensor itself, or the first of a tuple.

    Raises `TypeError` for anything else and `ValueError` if it is empty or not finite.
    """
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"a batch must be a tensor or a tuple that starts with one, got {type(batch).__name__}")
    if x.numel() == 0:
        raise ValueError(f"a batch must not be empty, got the shape {list(x.shape)}")
    if not x.is_meta and not x.isfinite().all():
        raise ValueError(
            f"a batch {list(x.shape)} holds values that are not finite numbers, for which no figure would mean "
            "anything; look at the data and its scaling"
        )
    return x


def placed(x: Tensor, model: nn.Module) -> Tensor:
    """x on the device of the model, and in its dtype unless x holds whole numbers."""
    where = next(model.parameters(), None)
    return x if where is None else x.to(where.device, where.dtype if x.is_floating_point() else x.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in eval mode; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
