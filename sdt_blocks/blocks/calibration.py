"""Running statistics of norms for untrained models, whose neurons would not fire without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import Batches, each_of, evaluating, input_of, placed
from ..neuron import clear_hidden


def calibrate_norms(model: nn.Module, batches: Batches) -> None:
    """Sets the running statistics of every norm to the means over the batches, so that an untrained model fires.

    A new norm has mean 0 and variance 1, with which no membrane reaches its threshold in eval mode. Existing statistics
    are replaced, except those of norms that take no part. Weights, the modes of all modules and the state of PyTorch's
    random generators stay the same; those of Python and NumPy go on with what the data loading draws from them. Nothing
    is trained. `batches` is one tensor (one batch), or an iterable of tensors or of tuples that start with one, such as
    a data loader.

    Raises `ValueError` if no norm keeps statistics, or an instance norm does, if there is no batch, or if a batch is
    empty, too small for a variance or leads to statistics that are not finite, and `TypeError` for another kind of
    batch or model; the norms are then as before.

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
    for name, norm in norms.items():
        if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
            raise ValueError(
                f"{name or 'the model'}: {type(norm).__name__} cannot take the mean over batches; make it with "
                "track_running_stats=False, or calibrate by training"
            )
    before = {name: {key: value.clone() for key, value in norm.named_buffers()} for name, norm in norms.items()}
    try:
        with torch.random.fork_rng(_cuda_devices(model)), _averaging(model, norms.values()), torch.no_grad():
            seen = 0
            for batch in each_of(batches):
                _run(model, placed(input_of(batch), model))
                seen += 1
        if not seen:
            raise ValueError("there was no batch to run; check that the data is not empty")
        for name, norm in norms.items():
            if getattr(norm, "num_batches_tracked", None) == 0:
                _restore(norm, before[name])
            if not all(value.isfinite().all() for value in norm.buffers()):
                raise ValueError(f"{name}: the batches lead to statistics that are not finite; look at the input")
    except BaseException:
        for name, norm in norms.items():
            _restore(norm, before[name])
        raise


def _restore(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for key, value in norm.named_buffers():
        value.copy_(buffers[key])


def _run(model: nn.Module, x: Tensor) -> None:
    clear_hidden(model)
    try:
        model(x)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise ValueError(f"a batch of {list(x.shape)} is too small for a variance; give larger batches") from error
        raise


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm that keeps a running mean and variance."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "reset_running_stats")


@contextmanager
def _averaging(model: nn.Module, norms: Iterable[Any]) -> Iterator[None]:
    """Norms in training mode, with equal weight for every batch, and all else in eval mode; restored afterwards."""
    norms = list(norms)
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _cuda_devices(model: nn.Module) -> list[int]:
    """The devices whose random generators the model may use, besides the CPU's."""
    return sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
