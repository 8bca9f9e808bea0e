"""A recipe's own arguments: `key=value` into a dataclass whose fields are `schema.option`s."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from .config import ConfigError, check_bounds, help_line, read_value
from .values import shown

T = TypeVar("T")


def read_options(kind: type[T], arguments: Sequence[str]) -> T:
    """The options that the arguments set, each read according to its type; of repeated keys the last counts.

    Raises `ConfigError` for a value of another type or out of bounds.
    """
    kinds, values = typing.get_type_hints(kind), {}
    bounds = {item.name: item.metadata for item in fields(kind)}  # type: ignore[arg-type]
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in kinds:
            raise ConfigError(f"cannot read the argument {shown(argument)}; write {key}=VALUE")
        values[key] = read_value(key, text, kinds[key], bounds[key])
    for key, value in values.items():
        check_bounds(key, value, bounds[key])
    return kind(**values)


def split_options(kind: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """`read_options` of the arguments of this kind, and all others in their order. Raises `ConfigError`."""
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    own = [argument for argument in arguments if argument.partition("=")[0] in names]
    return read_options(kind, own), [argument for argument in arguments if argument not in own]


def changed_options(options: Any, *names: str) -> dict[str, Any]:
    """Those of the named options that differ from their defaults."""
    defaults = type(options)()
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(defaults, name)}


def own_help(kind: type) -> str:
    """The keys with their meaning, as `--help` prints them."""
    defaults = kind()
    lines = ["Keys of this recipe alone:"]
    lines += [help_line(item.name, getattr(defaults, item.name), item.metadata) for item in fields(kind)]
    return "\n".join(lines)
