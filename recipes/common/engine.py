"""The training loop of every recipe: train by updates, evaluate at the end of each epoch, save, summarize."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader

from sdt_blocks import save_model
from sdt_blocks.analysis import analyze_model
from sdt_blocks.files import write_text
from sdt_blocks.models.saved import WEIGHTS

from .analyzed import ANALYSIS, note_analyzed
from .best import BEST
from .config import Config, RunError
from .distillation import Teacher
from .evaluation import Evaluation, describe_accuracies, evaluate
from .loading import EpochBatches, UnreadableSample, fetch, stop_loaders
from .models import optimizer_state, whole_model
from .optim import BatchMixer
from .pictures import draw_curves
from .progress import METRICS, Display, append_metrics, is_silent, peak_memory, read_metrics, warn
from .run_lock import RunLock
from .run_state import Position, last_good, save_checkpoint, sha256, state_digest
from .schema import Derived
from .stop_request import StopRequest
from .update import Clock, learning_rate_at, update

ANALYZED = 256
"""Samples of each process that `analyze=true` uses."""


@dataclass
class Run:
    """Everything that the loop works with; made by `set_up.set_up`."""

    config: Config
    derived: Derived
    accelerator: Accelerator
    folder: Path
    model: Any
    """As prepared by Accelerate; `plain` is the same module without its wrapper."""
    plain: Any
    ema: Any
    optimizer: Any
    loss: Callable[[Any, Any], Tensor]
    """Takes logits and targets; with a teacher, the logits of both heads, targets and the teacher's logits."""
    teacher: Teacher | None
    mixer: BatchMixer | None
    batches: EpochBatches
    train_loader: DataLoader[Any]
    test_loader: DataLoader[Any]
    position: Position
    display: Display
    lock: RunLock | None = None
    """The right to write into the folder, held by the first process."""
    stop: StopRequest = field(default_factory=StopRequest)
    stopping: bool = False
    """Whether a process was asked to stop: all of them know, and stop at this step."""
    started: float = field(default_factory=time.monotonic)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.position.closed // self.batches.updates

    @property
    def seconds(self) -> float:
        return self.position.seconds + time.monotonic() - self.started


def train(run: Run) -> None:
    """Train from the run's position to its end and write the summary.

    Raises `RunError` if it cannot continue; exits with 128 + N after saving if signal N asked for a stop.
    """
    try:
        train_to_the_end(run)
    finally:
        stop_loaders(run.train_loader, run.test_loader)
        if run.lock is not None:
            run.lock.release()


def train_to_the_end(run: Run) -> None:
    """`train`, except that it leaves the loaders' processes running."""
    total = run.derived.total_steps
    if run.position.closed >= total:
        run.display.say("the run is complete; nothing is left to train")
    try:
        with run.stop, run.display:
            while run.position.closed < total and not run.stopping:
                clock = train_epoch(run)
                if not run.stopping:
                    close_epoch(run, clock)
            if run.stopping:
                save(run)
        if not run.stopping:
            finish(run)
    except UnreadableSample as error:
        raise RunError(f"{error}; {last_good(run.folder)}") from error
    except BrokenPipeError:
        raise  # of the output, not of the folder
    except OSError as error:
        raise RunError(f"the run folder cannot be written ({error}); {last_good(run.folder)}") from error
    if run.stopping:
        run.display.say(f"stopped at step {run.position.step}; the same command continues from there")
        end(run)
        sys.exit(128 + (run.stop.signal or 15))


def train_epoch(run: Run) -> Clock:
    """Do the updates from the run's position to the end of the epoch, to the last step of the run, or to a stop."""
    config, position, epoch = run.config, run.position, run.epoch
    first = epoch * run.batches.updates
    last = min(first + run.batches.updates, run.derived.total_steps)
    run.train_loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
    run.batches.seek(epoch, position.step - first)
    clock = Clock()
    batches = fetch(run.train_loader)
    while position.step < last and not run.stopping:
        loss = update(run, batches, clock, epoch)
        if loss is None:
            break
        position.step += 1
        clock.updates += 1
        if math.isfinite(loss):
            position.loss_sum += loss
            position.loss_count += 1
        rate = clock.updates * run.derived.total_batch / clock.total
        run.display.advance(position.step, epoch=epoch, loss=loss, rate=rate)
        every = config.train.checkpoint_steps
        if every and position.step % every == 0 and position.step < last and not run.stopping:
            save(run)
    return clock


