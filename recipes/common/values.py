"""Reads the values of a configuration: the text of a command line or a YAML file, by the type of the key.

    convert("3e-4", float)  # 0.0003
    convert("010", int)     # ValueError: expected a whole number, got '010'

Text is read according to the key's type, never by its look: a reader that guesses takes 010 for eight and "no" for
false.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
import types
import typing
from typing import Any

import yaml

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_NULL = ("", "null", "~")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def convert(value: Any, kind: Any, *, path: bool = False) -> Any:
    """`value` as `kind`: bool, int, float, str, a list of these, or a union with None; in a `path` `~` is expanded.

    Text is parsed; anything else must have the type already, except that a whole number may stand for a number. Raises
    `ValueError` with what was expected and what was given; the text "None" is refused where null could be meant.
    """
    kinds = alternatives(kind)
    if value is None or (isinstance(value, str) and value in _NULL):
        if type(None) in kinds:
            return None
        if value != "" and str not in kinds:
            raise ValueError(f"expected {describe(kind)}, got null")
    wanted = next(one for one in kinds if one is not type(None))
    if typing.get_origin(wanted) is list:
        return _convert_list(value, wanted, kind)
    if isinstance(value, str):
        if value == "None" and wanted is str and type(None) in kinds:
            raise ValueError("expected text or null, got 'None'; write null where nothing is meant")
        return expand_home(_read(value, wanted, kind)) if path else _read(value, wanted, kind)
    if wanted is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not wanted:
        raise ValueError(f"expected {describe(kind)}, got {shown(value)}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return value


def _read(text: str, wanted: Any, kind: Any) -> Any:
    if wanted is str:
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"expected text in UTF-8 without a zero byte, got {shown(text)}")
        return text
    if wanted is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    # Python itself refuses to read more than 4300 digits.
    if wanted is int and _WHOLE.fullmatch(text) and len(text) < 4000:
        return int(text)
    if wanted is float and (_NUMBER.fullmatch(text) or _NOT_FINITE.fullmatch(text)):
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if not math.isfinite(number):
            raise ValueError(f"expected a finite number, got {shown(text)}")
        return number
    raise ValueError(f"expected {describe(kind)}, got {shown(text)}")


def _convert_list(value: Any, wanted: Any, kind: Any) -> list[Any]:
    given = value
    if isinstance(value, str):
        try:
            value = read_yaml(value)
        except (yaml.YAMLError, RecursionError):
            value = None
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected {describe(kind)}, got {shown(given)}")
    try:
        return [convert(one, typing.get_args(wanted)[0]) for one in value]
    except ValueError as error:
        raise ValueError(f"expected {describe(kind)}, got {shown(given)}: {error}") from None


def expand_home(path: str) -> str:
    """A path with `~` replaced by the home folder: no shell does it in a file, and not every one in `key=~/folder`."""
    return os.path.expanduser(path)


class _Reader(yaml.BaseLoader):
    """YAML whose scalars all stay as text, and whose keys must be unique."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), names[0])
            raise yaml.constructor.ConstructorError(None, None, f"the key {shown(twice)} stands twice", node.start_mark)
        return mapping


def read_yaml(text: str | bytes) -> Any:
    """Mappings, lists and text. Raises `yaml.YAMLError`, or `RecursionError` if it is nested too deeply."""
    return yaml.load(text, _Reader)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def describe(kind: Any) -> str:
    """A type in words."""
    return " or ".join(_NAMES.get(k, "a list of numbers such as [0.1, 0.9]") for k in alternatives(kind))


def shown(value: Any, most: int = 60) -> str:
    """A value as shown in an error: long ones are cut in the middle."""
    if isinstance(value, str):
        text = repr(value)
        cut = f"{text[: most // 2]}...{text[-most // 4 :]} ({len(value)} characters)"
        return text if len(text) <= most else cut
    if isinstance(value, int) and abs(value) >= 10**most:
        return f"a number of more than {most} digits"
    return reprlib.repr(value) if isinstance(value, list | tuple | dict) else repr(value)
