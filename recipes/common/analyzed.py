"""The analysis in a run folder, and whether it was made of the weights that the run has now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdt_blocks.files import write_text
from sdt_blocks.models.saved import WEIGHTS

from .run_state import MODELS, sha256

ANALYSIS, ENERGY, ANALYZED = "analysis", "energy.json", "analyzed.json"


def note_analyzed(folder: Path, weights: Path) -> None:
    """Write into the folder of an analysis which weights it was made of."""
    write_text(folder / ANALYZED, json.dumps({"weights_sha256": sha256(weights)}) + "\n")


def energy_of(run: Path) -> tuple[dict[str, Any], str]:
    """The run's analysis/energy.json, and a sentence if it was made of weights that the run no longer has.

    Empty if there is none. Raises `ValueError` for a damaged file.
    """
    folder = run / ANALYSIS
    analyzed = read_mapping(folder / ANALYZED).get("weights_sha256")
    weights = [run / name / WEIGHTS for name in MODELS]
    if analyzed is None or analyzed in [sha256(path) for path in weights if path.is_file()]:
        return read_mapping(folder / ENERGY), ""
    return {}, f"{folder} is of weights that the run has no more: no energy is given; analyze the run again"


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no file. Raises `ValueError`."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or have it written again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; delete it, or have it written again")
    return content
