"""Checkpoints of a run: numbered, whole or absent, verified before they are read, and exact to resume from.

    runs/digits/checkpoints/step_00000220/
        model.safetensors, config.json    the model, as `sdt_blocks.load_model` reads it
        ema/                              the averaged weights, likewise (train.ema_decay)
        training.pt                       optimiser, gradient scaler, position
        manifest.json                     size and SHA-256 of each file above

No generator state is stored: every draw of a run (order, augmentation, mixing, stochastic depth, on each process) is
keyed by the seed and the position, see `seed_step` and `loading.EpochBatches`. The learning rate is a function of the
step.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from config import ConfigError, RunError
from progress import warn
from safetensors import SafetensorError
from torch import nn

from sdt_blocks import load_model, save_model

CHECKPOINTS, MANIFEST, TRAINING = "checkpoints", "manifest.json", "training.pt"


@dataclass
class Position:
    """Where a run stands, and the sums that the next line of metrics.jsonl is made of."""

    step: int = 0
    """Updates done."""
    closed: int = 0
    """Updates done when the last line of metrics.jsonl was written."""
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0
    nonfinite: int = 0
    """Updates left out for a non-finite loss so far."""
    loss_sum: float = 0.0
    loss_count: int = 0
    total_batch: int = 0
    samples: int = 0
    """Size of the training set: with `total_batch` it gives the step its meaning."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that the trajectory depends on."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Keys the global generators (Python, NumPy, torch on every device) by the position, for draws within a step."""
    set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def save_checkpoint(
    folder: Path,
    position: Position,
    *,
    model: Any,
    ema: Any | None,
    optimizer_state: dict[str, Any],
    scaler_state: dict[str, Any] | None,
    keep: int,
) -> Path:
    """Writes one checkpoint whole and then removes all but the `keep` newest. Called by the first process only.

    Raises `RunError` where the weights are not finite or the disk refuses; earlier checkpoints stay as they are.
    """
    check_finite(model, folder)
    parent = folder / CHECKPOINTS
    target = parent / f"step_{position.step:08d}"
    temporary: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".writing_"))
        save_model(model, temporary)
        if ema is not None:
            save_model(ema, temporary / "ema")
        training = {"optimizer": optimizer_state, "scaler": scaler_state, "position": asdict(position)}
        torch.save(training, temporary / TRAINING)
        _write_manifest(temporary)
        temporary.chmod(0o755)
        replaced = temporary.with_name(f"{temporary.name}_replaced")
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
        _sync(parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as the last
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"the checkpoint of step {position.step} cannot be written to {parent} ({error}); {last_good(folder)}"
        ) from error
    for old in _numbered(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST]:
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    return sorted((folder / CHECKPOINTS).glob("step_*"), reverse=True)


def last_good(folder: Path) -> str:
    """Half a sentence that names the newest undamaged checkpoint."""
    good = next((path for path in _numbered(folder) if not damage(path)), None)
    return f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty where every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, written in manifest.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {written['bytes']}"
            if sha256(path) != written["sha256"]:
                return f"{name} has another content than was written"
        missing = {"model.safetensors", "config.json", TRAINING} - set(manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return f"{MANIFEST} does not list {', '.join(sorted(missing))}" if missing else ""


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to start from: for "auto" the newest good one of the run folder; each damaged one gives a warning.

    Raises `ConfigError` where a named checkpoint is missing or damaged, and where "auto" finds damaged ones only.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        if not (path / MANIFEST).is_file() and _numbered(path):
            return find_checkpoint(path, "auto")
        fault = damage(path) if path.is_dir() else "there is no such folder"
        if fault:
            raise ConfigError(f"resume={resume}: not a good checkpoint of a run: {fault}")
        return path
    candidates = _numbered(folder)
    for path in candidates:
        fault = damage(path)
        if not fault:
            return path
        warn(f"the checkpoint {path} is damaged and skipped: {fault}")
    if candidates:
        raise ConfigError(f"every checkpoint in {folder / CHECKPOINTS} is damaged; set resume=none to start anew")
    return None


def set_aside_newer(folder: Path, step: int) -> None:
    """Renames the checkpoints after `step`, damaged or gone back on, so that they never count as the newest."""
    for path in _numbered(folder):
        if path.name > f"step_{step:08d}":
            aside = path.with_name(f"set_aside_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def load_checkpoint(checkpoint: Path, model: nn.Module, ema: nn.Module | None) -> dict[str, Any]:
    """Fills model and averaged model; returns `optimizer`, `scaler` and `position`. Only tensors are unpickled."""
    try:
        model.load_state_dict(load_model(checkpoint).state_dict())
        if ema is not None:
            ema.load_state_dict(load_model(checkpoint / "ema").state_dict())
        training = torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
        training["position"] = Position(**training["position"])
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"cannot resume from {checkpoint}: {error}") from error
    return training


def check_settings(
    position: Position, settings: dict[str, Any], *, total_batch: int, samples: int, source: Path
) -> None:
    """Raises `ConfigError` where the run that wrote the checkpoint would have gone on differently."""
    changed = [
        f"{key} is {settings.get(key)} and was {position.settings.get(key)}"
        for key in {**position.settings, **settings}
        if settings.get(key) != position.settings.get(key)
    ]
    if position.total_batch != total_batch:
        changed.append(
            f"the total batch (processes x accumulate x batch_size) is {total_batch} and was {position.total_batch}"
        )
    if position.samples != samples:
        changed.append(f"the training set has {samples} samples and had {position.samples}")
    if changed:
        raise ConfigError(
            f"{source} belongs to a run with other settings: {'; '.join(changed)}. Use the same settings to resume it, "
            f"another output_dir for another run, or resume=none to start anew in this one"
        )


def check_finite(model: nn.Module, folder: Path) -> None:
    """Raises `RunError` where a weight or a batch statistic is NaN or infinite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise RunError(f"{name} is no longer finite; {last_good(folder)}. Lower optim.lr or set optim.clip_grad")


def open_folder(folder: Path, resume: str, *, needed: int) -> Path | None:
    """Makes the run folder ready for writing and returns the checkpoint to start from, if any.

    Leftovers of interrupted writes go, and with `resume="none"` what an earlier run left. Raises `ConfigError` where
    nothing can be written, where the disk has less than `needed` bytes, or where a finished run would be overwritten
    unasked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: no files can be written there ({error})") from error
    if free < needed:
        raise ConfigError(
            f"output_dir={folder}: the checkpoints need about {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; "
            f"make room, choose another output_dir or lower train.keep_checkpoints"
        )
    for leftover in (folder / CHECKPOINTS).glob(".writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is None:
        if resume != "none" and (folder / "summary.json").exists():
            raise ConfigError(
                f"output_dir={folder} holds a finished run without checkpoints; choose another output_dir, or "
                f"resume=none to start anew in this one"
            )
        for name in (CHECKPOINTS, "best", "last", "ema"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "summary.json", "curves.png"):
            (folder / name).unlink(missing_ok=True)
    elif folder.resolve() not in checkpoint.resolve().parents and _numbered(folder):
        raise ConfigError(
            f"resume={resume} is of another run than the one in output_dir={folder}; choose another output_dir"
        )
    return checkpoint


def state_digest(model: nn.Module) -> str:
    """SHA-256 over all weights and batch statistics in order, to compare models across processes."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
