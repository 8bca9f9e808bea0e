"""The registry of model families, and models by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .card import DataCard
from .family import Family, ReleasedKeys
from .options import Keyword, options_of

_FAMILIES: dict[str, Family] = {}


def register(
    model: type[nn.Module],
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    keys: ReleasedKeys | None = None,
    card: DataCard | None = None,
) -> Family:
    """Makes a class of models known to `create_model`, `list_models`, `save_model`, `load_model` and the recipes.

    The constructor takes only keywords, including `num_classes`, and has `@keeps_options`. `variants` are options by
    name; `keys` say how released files name the weights, and `card` describes the data of those released files that
    have as many classes as it names.

    Raises `TypeError` for a class whose constructor does not keep its options or has no `num_classes`, and `ValueError`
    if a name is taken.
    """
    if not hasattr(vars(model).get("__init__"), "keeps_options"):
        raise TypeError(f"the constructor of {model.__name__} needs @keeps_options, so that a model can be built again")
    if "num_classes" not in options_of(model):
        raise TypeError(f"the constructor of {model.__name__} needs the option num_classes; 0 leaves the head out")
    known = _FAMILIES.get(model.__name__)
    if known is not None and known.model.__module__ != model.__module__:
        raise ValueError(f"a model {model.__name__} is registered already, from {known.model.__module__}")
    taken = [name for name in variants or {} if family_with(name) not in (None, known)]
    if taken:
        raise ValueError(f"variants are registered already: {', '.join(taken)}")
    for name, options in (variants or {}).items():
        check_names(options, model, name)
    family = _FAMILIES[model.__name__] = Family(model, dict(variants or {}), keys, card)
    return family


def families() -> dict[str, Family]:
    """The registered families by the name of their class."""
    return dict(_FAMILIES)


def family_with(variant: str) -> Family | None:
    """The family that has this variant."""
    return next((family for family in _FAMILIES.values() if variant in family.variants), None)


def list_models(family: str | None = None) -> list[str]:
    """The names that `create_model` knows, of all families or of the one with this class name.

    >>> list_models("SpikeDrivenTransformer")[:2]
    ['sdt_8_384', 'sdt_10_384']
    """
    if family is not None and family not in _FAMILIES:
        raise ValueError(f"model family {family!r} is unknown; known: {', '.join(_FAMILIES)}")
    return [name for key, one in _FAMILIES.items() if family in (None, key) for name in one.variants]


def create_model(name: str, **overrides: Any) -> Any:
    """A published variant by name; keyword arguments of its class override its values.

    Raises `ValueError` for an unknown name (the message suggests similar ones) and for a value out of bounds,
    `TypeError` for an unknown option and for a value of another type.

    >>> create_model("sdt_2_256", num_classes=100).num_classes
    100
    """
    family = family_with(name) if isinstance(name, str) else None
    if family is None:
        near = difflib.get_close_matches(str(name), list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list_models())}"
        raise ValueError(f"model {name!r} is unknown; {hint}")
    check_names(overrides, family.model)
    return family.model(**{**family.variants[name], **overrides})


def check_names(options: Iterable[str], model: type, owner: str = "") -> None:
    """Raises `TypeError` unless each of the options is a keyword of the model's constructor."""
    known = options_of(model)
    unknown = sorted(str(name)[:80] for name in options if name not in known)
    if unknown:
        of = f" of {owner}" if owner else ""
        raise TypeError(f"unknown model option {', '.join(unknown)}{of}; the options are {', '.join(known)}")


def model_options(name: str | None = None) -> dict[str, Keyword]:
    """The keywords of a named variant's class, or of all families together."""
    found = [family for family in _FAMILIES.values() if name is None or name in family.variants]
    return {key: keyword for family in reversed(found) for key, keyword in options_of(family.model).items()}
