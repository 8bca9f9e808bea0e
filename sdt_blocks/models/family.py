"""What the kit knows about a family of models: its class, published variants, and how to read its authors' files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..blocks.sizes import hidden_width
from .card import DataCard
from .options import Keyword, options_of


@dataclass(frozen=True)
class ReleasedKeys:
    """How the authors of a family named its weights."""

    renames: Sequence[tuple[str, str | Callable[[Any], str]]]
    """Prefixes of the released state_dict (patterns) and their replacements here (as in `re.sub`)."""
    read_options: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    """Options of the class from a released state_dict; raises `ValueError` if they cannot be read."""
    unread: Callable[[Mapping[str, Tensor]], Sequence[str]]
    """Options that change the answers and that no weight of a released state_dict tells."""
    arguments: Mapping[str, str]
    """Options that the training arguments of a released file tell, and their names there."""
    title: str
    """The name of the family in messages."""
    unused: str = ""
    """A pattern of whole keys that are released but never used in the forward pass."""
    weed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    """Removes from a released state_dict what cannot be recognized by a pattern of keys."""

    def options(self, state_dict: Mapping[str, Tensor], args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Options of the class, as the weights and then the training arguments tell, and those of `unread` left open.

        Raises `ValueError`.
        """
        told = {ours: args[theirs] for ours, theirs in self.arguments.items() if args.get(theirs) is not None}
        read, unread = self.read_options(state_dict), self.unread(state_dict)
        read |= {name: value for name, value in told.items() if name in unread or name not in read}
        return read, [name for name in unread if name not in told]

    def renamed(self, key: str) -> str | None:
        """The name here of a released key: "" if nothing uses it, `None` if it does not belong to the family."""
        if re.fullmatch(self.unused, key):
            return ""
        for pattern, ours in self.renames:
            if re.match(pattern, key):
                return re.sub(f"^{pattern}", ours, key, count=1)
        return None


@dataclass(frozen=True)
class Family:
    """A class of models with its variants."""

    model: type[nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    """Published variants: what differs from the defaults of the class."""
    keys: ReleasedKeys | None
    card: DataCard | None = None
    """The card of released files that have as many classes as it names."""

    @property
    def name(self) -> str:
        """The name of the class, as in `config.json`."""
        return self.model.__name__

    @property
    def options(self) -> dict[str, Keyword]:
        """The keyword arguments of the class."""
        return options_of(self.model)


def shape_of(state_dict: Mapping[str, Tensor], key: str) -> Sequence[int]:
    """The shape of a released tensor. Raises `ValueError` naming the key if it is missing."""
    if key not in state_dict:
        raise ValueError(f"the architecture cannot be read from the weights: {key} is missing")
    return state_dict[key].shape


def count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """The number of blocks `{prefix}0.`, `{prefix}1.`, ... Raises `ValueError` if a number is missing."""
    found = {key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)}
    missing = [number for number in range(len(found)) if str(number) not in found]
    if missing:
        last = max(found, key=lambda number: (len(number), number))
        raise ValueError(f"the blocks are not numbered 0 to {len(found) - 1}: {prefix}{last} is there")
    return len(found)


def read_mlp_ratio(state_dict: Mapping[str, Tensor], key: str, dim: int) -> float:
    """The ratio of the hidden channels, the rows of a released MLP's first weight, to dim.

    `hidden_width` gives the same number of channels again.
    """
    hidden = shape_of(state_dict, key)[0]
    ratio = hidden / dim
    return ratio if hidden_width(dim, ratio) == hidden else math.nextafter(ratio, math.inf)


def count_classes(state_dict: Mapping[str, Tensor]) -> int:
    """The number of classes of a released head, 0 without one."""
    return state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0
