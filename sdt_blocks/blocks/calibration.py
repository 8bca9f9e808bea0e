"""Running statistics of norms for models that have not been trained, which are silent without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron import clear_hidden


def calibrate_norms(model: nn.Module, batches: Tensor | Iterable[Any]) -> None:
    """Sets the running statistics of every norm to the means over the batches, so that a fresh model fires.

    A fresh norm keeps mean 0 and variance 1, which in eval mode brings no membrane to its threshold. Statistics that
    were there are replaced. Weights, the modes of all modules and the random numbers stay as they were; nothing is
    trained. `batches` is a tensor (one batch), or gives tensors or tuples that start with one, such as a data loader's.

    Raises `ValueError` where no norm keeps statistics, there is no batch, or a batch is empty, too small for a variance
    or leads to statistics that are not finite, and `TypeError` for a batch or a model of another kind; the norms are
    then as they were before.

    >>> model, images = create_model("sdt_2_256", dim=32, in_channels=1), example_images()[0]
    >>> calibrate_norms(model.eval(), images)
    >>> bool(model.patch.stages[0].norm.running_var.eq(1).any())
    False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to calibrate, got {model.__class__.__name__}")
    norms = {name: module for name, module in model.named_modules() if _keeps_statistics(module)}
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm that keeps running statistics, so there is nothing to calibrate"
        )
    before = {name: {key: value.clone() for key, value in norm.named_buffers()} for name, norm in norms.items()}
    try:
        with torch.random.fork_rng(_cuda_devices(model)), _averaging(model, norms.values()), torch.no_grad():
            seen = sum(_run(model, batch) for batch in ([batches] if isinstance(batches, Tensor) else batches))
        if not seen:
            raise ValueError("there was no batch to run; check that the data is not empty")
        for name, norm in norms.items():
            if not all(value.isfinite().all() for value in norm.buffers()):
                raise ValueError(f"{name}: the batches lead to statistics that are not finite; look at the input")
    except BaseException:
        for name, norm in norms.items():
            for key, value in norm.named_buffers():
                value.copy_(before[name][key])
        raise


def _run(model: nn.Module, batch: Any) -> int:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"a batch must be a tensor or a tuple that starts with one, got {type(batch).__name__}")
    if not x.numel():
        raise ValueError(f"a batch must not be empty, got the shape {list(x.shape)}")
    where = next(model.parameters(), None)
    if where is not None:
        x = x.to(where.device, where.dtype if x.is_floating_point() else x.dtype)
    clear_hidden(model)
    try:
        model(x)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise ValueError(f"a batch of {list(x.shape)} is too small for a variance; give larger batches") from error
        raise
    return 1


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm whose running mean and variance are those of what it has seen."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "reset_running_stats")


@contextmanager
def _averaging(model: nn.Module, norms: Iterable[Any]) -> Iterator[None]:
    """The norms in training, each batch weighing the same, and all else in eval mode; as it was again afterwards."""
    norms = list(norms)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


def _cuda_devices(model: nn.Module) -> list[int]:
    """Whose generators may be drawn from, beside the CPU's."""
    return sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
