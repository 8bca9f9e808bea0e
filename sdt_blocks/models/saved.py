"""A model in a folder: `model.safetensors` and `config.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import write_atomically
from .family import Family
from .registry import FAMILIES
from .released import check_fit, load_strictly

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_MOST = {"depth": 1000, "depths": 1000, "time_steps": 4096}
_LONGEST = 16


def save_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `model.safetensors` and `config.json` into the folder, each whole or not at all.

    Raises `TypeError` for anything but a model of this kit, such as a compiled or averaged one in its wrapper, and
    `ValueError` where `load_model` would give another model: the neuron is a factory that cannot be written down (use
    the names "lif" or "plif"), or the model was changed after it was built.
    """
    family = next((family for family in FAMILIES if type(model) is family.model), None)
    if family is None:
        raise TypeError(
            f"save_model takes a {' or '.join(_names())}, got {type(model).__name__}; of a wrapper, give the model "
            f"inside (model.module, or model._orig_mod after torch.compile)"
        )
    config: Any = model.config
    if not isinstance(config["neuron"], str):
        raise ValueError(
            f"a model with the neuron factory {config['neuron']!r} cannot be written to {CONFIG}; save its "
            f'state_dict(), or build it with neuron="lif" or "plif"'
        )
    changed = _changes(model, family)
    if changed:
        raise ValueError(
            f"the model is no longer as it was built and would not load as it is: {'; '.join(changed[:6])}; build it "
            f"with these options (create_model(..., time_steps=...)) and load the weights, or save its state_dict()"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    text = json.dumps({"model": family.name, **config}, indent=2) + "\n"
    write_atomically(folder / CONFIG, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _names() -> list[str]:
    return [family.name for family in FAMILIES]


def _changes(model: Any, family: Family) -> list[str]:
    """What differs between the model and a new one with its config, weights apart."""
    with torch.device("meta"):
        new = family.model(**model.config)
    ours, theirs = dict(model.named_modules()), dict(new.named_modules())
    changes = [f"{name} was {'added' if name in ours else 'removed'}" for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        what = name or type(model).__name__
        if type(one) is not type(other) and not isinstance(one, nn.SyncBatchNorm):
            changes.append(f"{what} is {type(one).__name__}, was {type(other).__name__}")
            continue
        before = _settings(other)
        changes += [
            f"{what}.{key} is {value!r}, was {before[key]!r}"
            for key, value in _settings(one).items()
            if key in before and value != before[key]
        ]
    tensors = new.state_dict()
    for key, value in model.state_dict().items():
        if key in tensors and (value.shape, value.dtype) != (tensors[key].shape, tensors[key].dtype):
            expected = f"{list(tensors[key].shape)} of {tensors[key].dtype}"
            changes.append(f"{key} is {list(value.shape)} of {value.dtype}, was {expected}")
    return sorted(changes)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes that a result in eval mode depends on."""
    values = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in ("training", "momentum")
    }
    kept = {key: value for key, value in values.items() if isinstance(value, int | float | str | tuple | None)}
    return kept | {key: repr(value) for key, value in values.items() if key == "surrogate"}


def load_model(folder: str | os.PathLike[str], **overrides: Any) -> Any:
    """The model that `save_model` wrote, in eval mode. A recipe's run folder gives its best model, else its last.

    `overrides` are options of the model's class. Raises `FileNotFoundError` or `ValueError` naming file and
    cause.
    """
    folder = Path(folder)
    candidates = [folder, folder / "best", folder / "last"]
    found = next((c for c in candidates if (c / CONFIG).is_file() and (c / WEIGHTS).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} with its {CONFIG} here, nor in best/ or last/")
    try:
        config = json.loads((found / CONFIG).read_text(encoding="utf-8"))
        family, options = _checked(config)
        with torch.device("meta"):
            sketch = family.model(**{**options, **overrides})
    except (ValueError, TypeError, OverflowError, ZeroDivisionError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{found / CONFIG}: {error}") from None
    try:
        weights = load_file(found / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{found / WEIGHTS}: truncated or not a safetensors file ({error})") from None
    check_fit(sketch, weights, found / WEIGHTS)
    model = family.model(**{**options, **overrides})
    load_strictly(model, weights, found / WEIGHTS)
    return model.eval()


def _checked(config: Any) -> tuple[Family, dict[str, Any]]:
    """Family and options in the content of a config.json. Raises `ValueError` unless each is known and of its type."""
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, found {type(config).__name__}")
    options = dict(config)
    name = options.pop("model", FAMILIES[0].name)
    family = next((family for family in FAMILIES if family.name == name), None)
    if family is None:
        raise ValueError(f"of the model {str(name)[:80]!r}, which is unknown; known: {', '.join(_names())}")
    for key, value in options.items():
        if key not in family.options:
            raise ValueError(f"unknown option {key[:80]!r}; the options are {', '.join(family.options)}")
        kind = family.options[key].split(" ")[0]
        several = kind.startswith("Sequence[")
        if several and not (isinstance(value, list) and len(value) <= _LONGEST):
            raise ValueError(f"{key} must be a list of at most {_LONGEST}, found {str(value)[:80]!r}")
        for one in value if several else [value]:
            _check_type(key, one, kind.removeprefix("Sequence[").removesuffix("]"))
    return family, options


def _check_type(key: str, value: Any, kind: str) -> None:
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}
    if not isinstance(value, kinds.get(kind, (str,))) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{key} must be of type {kind}, found {str(value)[:80]!r}")
    if kind in ("int", "float") and not abs(float(str(value))) <= _MOST.get(key, 10**9):
        raise ValueError(f"{key} must be at most {_MOST.get(key, 10**9)}, found {str(value)[:80]}")
