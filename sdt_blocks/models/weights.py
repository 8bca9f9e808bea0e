"""Puts the weights of a file into a model; names what does not fit before anything large is built."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..blocks.names import paths_of
from .card import DataCard
from .options import options_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_safely(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `ValueError` naming it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None


def build_filled(
    kind: type[nn.Module],
    options: Mapping[str, Any],
    overrides: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    new_head: bool = False,
    card: DataCard | None = None,
) -> nn.Module:
    """A model of these options, with overrides, and with these weights in their own dtypes.

    `new_head=True` leaves the head newly initialized, in the dtype of the weights. Weights may also have the names in
    `blocks.names`. `card` describes the data that the weights were trained on; its class names are dropped for other
    classes. Raises `ValueError` or `TypeError` if the options are impossible, the weights do not fit, or they have
    another number of classes and neither `new_head` nor `num_classes=0` is given.
    """
    wanted = {**options, **overrides}
    built = _without_memory(kind, wanted)
    expected, paths = built.state_dict(), paths_of(built, weights)
    weights = {paths.get(key, key): value for key, value in weights.items()}
    before, after = (one.get("num_classes", options_of(kind)["num_classes"].default) for one in (options, wanted))
    head: set[str] = set()
    if new_head or before != after:
        classes = before or after
        for one in (options, wanted):
            heads = (_without_memory(kind, {**one, "num_classes": n}) for n in (classes, classes - 1 or 2))
            some, others = (model.state_dict() for model in heads)
            head |= {key for key, value in some.items() if others[key].shape != value.shape}
    if before != after != 0 and not new_head:
        raise ValueError(
            f"the head has {before} classes, but num_classes={after}; new_head=True loads all but the head, which is "
            f"initialized (in the recipes: train.init_checkpoint)"
        )
    weights = {key: value for key, value in weights.items() if key not in head}
    check_fit({key: value for key, value in expected.items() if key not in head}, weights)
    model = kind(**wanted)
    # A new head can follow the other layers in their dtype.
    dtype = next((value.dtype for value in weights.values() if value.is_floating_point()), None)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in weights or name in head:
            tensor.data = tensor.data.to(weights[name].dtype if name in weights else dtype)
    model.load_state_dict(weights, strict=False)
    kept = card if card is None or not (new_head or before != after) else card.without_names()
    model.card = kept  # type: ignore[assignment]
    return model


def _without_memory(kind: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """A model on the meta device, with names and shapes but no memory."""
    with torch.device("meta"):
        return kind(**options)


def check_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` unless the weights have the expected names, shapes and kinds of numbers."""
    shared = expected.keys() & weights.keys()
    shapes = {key: (list(weights[key].shape), list(expected[key].shape)) for key in expected if key in shared}
    kinds = {key: (weights[key].dtype, expected[key].dtype) for key in shapes}
    faults = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [f"{key} is {a}, the model has {b}" for key, (a, b) in shapes.items() if a != b],
        "of another kind of numbers": [
            f"{key} is {a}, the model has {b}" for key, (a, b) in kinds.items() if a != b and {a, b} - set(DTYPES)
        ],
    }
    said = [f"{what}: {listed(keys)}" for what, keys in faults.items() if keys]
    if said:
        raise ValueError(f"the weights do not match the model; {'; '.join(said)}")


def listed(names: Iterable[Any], most: int = 12) -> str:
    """The first `most` names as text, and how many more there are."""
    words = [str(name)[:200] for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
