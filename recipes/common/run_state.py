"""Checkpoints of a run: numbered, complete or absent, verified before they are read, and exact to resume from.

    runs/digits/checkpoints/step_00000220/
        model.safetensors, config.json    the model, as `sdt_blocks.load_model` reads it
        ema/                              the averaged weights, likewise (train.ema_decay)
        training.pt                       optimizer, gradient scaler, position
        manifest.json                     size and SHA-256 of each file above, and which step of which run this is

No generator state is stored: every draw of a run (order, augmentation, mixing, stochastic depth, on each process) is
keyed by the seed and the position, see `seed_step` and `loading.EpochBatches`. The learning rate is a function of the
step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor, nn

from sdt_blocks import DataCard, load_model, save_model
from sdt_blocks.files import sync
from sdt_blocks.models.saved import CONFIG, WEIGHTS

from .config import ConfigError, RunError, make_folder
from .progress import CURVES, DAMAGED, METRICS, warn

CHECKPOINTS, MANIFEST, TRAINING, SUMMARY = "checkpoints", "manifest.json", "training.pt", "summary.json"
MODELS = ("best", "last", "ema")
EPOCHS = "train.epochs"

_STEP = re.compile(r"step_(\d{8,})")
# While a checkpoint is written, and while the one of the same step waits for it: if killed in between, both are found.
_WRITING, _REPLACED = ".writing_", ".replaced_"
_FILES = (WEIGHTS, CONFIG, "config.yaml", SUMMARY, METRICS, DAMAGED, CURVES, "run.lock")
# Left by `write_atomically` if it is killed.
_TEMPORARY = re.compile(rf"\.({'|'.join(re.escape(name) for name in _FILES)})\.[a-z0-9_]{{8}}(\.\w+)?")


@dataclass
class Position:
    """The progress of a run, and the sums for the next line of metrics.jsonl."""

    step: int = 0
    """Updates done."""
    closed: int = 0
    """Updates done when the last line of metrics.jsonl was written."""
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0
    best_silent: bool = True
    """Whether no neuron fired in the evaluation that gave `best_top1`."""
    best_sha256: str = ""
    """Digest of the weights in `best/`; "" if it is not known."""
    nonfinite: int = 0
    """Updates skipped for a non-finite loss so far."""
    loss_sum: float = 0.0
    loss_count: int = 0
    total_batch: int = 0
    samples: int = 0
    """Size of the training set: together with `total_batch` it defines what a step is."""
    labels: str = ""
    """Digest of the training samples' classes in their order; "" if it is not known."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that the trajectory depends on."""
    division: dict[str, Any] = field(default_factory=dict)
    """How an update is divided and computed, which only affects rounding and batch statistics."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What the accuracies are measured on."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl so far."""
    run: str = ""
    """Identifies the run, so that it only removes its own checkpoints."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators (Python, NumPy, torch on every device) by the position, for draws within a step."""
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
    """Write one complete checkpoint and then remove all but the `keep` newest. Called by the first process only.

    Raises `RunError` if the weights are not finite or the disk refuses; earlier checkpoints are left as they are.
    """
    check_finite(model, folder)
    parent = folder / CHECKPOINTS
    target = parent / f"step_{position.step:08d}"
    temporary: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f"{_WRITING}{target.name}_"))
        save_model(model, temporary)
        if ema is not None:
            save_model(ema, temporary / "ema")
        training = {"optimizer": optimizer_state, "scaler": scaler_state, "position": asdict(position)}
        torch.save(training, temporary / TRAINING)
        _write_manifest(temporary, position)
        temporary.chmod(0o755)
        replaced = temporary.with_name(temporary.name.replace(_WRITING, _REPLACED))
        if target.exists() and not _is_own(target):
            _set_aside(target)
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
        sync(parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as the last
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"the checkpoint of step {position.step} cannot be written to {parent} ({error}); {last_good(folder)}"
        ) from error
    for old in [path for path in _numbered(folder) if _is_own(path, position.run)][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write_manifest(folder: Path, position: Position) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    manifest[TRAINING] |= {"step": position.step, "run": position.run}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST]:
        sync(path)
    sync(folder)


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first; a folder with any other name belongs to somebody else."""
    paths = [path for path in (folder / CHECKPOINTS).glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _is_own(path: Path, run: str | None = None) -> bool:
    """Whether a run wrote this step folder under this name: this run, if it is given."""
    if path.is_symlink():
        return False
    try:
        written = json.loads((path / MANIFEST).read_text(encoding="utf-8"))[TRAINING]
        own_step = written.get("step", _step(path)) == _step(path)
        return own_step and (run is None or written.get("run", run) == run)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def last_good(folder: Path) -> str:
    """Half a sentence that names the newest undamaged checkpoint."""
    good = next((path for path in _numbered(folder) if not damage(path)), None)
    return f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if every file is as it was written."""
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return f"{MANIFEST} does not list {', '.join(sorted(missing))}" if missing else ""


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to start from: for "auto" the newest good one of the run folder, with a warning for damaged ones.

    Raises `ConfigError` if a named checkpoint is missing or damaged, and if "auto" finds only damaged ones.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        try:
            if not (path / MANIFEST).is_file() and (_numbered(path) or _not_in_place(path)):
                return find_checkpoint(path, "auto")
            fault = damage(path) if path.is_dir() else "there is no such folder"
        except OSError as error:
            fault = str(error)
        if fault:
            raise ConfigError(
                f"resume={resume}: not a good checkpoint of a run: {fault}; name a run folder or one of its "
                f"{CHECKPOINTS}/step_N, or take resume=auto or resume=none"
            )
        return path
    # Another run's checkpoint that was complete when the run was killed is read in its place.
    waiting = _not_in_place(folder)
    candidates = sorted([*_numbered(folder), *waiting], key=_step, reverse=True)
    for target in candidates:
        path = waiting.get(target, target)
        fault = damage(path)
        if not fault:
            return path
        warn(f"the checkpoint {path} is damaged and skipped: {fault}")
    if candidates:
        raise ConfigError(f"every checkpoint in {folder / CHECKPOINTS} is damaged; set resume=none to start again")
    return None


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, damaged or abandoned, so that they never count as the newest."""
    for path in _numbered(folder):
        if _step(path) > step and (path / MANIFEST).is_file():
            _set_aside(path)


def _set_aside(path: Path) -> None:
    names = (f"set_aside_{path.name}{suffix}" for suffix in ("", *(f"_{n}" for n in range(2, 10**6))))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    warn(f"{path} is set aside as {aside.name}")
    os.replace(path, aside)


def load_checkpoint(checkpoint: Path, model: nn.Module, ema: nn.Module | None) -> dict[str, Any]:
    """Fill model and averaged model; returns `optimizer`, `scaler` and `position`. Only tensors are unpickled."""
    try:
        model.load_state_dict(load_model(checkpoint).state_dict())
        if ema is not None:
            ema.load_state_dict(load_model(checkpoint / "ema").state_dict())
        training = torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
        training["position"] = Position(**training["position"])
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"cannot resume from {checkpoint}: {error}") from error
    return training


def add_cards(folder: Path, card: DataCard) -> None:
    """Add cards to the run's models that were saved without one, since config.yaml no longer names the classes."""
    for place in (folder / name for name in MODELS):
        if (place / CONFIG).is_file():
            with contextlib.suppress(ValueError):  # a damaged model stays as it is
                model = load_model(place)
                if model.card is None:
                    model.card = card
                    save_model(model, place)


