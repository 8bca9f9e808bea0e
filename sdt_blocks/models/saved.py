"""A model in a folder: `model.safetensors` and `config.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import write_atomically
from .registry import model_options
from .released import load_strictly
from .sdt import SpikeDrivenTransformer

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_model(model: SpikeDrivenTransformer, folder: str | os.PathLike[str]) -> None:
    """Writes `model.safetensors` and `config.json` into the folder, each whole or not at all.

    Raises `ValueError` where the neuron is a factory that cannot be written down: use the names "lif" or "plif".
    """
    config = model.config
    if not isinstance(config["neuron"], str):
        raise ValueError(
            f"a model with the neuron factory {config['neuron']!r} cannot be written to {CONFIG}; save its "
            f'state_dict(), or build it with neuron="lif" or "plif"'
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    text = json.dumps({"model": "SpikeDrivenTransformer", **config}, indent=2) + "\n"
    write_atomically(folder / CONFIG, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def load_model(folder: str | os.PathLike[str], **overrides: Any) -> SpikeDrivenTransformer:
    """The model that `save_model` wrote, in eval mode. A recipe's run folder gives its best model, else its last.

    `overrides` are options of `SpikeDrivenTransformer`. Raises `FileNotFoundError` or `ValueError` naming file and
    cause.
    """
    folder = Path(folder)
    candidates = [folder, folder / "best", folder / "last"]
    found = next((c for c in candidates if (c / CONFIG).is_file() and (c / WEIGHTS).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} with its {CONFIG} here, nor in best/ or last/")
    try:
        config = json.loads((found / CONFIG).read_text(encoding="utf-8"))
        options = {key: value for key, value in config.items() if key in model_options()}
        model = SpikeDrivenTransformer(**{**options, **overrides})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{found / CONFIG}: {error}") from None
    try:
        weights = load_file(found / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{found / WEIGHTS}: truncated or not a safetensors file ({error})") from None
    load_strictly(model, weights, found / WEIGHTS)
    return model.eval()
