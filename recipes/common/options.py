"""A recipe's own arguments: `key=value` into a dataclass whose fields are `schema.option`s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import ConfigError, check_bounds

T = TypeVar("T")


def read_options(kind: type[T], arguments: Sequence[str]) -> T:
    """The options that the arguments set. Raises `ConfigError` for a value of another type or out of bounds."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(list(arguments)))
        options: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(arguments)}: {error}") from None
    for item in fields(options):
        check_bounds(item.name, getattr(options, item.name), item.metadata)
    return options  # type: ignore[no-any-return]


def own_help(kind: type) -> str:
    """The keys with their meaning, as `--help` prints them."""
    defaults = kind()
    lines = ["Keys of this recipe alone:"]
    for item in fields(kind):
        value = getattr(defaults, item.name)
        lines.append(f"  {item.name}={'null' if value is None else value}: {item.metadata['help']}")
    return "\n".join(lines)
