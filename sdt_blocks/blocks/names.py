"""Parts of a block under further names."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Named(nn.Module):
    """A module whose parts can also be had, and replaced, under the names in `names`: those of the released weights.

    `names` holds the path of each, `"q_conv": "q.conv"`; a path with `*` gives a tuple, one for each entry of a list.
    The state_dict has every part once, under its path.
    """

    names: ClassVar[dict[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        path = type(self).names.get(name)
        if path is None:
            return super().__getattr__(name)
        before, several, after = path.partition(".*.")
        if not several:
            return self.get_submodule(path)
        entries: Any = self.get_submodule(before)
        return tuple(entry.get_submodule(after) for entry in entries)

    def __setattr__(self, name: str, value: Any) -> None:
        path = type(self).names.get(name)
        if path is None:
            super().__setattr__(name, value)
        elif "*" in path:
            raise AttributeError(f"{name} cannot be replaced as a whole; its entries are {path}")
        else:
            parent, _, last = path.rpartition(".")
            setattr(self.get_submodule(parent), last, value)
