"""A model in a folder: `model.safetensors` and `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import write_atomically, write_text
from .card import DataCard, check_card, read_card
from .registry import check_names, families
from .weights import DTYPES, build_filled, listed, load_safely

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card"
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def save_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `model.safetensors` and `config.json` into the folder, each completely or not at all.

    `model.card`, a `DataCard` with the names of the classes and the preparation of images, is saved as well.

    Raises `TypeError` for anything but a model of a registered class, such as a compiled or averaged one in its
    wrapper, and `ValueError` if `load_model` would return another model: because the neuron is a factory that cannot be
    saved, or the model was changed after it was built.
    """
    _check_class(model)
    config: dict[str, Any] = model.config  # type: ignore[assignment]
    card = getattr(model, "card", None)
    check_card(card, config["num_classes"])
    unwritten = [f"{key}={value!r}" for key, value in config.items() if not _is_plain(value)]
    if unwritten:
        raise ValueError(
            f"a model with {', '.join(unwritten)} cannot be written to {CONFIG}; save its state_dict(), or build it "
            f'with a neuron of the kit by name and options, such as neuron={{"name": "lif", "tau": 3.0}}'
        )
    changed = [*_tied(model), *_changes(model)]
    if changed:
        raise ValueError(
            f"the model is no longer as it was built and would not load as it is: {listed(changed, 6)}; build it "
            f"with these options (create_model(..., time_steps=...)) and load the weights, or save its state_dict()"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: tensors that share one storage without overlapping, such as slices of a flat vector, are saved separately.
    layout = torch.contiguous_format
    weights = {key: value.detach().cpu().clone(memory_format=layout) for key, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    said = {CARD: card.written()} if card is not None else {}
    text = json.dumps({"model": type(model).__name__, **config, **said}, indent=2) + "\n"
    write_text(folder / CONFIG, text)


def _check_class(model: Any) -> None:
    """Raises `TypeError` unless the model's own class is registered."""
    known = {name: family.model for name, family in families().items()}
    name = type(model).__name__
    if type(model) in known.values():
        return
    parents = [parent for parent, kind in known.items() if isinstance(model, kind)]
    if parents:
        raise TypeError(
            f"{name} is a class derived from {parents[0]}, which load_model would not build again; register({name}) "
            f"with @keeps_options on its constructor, both of sdt_blocks.models, or save its state_dict()"
        )
    raise TypeError(
        f"save_model takes a model of {', '.join(known)}, got {name}; of a wrapper, give the model inside "
        f"(model.module, or model._orig_mod after torch.compile)"
    )


def _is_plain(value: Any) -> bool:
    """Whether a value survives JSON."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _tied(model: nn.Module) -> list[str]:
    """Entries of the state_dict that share memory, which a file of separate tensors cannot express."""
    found, spans = [], []
    for key, value in model.state_dict().items():
        if value.is_meta or value.numel() == 0:
            continue
        start = value.data_ptr()
        length = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        spans.append((start, start + length * value.element_size(), key))
    spans.sort()
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            found.append(f"{one} and {other} share their memory (tied weights would come apart)")
    return found


def _changes(model: nn.Module) -> list[str]:
    """What differs between the model and a new one with its config, apart from weights."""
    with torch.device("meta"):
        new = type(model)(**model.config)  # type: ignore[arg-type]
    ours, theirs = (dict(one.named_modules(remove_duplicate=False)) for one in (model, new))
    changes = [f"{name} was {'added' if name in ours else 'removed'}" for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        changes += _module_changes(name or type(model).__name__, ours[name], theirs[name])
    before, after = (dict(_tensors(one)) for one in (new, model))
    changes += [f"{name} was {'added' if name in after else 'removed'}" for name in after.keys() ^ before.keys()]
    for key in after.keys() & before.keys():
        value, built = after[key], before[key]
        floats = value.dtype in DTYPES and built.dtype in DTYPES
        if value.shape != built.shape or (value.dtype != built.dtype and not floats):
            expected = f"{list(built.shape)} of {built.dtype}"
            changes.append(f"{key} is {list(value.shape)} of {value.dtype}, was {expected}")
        elif value.is_meta:
            changes.append(f"{key} is on the meta device and holds no numbers")
    return sorted(changes)


def _module_changes(name: str, one: nn.Module, other: nn.Module) -> Iterator[str]:
    if type(one) is not type(other) and not isinstance(one, nn.SyncBatchNorm):
        yield f"{name} is {type(one).__name__}, was {type(other).__name__}"
        return
    if any(vars(one)[kind] for kind in _FORWARD_HOOKS):
        yield f"{name} has a forward hook, which is not saved (remove it by its handle)"
    # accelerate replaces the class's forward by one with autocast, and keeps the original.
    if "forward" in vars(one) and "_original_forward" not in vars(one):
        yield f"{name} has another forward than its class"
    before = _settings(other)
    for key, value in _settings(one).items():
        if key in before and value != before[key]:
            yield f"{name}.{key} is {value!r}, was {before[key]!r}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, including those that a state_dict leaves out."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes that can affect results in eval mode."""
    values = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in ("training", "momentum")
    }
    # snnTorch stores the reset as a tensor once it is changed.
    single = {key: value for key, value in values.items() if isinstance(value, Tensor) and value.numel() == 1}
    values |= {key: value.item() for key, value in single.items() if not value.is_meta}
    kept = {key: value for key, value in values.items() if isinstance(value, int | float | str | tuple | None)}
    return kept | {key: repr(value) for key, value in values.items() if key == "surrogate"}


def load_model(folder: str | os.PathLike[str], *, new_head: bool = False, **overrides: Any) -> Any:
    """The model that `save_model` wrote, in eval mode. From a recipe's run folder, its best model, or else its last.

    `overrides` are options of the model's class; `new_head=True` leaves the head newly initialized, for `num_classes`
    of other data, and `num_classes=0` removes it. `model.card` is the one it was saved with. Raises
    `FileNotFoundError` or `ValueError` naming file and cause.
    """
    found = find_saved(folder)
    try:
        kind, options, card = _read(json.loads((found / CONFIG).read_text(encoding="utf-8")))
        check_names(overrides, kind)
        with torch.device("meta"):
            built = kind(**{**options, **overrides})
            # If the overrides change their number, the names of the classes are left out.
            check_card(card, options.get("num_classes", built.config["num_classes"]))  # type: ignore[index]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{found / CONFIG}: {error}") from None
    weights = load_safely(found / WEIGHTS)
    try:
        return build_filled(kind, options, overrides, weights, new_head=new_head, card=card).eval()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{found / WEIGHTS}: {error}") from None


def find_saved(folder: str | os.PathLike[str]) -> Path:
    """The folder of the model that `load_model` loads. Raises `FileNotFoundError`, also for an incomplete model."""
    folder = Path(folder)
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder}: a file; load_model takes a folder, and load_released_checkpoint a released file"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for place in (folder, folder / "best", folder / "last"):
        missing = [name for name in (WEIGHTS, CONFIG) if not (place / name).is_file()]
        if not missing:
            return place
        if len(missing) == 1 and place != folder:
            raise FileNotFoundError(f"{place}: {missing[0]} is missing, half of the model is there")
    raise FileNotFoundError(f"{folder}: no {WEIGHTS} with its {CONFIG} here, nor in best/ or last/")


def _read(config: Any) -> tuple[type[nn.Module], dict[str, Any], DataCard | None]:
    """Class, options and card from a config.json's content. Raises `ValueError` or `TypeError`.

    The values of the options are checked by the class.
    """
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, found {type(config).__name__}")
    options = dict(config)
    card, name, known = read_card(options.pop(CARD, None)), options.pop("model", None), families()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"of the model {str(name)[:80]!r}, which is unknown; known: {', '.join(known)}")
    check_names(options, known[name].model)
    return known[name].model, options, card