def close_epoch(run: Run, clock: Clock) -> None:
    """At the end of an epoch: evaluate, write a line of metrics, save the best model and a checkpoint."""
    config, position, accelerator = run.config, run.position, run.accelerator
    at_end = position.step >= run.derived.total_steps
    number = -(-position.step // run.batches.updates)
    line: dict[str, Any] = {
        "epoch": number,
        "step": position.step,
        "lr": learning_rate_at(run, position.step - 1),
        "train_loss": position.loss_sum / position.loss_count if position.loss_count else None,
        # A run that was stopped during an evaluation continues with it: no training has happened that could be timed.
        "images_per_second": round(clock.updates * run.derived.total_batch / clock.total, 1) if clock.updates else None,
        "data_wait": round(clock.waited / clock.total, 4) if clock.updates else None,
        "peak_memory_mib": peak_memory(accelerator.device),
    }
    partly = ""
    if at_end or number % config.train.eval_every == 0:
        broadcast_buffers(accelerator, run.plain)
        models = {"": whole_model(accelerator, config, run.model)}
        if run.ema is not None:
            broadcast_buffers(accelerator, run.ema.module)
            models["ema_"] = run.ema.module
        for prefix, model in models.items():
            result = evaluate_or_save(run, model)
            if result is None:
                run.stopping = True
                return
            measured = {"loss": result.loss, **result.accuracies}
            line |= {f"{prefix}test_{key}": value for key, value in measured.items()}
            line[f"{prefix}firing_rate"] = result.firing_rate
            line |= {"test_samples": result.samples, "firing_rate_samples": result.rated}
            silent = is_silent(line, prefix)
            if at_end and result.silence and not silent:
                partly = result.silence
            # Before a network has learned anything, chance may beat it; that is not a better model.
            if (not silent, measured["top1"]) > (not position.best_silent, position.best_top1):
                position.best_top1, position.best_epoch, position.best_silent = measured["top1"], number, silent
                save_weights(run, BEST, model)
                if accelerator.is_main_process:
                    position.best_sha256 = sha256(run.folder / BEST / WEIGHTS)
    line |= {"nonfinite_steps": position.nonfinite, "seconds": round(run.seconds, 2)}
    if config.data.on_error == "skip":
        line["unreadable"] = count_unreadable(run)
    # JSON knows no NaN.
    line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    position.closed, position.loss_sum, position.loss_count = position.step, 0.0, 0
    position.lines.append(line)
    if accelerator.is_main_process:
        append_metrics(run.folder, line)
    log(run, line)
    run.display.say(describe(line, config.train.epochs + config.train.cooldown_epochs))
    if partly:  # layers behind such a layer see zeros, and may have kept those before it from learning
        run.display.say(partly)
    every = config.train.checkpoint_steps
    if at_end or number % config.train.checkpoint_every == 0 or (every and position.step % every == 0):
        save(run)


def evaluate_or_save(run: Run, model: Any) -> Evaluation | None:
    """`evaluate`; if samples cannot be read, the model is saved first, if a single process trains."""
    try:
        return evaluate(model, run.test_loader, run.accelerator, stop=run.stop)
    except (UnreadableSample, ValueError) as error:
        if run.accelerator.num_processes == 1:
            save(run)
        raise UnreadableSample(str(error)) from error


def log(run: Run, line: dict[str, Any]) -> None:
    """Send the line to the tracker; if it fails, it is dropped with a warning: training does not need it."""
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
    try:
        run.accelerator.log(numbers, step=run.position.step)
    except Exception as error:  # whatever the tracker's own code raises
        run.accelerator.trackers = []
        warn(
            f"tracker={run.config.tracker} failed ({type(error).__name__}: {error}); the run continues without it, and "
            f"{METRICS} has every line"
        )


def end(run: Run) -> None:
    """Close the tracker and the group of processes."""
    try:
        run.accelerator.end_training()
    except Exception as error:
        warn(f"tracker={run.config.tracker} failed at its end ({type(error).__name__}: {error})")


def describe(line: dict[str, Any], epochs: int) -> str:
    """A line of metrics in words."""
    parts = [f"epoch {line['epoch']}/{epochs}", f"lr {line['lr']:.2e}"]
    if line["train_loss"] is not None:
        parts.append(f"loss {line['train_loss']:.4f}")
    for prefix, name in (("", "test"), ("ema_", "averaged")):
        if is_silent(line, prefix):
            parts.append(f"{name} evaluation is silent until the norms have settled")
        elif f"{prefix}test_top1" in line:
            accuracies = {key: line.get(f"{prefix}test_{key}") for key in ("top1", "top5")}
            parts.append(f"{name} {describe_accuracies(accuracies)}")
    if line["images_per_second"] is not None:
        parts.append(f"{line['images_per_second']:.0f} images/s")
    return " | ".join(parts)


STILL_SILENT = "no neuron fires: norms settle with more updates, by train.epochs or a smaller train.batch_size"


def conclusion(summary: dict[str, Any]) -> str:
    """The result of a run in words: the accuracy, or that no neuron fired, so that there is none worth mentioning."""
    if is_silent(summary):
        return f"evaluation is still silent ({STILL_SILENT})"
    return f"test top-1 {summary['test_top1']:.2f} %"


def count_unreadable(run: Run) -> int:
    """Number of samples that no process could read so far; one that two processes met counts twice."""
    here = sum(len(loader.dataset.unreadable) for loader in (run.train_loader, run.test_loader))  # type: ignore
    count: Tensor = run.accelerator.reduce(torch.tensor(here, device=run.accelerator.device), "sum")  # type: ignore
    return int(count)


def broadcast_buffers(accelerator: Accelerator, model: Any) -> None:
    """Send the first process's batch statistics to all, as the next forward pass would: all evaluate the same model."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def save(run: Run) -> None:
    """Save a checkpoint of the position reached."""
    model = whole_model(run.accelerator, run.config, run.model)
    state = optimizer_state(run.accelerator, run.model, run.optimizer)
    if run.accelerator.is_main_process:
        if run.lock is not None:
            run.lock.check()
        scaler = run.accelerator.scaler
        save_checkpoint(
            run.folder,
            replace(run.position, seconds=run.seconds),
            model=model,
            ema=run.ema and run.ema.module,
            optimizer_state=state,
            scaler_state=scaler.state_dict() if scaler else None,
            keep=run.config.train.keep_checkpoints,
        )
    run.accelerator.wait_for_everyone()


def save_weights(run: Run, name: str, model: Any) -> None:
    """Save the model into a subfolder of the run folder that `sdt_blocks.load_model` reads."""
    if run.accelerator.is_main_process:
        try:
            save_model(model, run.folder / name)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{run.folder / name} cannot be written ({error}); {last_good(run.folder)}") from error


def finish(run: Run) -> None:
    """Write final weights, summary.json and curves; check that all processes have the same weights."""
    accelerator, config, folder = run.accelerator, run.config, run.folder
    model = whole_model(accelerator, config, run.model).eval()
    digests = gather_object([state_digest(model)])
    if len(set(digests)) > 1:
        raise RunError(f"the processes ended with different weights ({', '.join(d[:8] for d in digests)})")
    save_weights(run, "last", model)
    if run.ema is not None:
        save_weights(run, "ema", run.ema.module)
    if config.analyze:
        few = list(islice(fetch(run.test_loader), max(1, ANALYZED // config.train.batch_size)))
        analyze_model(model, few, folder / ANALYSIS, title=f"{config.model.name} on {config.data.name}")
        if accelerator.is_main_process:
            note_analyzed(folder / ANALYSIS, folder / "last" / WEIGHTS)
    if accelerator.is_main_process:
        lines = run.position.lines or read_metrics(folder)
        if not lines:
            raise RunError(f"{folder / METRICS} holds no line of this run; resume it in its own output_dir")
        line = lines[-1]
        summary: dict[str, Any] = {
            "model": config.model.name,
            "data": config.data.name,
            **{
                key: line.get(key)
                for key in ("test_top1", "test_top5", "ema_test_top1", "ema_test_top5")
                if key in line
            },
            "loss": line.get("test_loss"),
            "train_loss": line["train_loss"],
            "best_top1": run.position.best_top1 if run.position.best_epoch else None,
            "best_epoch": run.position.best_epoch,
            "best_silent": run.position.best_silent,
            "firing_rate": line.get("firing_rate"),
            "epochs": line["epoch"],
            "steps": run.position.step,
            "params": sum(p.numel() for p in model.parameters()),
            "seconds": line["seconds"],
            "processes": accelerator.num_processes,
            "seed": config.seed,
            "weights_sha256": sha256(folder / "last" / WEIGHTS),
        }
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        draw_curves(folder)
        run.display.say(f"{conclusion(summary)} after {summary['seconds']:.0f} s; all in {folder}")
    end(run)
