"""Reads the files that the papers' authors released, and those of training loops. None is fully unpickled."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .family import Family
from .registry import check_names, families
from .weights import build_filled, listed, load_safely

_WEIGHTS = ("state_dict", "model", "model_state_dict")
_AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
"""The keys under which training loops keep weights and their moving average."""

_PREFIX = re.compile(r"((module|_orig_mod|model)\.)+")
"""The prefixes that distributed training, torch.compile and Lightning add to every name."""

_OWN = re.compile(r"(patch|blocks|downsamplings|embeddings|stages|head|distillation_head|head_neuron)\.")
"""Names of weights saved by this kit."""


def convert_released_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released model's state_dict under this kit's names, without entries that are never used.

    The prefixes of distributed training, torch.compile and Lightning are removed. Names that fit several families, such
    as those of a Spike-Driven Transformer's gradients, are converted if the families agree on the result. Raises
    `ValueError` listing every key that does not belong to a released model, and `TypeError` for entries that are not
    named tensors.
    """
    released = _plain_names(state_dict)
    found = _families(released)
    converted = [_converted(released, family) for family in found]
    if any(list(other) != list(converted[0]) for other in converted):
        raise _alike(found)
    return converted[0]


def _plain_names(state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state_dict without prefixes. Raises `TypeError` or `ValueError`."""
    plain: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(f"a state_dict maps names to tensors, found the key {key!r} ({type(key).__name__})")
        if not isinstance(value, Tensor):
            raise TypeError(f"a state_dict maps names to tensors, {key[:200]} is {type(value).__name__}")
        name = _PREFIX.sub("", key, count=1) if _PREFIX.match(key) else key
        if name in plain:
            raise ValueError(f"{name} is there twice, once as {key}")
        plain[name] = value
    # The counter of an averaged model.
    plain.pop("n_averaged", None)
    return plain


def _family(released: Mapping[str, Tensor]) -> Family:
    """The family that most names fit. Raises `ValueError` for names of this kit, or if all names fit two families."""
    found = _families(released)
    if len(found) > 1:
        raise _alike(found)
    return found[0]


def _families(released: Mapping[str, Tensor]) -> list[Family]:
    """All families that all names fit, or else the one that most names fit. Raises `ValueError` for the kit's names."""
    if not released:
        raise ValueError("there are no weights to convert: the state_dict is empty")
    if all(_OWN.match(key) for key in released):
        raise ValueError(
            "the weights of a model of this kit: load_model takes them in a folder with their config.json, and "
            "model.load_state_dict as they are"
        )
    readable = [family for family in families().values() if family.keys is not None]
    counts = [sum(_renamed(key, family) is not None for key in released) for family in readable]
    best = [family for family, count in zip(readable, counts, strict=True) if count == max(counts)]
    return best if 0 < max(counts) == len(released) else best[:1]


def _alike(found: list[Family]) -> ValueError:
    return ValueError(
        f"the names of the weights fit {' and '.join(family.name for family in found)} alike; keep what is released "
        f"but never used, which tells them apart, such as block.0.norm1.weight of a Spikformer"
    )


def _renamed(key: str, family: Family) -> str | None:
    return None if family.keys is None else family.keys.renamed(key)


def _converted(released: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    released = family.keys.weed(released) if family.keys is not None else released
    names = {key: _renamed(key, family) for key in released}
    unexpected = [key for key, name in names.items() if name is None]
    if unexpected:
        kind = f"a released {family.name}" if len(unexpected) < len(names) else "a released model"
        raise ValueError(f"not the state_dict of {kind}; unexpected: {listed(unexpected)}")
    return {name: _over_planes(name, released[key]) for key, name in names.items() if name}


def _over_planes(name: str, value: Tensor) -> Tensor:
    """A linear layer, or a 1-D convolution over the tokens, as the equivalent 1x1 convolution over the plane."""
    flat = value.ndim == 3 or (value.ndim == 2 and name.endswith("conv.weight"))
    return value[(...,) + (None,) * (4 - value.ndim)] if flat else value


def _read_options(
    family: Family, released: Mapping[str, Tensor], args: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    assert family.keys is not None
    try:
        options, untold = family.keys.options(released, args)
    except ValueError as error:
        raise ValueError(f"read as {family.keys.title}: {error}") from None
    # Training arguments have flags as numbers too.
    flags = {name: bool(value) for name, value in options.items() if family.options[name].kind is bool}
    return options | flags, untold


def load_released_checkpoint(
    path: str | os.PathLike[str], *, ema: bool = False, new_head: bool = False, **overrides: Any
) -> Any:
    """The model in a released `.pth.tar`, or in a state_dict of torch or safetensors, in eval mode.

    The family, the architecture and a second head are read from the weights and the file's training arguments;
    `overrides` (options of the model's class, such as `time_steps=4` or `event_pooling=True`) take precedence. One
    warning names the options that change the answers and that none of these tells, with the values that are taken.

    The weights may be under "state_dict", "model" or "model_state_dict"; `ema=True` uses their moving average. Prefixes
    of distributed training, torch.compile and Lightning are removed. `new_head=True` leaves the head newly initialized,
    for `num_classes` of other data; `num_classes=0` removes it. The `model.card` of a model with ImageNet's 1000
    classes has their names and the preparation of images.

    Only tensors and one `argparse.Namespace` are unpickled. Raises `FileNotFoundError`; `ValueError` naming the file
    and the cause if it is damaged, needs another class, or does not match the architecture.
    """
    model, assumed = read_released(path, ema=ema, new_head=new_head, **overrides)
    if assumed:
        taken = ", ".join(f"{name}={model.config[name]!r}" for name in assumed)
        warnings.warn(
            f"{path}: assumed {taken}, which neither the weights nor training arguments in the file tell; with other "
            f"values than in training the answers are wrong: give them to load_released_checkpoint, even if they are "
            f"these (in the recipes: model.{assumed[0]}=...)",
            stacklevel=2,
        )
    return model


def read_released(
    path: str | os.PathLike[str], *, ema: bool = False, new_head: bool = False, **overrides: Any
) -> tuple[Any, list[str]]:
    """What `load_released_checkpoint` returns, and the options that it warns about: those whose values are assumed."""
    path = Path(path)
    content = _load_weights_only(path)
    try:
        weights, args = _find_weights(content, averaged=ema)
        released = _plain_names(weights)
        family = _family(released)
        converted = _converted(released, family)
        check_names(overrides, family.model)
        options, untold = _read_options(family, released, args)
        names = family.card.class_names if family.card else None
        card = family.card if names is not None and options["num_classes"] == len(names) else None
        model = build_filled(family.model, options, overrides, converted, new_head=new_head, card=card)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return model.eval(), [name for name in untold if name not in overrides]


def _find_weights(content: Any, *, averaged: bool) -> tuple[Mapping[Any, Any], Mapping[str, Any]]:
    """The weights in a file's content, and the training arguments. Raises `ValueError`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a checkpoint or a state_dict, found {type(content).__name__}")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    plain = [key for key in _WEIGHTS if isinstance(content.get(key), Mapping)]
    mean = [key for key in _AVERAGED if isinstance(content.get(key), Mapping)]
    found = mean if averaged else plain
    if len(found) > 1:
        raise ValueError(f"holds weights under {listed(found)}; save the ones that are meant to a file of their own")
    if found:
        return content[found[0]], args
    if averaged or mean or any(key in content for key in _WEIGHTS):
        wanted = _AVERAGED if averaged else _WEIGHTS
        instead = f"; ema=True takes {mean[0]!r}" if mean else ""
        raise ValueError(f"has no {wanted[0]!r} (nor {', '.join(wanted[1:])}); it holds {listed(content)}{instead}")
    return content, args


def _load_weights_only(path: Path) -> Any:
    if path.is_dir():
        raise FileNotFoundError(f"{path}: a folder; load_model takes that of a saved model or of a run")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a released .pth.tar")
    if path.suffix == ".safetensors":
        return load_safely(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if wanted:
            raise ValueError(
                f"{path}: refused, it wants to run {wanted[1]}; only tensors and one argparse.Namespace are read"
            ) from None
        raise ValueError(
            f"{path}: refused, damaged or no checkpoint of torch; only tensors and one argparse.Namespace are read"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, AttributeError, IndexError, TypeError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: truncated or not a torch file ({said})") from None
