"""The files that the papers' authors released. None is ever unpickled in full."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .family import Family
from .registry import FAMILIES


def convert_released_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released models' state_dict under this kit's names, without `module.` prefixes and never-used entries.

    Raises `ValueError` that lists every key that is not of a released model, or not of the one that most are of.
    """
    return _converted(state_dict, _family_of(state_dict))


def _family_of(state_dict: Mapping[str, Tensor]) -> Family:
    """The family that most keys are of."""
    return max(FAMILIES, key=lambda family: sum(_renamed(key, family) is not None for key in state_dict))


def _renamed(key: str, family: Family) -> str | None:
    """What a released key is called here: "" if nothing uses it, `None` if it is not one of the family's."""
    name = key.removeprefix("module.")
    if re.fullmatch(family.unused, name):
        return ""
    for pattern, ours in family.keys:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", ours, name, count=1)
    return None


def _converted(state_dict: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    names = {key: _renamed(key, family) for key in state_dict}
    unexpected = [key for key, name in names.items() if name is None]
    if unexpected:
        kind = f"a released {family.name}" if len(unexpected) < len(names) else "a released model"
        raise ValueError(f"not the state_dict of {kind}; unexpected: {_listed(unexpected)}")
    # A 1-D convolution over the tokens is a 1x1 convolution over the plane.
    return {
        name: value.unsqueeze(-1) if value.ndim == 3 else value
        for name, value in zip(names.values(), state_dict.values(), strict=True)
        if name
    }


def load_released_checkpoint(path: str | os.PathLike[str], *, ema: bool = False, **overrides: Any) -> Any:
    """The model of a released file (`.pth.tar`, `.pth`), or of a bare state_dict in a file, in eval mode.

    The family, the architecture and a second head are read from the weights and the file's training arguments;
    `overrides` (options of the model's class, such as `time_steps=4`) win. `ema=True` takes `state_dict_ema`.

    Only tensors and one `argparse.Namespace` are unpickled. Raises `FileNotFoundError`; `ValueError` naming the file
    and the cause where it is damaged, wants another class, or does not match the architecture.
    """
    path = Path(path)
    content = _load_weights_only(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a checkpoint or a state_dict, found {type(content).__name__}")
    args: Mapping[str, Any] = {}
    state_dict: Any = content
    entries = ["state_dict_ema"] if ema else [name for name in ("state_dict", "model") if name in content]
    if entries:
        if not isinstance(content.get(entries[0]), Mapping):
            raise ValueError(f"{path}: has no {entries[0]!r}; it holds {_listed(content)}")
        args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
        state_dict = content[entries[0]]
    try:
        released = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
        family = _family_of(released)
        converted = _converted(released, family)
        model = family.model(**{**family.read_options(released, args), **overrides})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    load_strictly(model, converted, path)
    return model.eval()


def _load_weights_only(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a released .pth.tar")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if wanted:
            raise ValueError(
                f"{path}: refused, it wants to run {wanted[1]}; only tensors and one argparse.Namespace are read"
            ) from None
        raise ValueError(f"{path}: refused or damaged ({_first_line(error)})") from None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: truncated or not a torch file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_strictly(model: torch.nn.Module, state_dict: Mapping[str, Tensor], path: Path) -> None:
    check_fit(model, state_dict, path)
    model.load_state_dict(state_dict)


def check_fit(model: torch.nn.Module, state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Raises `ValueError` naming the file unless the weights have the model's names and shapes."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    wrong = [
        f"{key} is {list(state_dict[key].shape)}, the model has {list(expected[key].shape)}"
        for key in expected
        if key in state_dict and state_dict[key].shape != expected[key].shape
    ]
    faults = [
        f"{what}: {_listed(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if keys
    ]
    if faults:
        raise ValueError(f"{path}: the weights do not match the model; {'; '.join(faults)}")


def _listed(names: Any, most: int = 12) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
