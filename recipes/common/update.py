"""One update: the passes of its batches, the exchange between processes, and how a bad update is skipped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import RunError
from .optim import learning_rate, set_learning_rate
from .run_state import last_good, nonfinite, seed_step

if TYPE_CHECKING:
    from .engine import Run


class Clock:
    """Measures where the time of an epoch goes."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited, self.updates = 0.0, 0

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time it takes counts as waiting for data."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


def update(run: Run, batches: Iterator[tuple[Tensor, Tensor]], clock: Clock, epoch: int) -> float | None:
    """Do one step of the optimizer; returns the mean loss over its samples on all processes.

    None if a process that trains alone is asked to stop between its passes: the step has then not been taken.
    """
    config, accelerator, step = run.config, run.accelerator, run.position.step
    set_learning_rate(run.optimizer, learning_rate_at(run, step))
    # In linear probing the frozen part also keeps its batch statistics.
    run.model.train(not config.train.linear_probe)
    keep = config.train.skip_nonfinite or config.train.accumulate > 1
    before = [buffer.clone() for buffer in run.plain.buffers()] if keep else []
    total = torch.zeros((), device=accelerator.device)
    for part in range(config.train.accumulate):
        inputs, targets = clock.next(batches)
        draw = step * config.train.accumulate + part
        inputs = inputs.to(accelerator.device, non_blocking=True)
        targets = targets.to(accelerator.device, non_blocking=True)
        if run.mixer is not None:
            inputs, targets = run.mixer(inputs, targets, step=draw, epoch=epoch)
        if config.train.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        seed_step(config.seed, draw, accelerator.process_index)
        with accelerator.accumulate(run.model):
            wanted = targets if run.teacher is None else (targets, run.teacher(inputs))
            loss = run.loss(run.model(inputs), wanted)
            accelerator.backward(loss)
        total += loss.detach() / config.train.accumulate
        if run.stop.signal and accelerator.num_processes == 1 and part < config.train.accumulate - 1:
            run.stopping = True
            restore(run, before)
            return None
    # The norm is computed even without a bound: a spike hides a NaN from the loss, but not from the gradient.
    bound = math.inf if config.optim.clip_grad is None else config.optim.clip_grad
    norm = accelerator.clip_grad_norm_(run.model.parameters(), bound)
    largest = largest_buffer(run.plain)
    mean, norm, largest, stops = exchange(accelerator, total, norm, largest, float(run.stop.signal > 0))
    run.stopping = stops > 0
    # With a gradient scaler an infinite gradient is no fault: the scaler skips the update and lowers its scale.
    judged = (mean, largest) if accelerator.scaler else (mean, largest, norm)
    if not all(map(math.isfinite, judged)):
        skip_update(run, before, fault(run, mean, norm, largest))
        return math.nan
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.plain, step=step + 1)
    return mean


def exchange(accelerator: Accelerator, loss: Tensor, norm: Any, largest: Tensor, stop: float) -> list[float]:
    """Loss, norm of the gradient and largest buffer (means), number of stop requests: the same on every process."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    means = torch.stack([loss, norm.to(loss), largest.to(loss)]) / accelerator.num_processes
    values: Tensor = accelerator.reduce(torch.cat([means, loss.new_tensor([stop])]), "sum")  # type: ignore[assignment]
    return values.tolist()  # type: ignore[no-any-return]


def largest_buffer(model: Any) -> Tensor:
    """The largest magnitude in the model's buffers, NaN if one of them is, without waiting for the device.

    Running statistics that overflow are not visible otherwise: a NaN gives no spike, so loss and weights stay finite.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.numel()]
    return torch.nn.utils.get_total_norm(buffers, math.inf) if buffers else torch.zeros(())


def learning_rate_at(run: Run, step: int) -> float:
    """The learning rate of an update, scaled to the total batch."""
    train, derived = run.config.train, run.derived
    return learning_rate(
        step,
        steps_per_epoch=derived.steps_per_epoch,
        epochs=train.epochs,
        warmup_epochs=train.warmup_epochs,
        lr=derived.lr,
        min_lr=derived.min_lr,
        warmup_lr=derived.warmup_lr,
        warmup_prefix=train.warmup_prefix,
    )


def fault(run: Run, loss: float, norm: float, largest: float) -> str:
    """Which value of an update is not finite, and what helps."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if math.isfinite(largest):
        return f"the gradient is {norm} (the loss is {loss:.4g})"
    name = next(nonfinite(run.plain.named_buffers()), "a batch statistic on another process")
    return (
        f"{name} is no longer finite (the loss is {loss:.4g}): inputs or weights beyond the range of "
        f"train.mixed_precision={run.config.train.mixed_precision}"
    )


def skip_update(run: Run, buffers: list[Tensor], fault: str) -> None:
    """Skip a non-finite update, or raise `RunError` if no more may be skipped."""
    position = run.position
    position.nonfinite += 1
    allowed = run.config.train.skip_nonfinite
    if position.nonfinite > allowed:
        lr = learning_rate_at(run, position.step)
        advice = (
            "Lower optim.lr, set optim.clip_grad, or leave up to K such steps out: train.skip_nonfinite=K"
            if position.step
            else "No update has changed a weight before it: check the data, or give this model larger inputs, since "
            "layers that never fire, as on maps of a few pixels, let gradients grow without bound"
        )
        raise RunError(
            f"{fault} at step {position.step} (epoch {run.epoch + 1}, learning rate {lr:.3g}); "
            f"{last_good(run.folder)}. {advice}"
        )
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.update()  # lower if the gradient overflowed; the update is skipped either way
    restore(run, buffers)
    run.display.say(f"step {position.step} left out: {fault} ({position.nonfinite} of at most {allowed})")


def restore(run: Run, buffers: list[Tensor]) -> None:
    """Undo the effects of an update's passes: gradients, and their batch statistics."""
    run.optimizer.zero_grad()
    for buffer, value in zip(run.plain.buffers(), buffers, strict=True):
        buffer.copy_(value)
