"""Models by name."""

from __future__ import annotations

import difflib
from typing import Any

from .sdt import VARIANTS, SpikeDrivenTransformer


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(VARIANTS)


def create_model(name: str, **overrides: Any) -> SpikeDrivenTransformer:
    """A published variant by name; keyword arguments of `SpikeDrivenTransformer` override its values.

    Raises `ValueError` for an unknown name (the message lists the near ones) and `TypeError` for an unknown option.

    >>> create_model("sdt_2_256", num_classes=100).num_classes
    100
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(VARIANTS)}"
        raise ValueError(f"model {name!r} is unknown; {hint}")
    options = {**VARIANTS[name], **overrides}
    unknown = sorted(set(options) - set(model_options()))
    if unknown:
        raise TypeError(f"unknown model option {', '.join(unknown)}; the options are {', '.join(model_options())}")
    return SpikeDrivenTransformer(**options)


def model_options() -> list[str]:
    """The keyword arguments of `SpikeDrivenTransformer`."""
    annotations = SpikeDrivenTransformer.__init__.__annotations__
    return [name for name in annotations if name != "return"]
