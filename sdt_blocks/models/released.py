"""The files that the papers' authors released. None is ever unpickled in full."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sdt import SpikeDrivenTransformer

_PARTS = {"conv": "{}.conv.", "bn": "{}.norm.", "lif": "{}_neuron."}
_PATCH = {"conv": "patch.stages.{}.conv.", "bn": "patch.stages.{}.norm.", "lif": "patch.neurons.{}."}
_MLP = {"conv": "fc{}.conv.", "bn": "fc{}.norm.", "lif": "neuron{}."}


def _attention(block: str) -> str:
    return f"blocks.{block}.attention.branch."


# Released prefixes, and what they are called here.
_RENAMES: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (r"patch_embed\.proj_(conv|bn|lif)(\d?)\.", lambda m: _PATCH[m[1]].format(m[2] or 0)),
    (r"patch_embed\.rpe_(conv|bn)\.", lambda m: "patch." + _PARTS[m[1]].format("position")),
    (r"block\.(\d+)\.attn\.(q|k|v|proj)_(conv|bn|lif)\.", lambda m: _attention(m[1]) + _PARTS[m[3]].format(m[2])),
    (r"block\.(\d+)\.attn\.shortcut_lif\.", lambda m: f"{_attention(m[1])}neuron."),
    (r"block\.(\d+)\.attn\.talking_heads_lif\.", lambda m: f"{_attention(m[1])}mixer.neuron."),
    (r"block\.(\d+)\.mlp\.fc([12])_(conv|bn|lif)\.", lambda m: f"blocks.{m[1]}.mlp.branch." + _MLP[m[3]].format(m[2])),
    (r"head_lif\.", lambda m: "head_neuron."),
    (r"head\.", lambda m: "head."),
]
# In the released state_dict, but never used in its forward pass.
_UNUSED = re.compile(r"block\.\d+\.attn\.(talking_heads\.weight|attn_lif\.w)|patch_embed\.rpe_lif\.w")


def convert_released_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released models' state_dict under this kit's names, without `module.` prefixes and never-used entries.

    Raises `ValueError` that lists every key that is not of a released model.
    """
    converted: dict[str, Tensor] = {}
    unexpected = []
    for key, value in state_dict.items():
        name = key.removeprefix("module.")
        if _UNUSED.fullmatch(name):
            continue
        for pattern, rename in _RENAMES:
            match = re.match(pattern, name)
            if match:
                converted[rename(match) + name[match.end() :]] = value
                break
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(f"not the state_dict of a released model; unexpected: {_listed(unexpected)}")
    return converted


def load_released_checkpoint(
    path: str | os.PathLike[str], *, ema: bool = False, **overrides: Any
) -> SpikeDrivenTransformer:
    """The model of a released `.pth.tar`, or of a bare state_dict in a file, in eval mode.

    The architecture is read from the weights' shapes and the file's training arguments; `overrides` (options of
    `SpikeDrivenTransformer`, such as `time_steps=4` or `event_pooling=True`) win. `ema=True` takes `state_dict_ema`.

    Only tensors and one `argparse.Namespace` are unpickled. Raises `FileNotFoundError`; `ValueError` naming the file
    and the cause where it is damaged, wants another class, or does not match the architecture.
    """
    path = Path(path)
    content = _load_weights_only(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a checkpoint or a state_dict, found {type(content).__name__}")
    args: Mapping[str, Any] = {}
    state_dict: Any = content
    if "state_dict" in content or ema:
        wanted = "state_dict_ema" if ema else "state_dict"
        if not isinstance(content.get(wanted), Mapping):
            raise ValueError(f"{path}: has no {wanted!r}; it holds {_listed(content)}")
        args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
        state_dict = content[wanted]
    try:
        released = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
        converted = convert_released_state_dict(released)
        model = SpikeDrivenTransformer(**{**_infer_config(released, args), **overrides})
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


def _infer_config(state_dict: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            raise ValueError(f"the architecture cannot be read from the weights: {key} is missing")
        return state_dict[key].shape

    blocks = {int(m[1]) for key in state_dict if (m := re.match(r"block\.(\d+)\.", key))}
    if blocks and max(blocks) >= len(blocks):
        raise ValueError(f"the blocks are not numbered 0 to {len(blocks) - 1}: block.{max(blocks)} is there")
    dim = shape("patch_embed.proj_conv3.weight")[0]
    config: dict[str, Any] = {
        "depth": max(blocks, default=-1) + 1,
        "dim": dim,
        "in_channels": shape("patch_embed.proj_conv.weight")[1],
        "num_classes": state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        "neuron": "plif" if "head_lif.w" in state_dict else "lif",
    }
    if blocks:
        config["mlp_ratio"] = shape("block.0.mlp.fc1_conv.weight")[0] / dim
    heads = state_dict.get("block.0.attn.talking_heads.weight")
    if heads is not None:
        config["num_heads"] = heads.shape[0]
    elif "num_heads" in args:
        config["num_heads"] = args["num_heads"]
    for ours, theirs in {"time_steps": "time_steps", "pooling": "pooling_stat", "per_step": "TET"}.items():
        if args.get(theirs) is not None:
            config[ours] = args[theirs]
    if args.get("dvs_mode") is not None:
        config["event_pooling"] = bool(args["dvs_mode"])
    return config


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