def check_settings(
    position: Position, settings: dict[str, Any], *, total_batch: int, samples: int, source: Path, labels: str = ""
) -> None:
    """Raise `ConfigError` if the run that wrote the checkpoint would have continued differently."""
    keys = [key for key in {**position.settings, **settings} if settings.get(key) != position.settings.get(key)]
    if settings.get(EPOCHS, 0) > position.settings.get(EPOCHS, math.inf):
        keys.remove(EPOCHS)
    changed = [f"{key} is {settings.get(key)} and was {position.settings.get(key)}" for key in keys]
    if position.total_batch != total_batch:
        changed.append(
            f"the total batch (processes x accumulate x batch_size) is {total_batch} and was {position.total_batch}"
        )
    if position.samples != samples:
        changed.append(f"the training set has {samples} samples and had {position.samples}")
    elif position.labels not in ("", labels):
        changed.append("the training samples are of other classes, or in another order, than they were")
    if changed:
        raise ConfigError(
            f"{source} belongs to a run with other settings: {'; '.join(changed)}. Use the same settings to resume it, "
            f"another output_dir for another run, or resume=none to start again in this one"
        )


def tell_changes(
    position: Position,
    settings: dict[str, Any],
    division: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
) -> None:
    """Warn of changes that `check_settings` allows although the weights, or their measurements, depend on them."""
    before = position.settings.get(EPOCHS)
    if before is not None and settings[EPOCHS] != before:
        warn(
            f"{EPOCHS} is {settings[EPOCHS]} and was {before}: training goes on longer, and from here on the learning "
            f"rate follows the schedule of {settings[EPOCHS]} epochs"
        )
    if changed := _changes(position.division, division):
        warn(
            f"an update is divided or computed otherwise than before ({changed}): batch statistics and "
            f"rounding change, so the weights will differ from those of a run that went on as it was"
        )
    if changed := _changes(position.evaluation, evaluation or {}):
        warn(
            f"accuracies are measured otherwise than before ({changed}): those of earlier epochs, and the best of "
            f"them, do not compare with those that follow"
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} is {value} and was {before[key]}" for key, value in now.items() if before.get(key, value) != value
    )


