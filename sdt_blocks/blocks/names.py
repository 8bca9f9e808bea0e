"""Further names for the parts of a block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn


class Named(nn.Module):
    """A module whose parts can also be read and replaced under the names in `names`: those of the released weights.

    `names` maps each name to a path, as in `"q_conv": "q.conv"`; a path with `*` gives a tuple with one part for each
    entry of a list. The state_dict contains every part once, under its path; one with the names instead loads too.
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key, path in paths_of(self, state_dict, prefix).items():
            state_dict[path] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def paths_of(module: nn.Module, keys: Iterable[str], prefix: str = "") -> dict[str, str]:
    """For the keys of a state_dict that use one of `names` for a part of `module`, the key with the part's path.

    A key is left out if `keys` contains the path as well.
    """
    named = [(prefix + (f"{place}." if place else ""), one) for place, one in module.named_modules()]
    starts = {
        f"{place}{name}.": f"{place}{path}."
        for place, one in named
        if isinstance(one, Named)
        for name, path in type(one).names.items()
    }
    given, found = set(keys), {}
    for key in given:
        for start, path in starts.items():
            if not key.startswith(start):
                continue
            rest = key.removeprefix(start)
            if "*" in path:
                entry, _, rest = rest.partition(".")
                path = path.replace("*", entry)
            if f"{path}{rest}" not in given:
                found[key] = f"{path}{rest}"
    return found
