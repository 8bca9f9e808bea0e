"""Models by name."""

from __future__ import annotations

import difflib
from typing import Any

from . import meta_spikeformer, sdt
from .family import Family

FAMILIES: tuple[Family, ...] = (sdt.FAMILY, meta_spikeformer.FAMILY)
"""Every kind of model; another one is added here."""


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return [name for family in FAMILIES for name in family.variants]


def create_model(name: str, **overrides: Any) -> Any:
    """A published variant by name; keyword arguments of its class override its values.

    Raises `ValueError` for an unknown name (the message lists the near ones) and `TypeError` for an unknown option.

    >>> create_model("sdt_2_256", num_classes=100).num_classes
    100
    """
    family = next((family for family in FAMILIES if name in family.variants), None)
    if family is None:
        known = list_models()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"model {name!r} is unknown; {hint}")
    options = {**family.variants[name], **overrides}
    unknown = sorted(set(options) - set(family.options))
    if unknown:
        raise TypeError(f"unknown model option {', '.join(unknown)}; the options are {', '.join(family.options)}")
    return family.model(**options)