def check_finite(model: nn.Module, folder: Path) -> None:
    """Raise `RunError` if a weight or a batch statistic is NaN or infinite."""
    if name := next(nonfinite(model.state_dict().items()), None):
        raise RunError(f"{name} is no longer finite; {last_good(folder)}. Lower optim.lr or set optim.clip_grad")


def nonfinite(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """The names of the tensors that contain a NaN or an infinity."""
    return (name for name, value in named if value.is_floating_point() and not bool(value.isfinite().all()))


def open_folder(folder: Path, resume: str, *, needed: int) -> Path | None:
    """Prepare the run folder for writing and return the checkpoint to start from, if any.

    Leftovers of interrupted writes are removed, and with `resume="none"` also what an earlier run left. Raises
    `ConfigError` if nothing can be written, if the disk has less than `needed` bytes, or if a finished run would be
    overwritten without being asked to.
    """
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"output_dir={folder}: the checkpoints need about {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
            f"make room, choose another output_dir or lower train.keep_checkpoints"
        )
    if resume != "none":
        _put_in_place(folder)
    _sweep(folder)
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is None:
        if resume != "none" and (folder / SUMMARY).exists():
            raise ConfigError(
                f"output_dir={folder} holds a finished run without checkpoints; choose another output_dir, or "
                f"resume=none to start again in this one"
            )
        _clear(folder)
    elif folder.resolve() not in checkpoint.resolve().parents and (_numbered(folder) or (folder / SUMMARY).exists()):
        raise ConfigError(
            f"resume={resume} is of another run than the one in output_dir={folder}; choose another output_dir"
        )
    return checkpoint


def _put_in_place(folder: Path) -> None:
    """Finish what a kill between writing a checkpoint and renaming it has left: complete ones get their names."""
    for target, path in _not_in_place(folder).items():
        path.chmod(0o755)
        os.replace(path, target)
        warn(f"{target} was whole but not yet in place when the run was killed; it is now")


def _not_in_place(folder: Path) -> dict[Path, Path]:
    """Complete checkpoints without their final name, by it; of two of the same step, the one written last."""
    found: dict[Path, Path] = {}
    for prefix in (_WRITING, _REPLACED):
        for path in sorted((folder / CHECKPOINTS).glob(f"{prefix}step_*")):
            target = path.with_name(path.name.removeprefix(prefix)[: -len("_12345678")])
            free = _STEP.fullmatch(target.name) and target not in found and not target.exists()
            if free and not damage(path):
                found[target] = path
    return found


def _sweep(folder: Path) -> None:
    """Remove what interrupted writes left, and nothing that the recipes do not write."""
    for prefix in (_WRITING, _REPLACED):
        for path in (folder / CHECKPOINTS).glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
    for place in (folder, *(folder / name for name in MODELS)):
        for path in place.glob(".*"):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote; other files there are kept."""
    for path in (folder / CHECKPOINTS).glob("*step_*"):
        own = _STEP.fullmatch(path.name.removeprefix("set_aside_")[: len("step_") + 8])
        if own and (_is_own(path) if path.name.startswith("step_") else (path / MANIFEST).is_file()):
            shutil.rmtree(path, ignore_errors=True)
    for name in MODELS:
        for file in (WEIGHTS, CONFIG):
            (folder / name / file).unlink(missing_ok=True)
    for name in (CHECKPOINTS, *MODELS):
        with contextlib.suppress(OSError):  # it contains something else
            (folder / name).rmdir()
    for name in (METRICS, DAMAGED, SUMMARY, CURVES):
        (folder / name).unlink(missing_ok=True)


def state_digest(model: nn.Module) -> str:
    """SHA-256 over all weights and batch statistics in order, to compare models across processes."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
