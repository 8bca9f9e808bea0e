"""`best/` of a run folder, and whether it still has the model whose accuracy the run counts as its best."""

from __future__ import annotations

import json
from pathlib import Path

from sdt_blocks import load_model, save_model
from sdt_blocks.models.saved import WEIGHTS

from .progress import is_silent, warn
from .run_state import CHECKPOINTS, MANIFEST, Position, damage, sha256

BEST = "best"


def restore_best(folder: Path, checkpoint: Path, position: Position) -> None:
    """Make `best/` the model that `position` refers to, when a run continues from a checkpoint.

    The folder has another model, or none, if the run goes back to before the epoch of its best, continues in a new
    folder, or was killed before the checkpoint that knows of a better one. The right one is then taken from the run
    that wrote the checkpoint or from a checkpoint of that epoch. If neither has it, a warning says so, and the model of
    the checkpoint, if it was evaluated, is the best until a better one comes.
    """
    if not position.best_sha256 or _has(folder / BEST, position.best_sha256):
        return
    found = _find(position.best_sha256, checkpoint, folder)
    if found is not None:
        save_model(load_model(found), folder / BEST)
        return
    lost = f"the best model so far (epoch {position.best_epoch}, top-1 {position.best_top1:.2f} %) is no longer there"
    line = position.lines[-1] if position.lines and position.closed == position.step else {}
    position.best_top1, position.best_epoch, position.best_silent, position.best_sha256 = -1.0, 0, True, ""
    if line.get("test_top1") is None:
        warn(f"{lost}; {folder / BEST} is chosen among the epochs from here on")
        return
    save_model(load_model(checkpoint), folder / BEST)
    position.best_top1, position.best_epoch, position.best_silent = line["test_top1"], line["epoch"], is_silent(line)
    position.best_sha256 = sha256(folder / BEST / WEIGHTS)
    warn(f"{lost}; {folder / BEST} is chosen among the epochs from {line['epoch']} on")


def _has(place: Path, digest: str) -> bool:
    return (place / WEIGHTS).is_file() and sha256(place / WEIGHTS) == digest


def _find(digest: str, checkpoint: Path, folder: Path) -> Path | None:
    """The model with these weights, as `load_model` reads it: in the checkpoint, its run, or the run folder."""
    runs = checkpoint.resolve().parent.parent, folder
    for place in [run / BEST for run in runs]:
        if _has(place, digest):
            return place
    for one in [checkpoint, *(path for run in runs for path in sorted((run / CHECKPOINTS).glob("*step_*")))]:
        for place in (one, one / "ema"):
            if _listed(one, place) == digest and not damage(one):
                return place
    return None


def _listed(checkpoint: Path, place: Path) -> str | None:
    """The digest of a model's weights in the manifest of a checkpoint; None if the manifest does not list it."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        written: str = manifest[(place / WEIGHTS).relative_to(checkpoint).as_posix()]["sha256"]
        return written
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
