"""Which samples each process sees at each step, and the loaders that fetch them."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdt_datasets.images import build_image_datasets

from .config import Config, ConfigError, RunError
from .schema import EVENT_DATA_SETS
from .stop_request import SIGNALS


def build_datasets(config: Config, *, evaluation_only: bool = False) -> tuple[Any, Any]:
    """The training and the evaluation set that `data.name` selects: `[i]` is (float32 tensor, class index).

    With `evaluation_only` an image folder needs no training part, and the first of the two must not be used.
    """
    data = config.data
    if data.name in EVENT_DATA_SETS:
        if data.validation_samples is not None:
            raise ConfigError(f"data.validation_samples is for images; leave it out with data.name={data.name}")
        from sdt_datasets.event_data import build_event_datasets

        return build_event_datasets(
            data.name,
            data.root,
            time_steps=config.events.time_steps,
            split_by=config.events.split_by,
            size=config.events.size,
            augment=config.events.augment,
            cache=config.events.cache,
            sensor_size=config.events.sensor_size,
            train_samples=data.train_samples,
            test_samples=data.test_samples,
            on_error=data.on_error,
            seed=config.seed,
        )
    return build_image_datasets(
        data.name,
        data.root,
        img_size=data.img_size,
        in_channels=config.model.in_channels,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        auto_augment=data.auto_augment,
        random_erasing=data.random_erasing,
        erasing_mode=data.erasing_mode,
        download=data.download,
        on_error=data.on_error,
        validation_samples=data.validation_samples,
        train_samples=None if evaluation_only else data.train_samples,
        test_samples=data.test_samples,
        seed=config.seed,
        # The validation images are among the training images.
        evaluation_only=evaluation_only and data.validation_samples is None,
    )


class EpochBatches:
    """The batches of one process, as lists of sample indices, starting at any position.

    The order of an epoch is a permutation drawn from (seed, epoch). An update takes the next `processes * accumulate *
    batch_size` samples of it, forward pass by forward pass, process by process; samples that do not fill an update are
    left out of this epoch. So the position alone determines the next samples, and a resumed run needs no other state.
    """

    def __init__(
        self, samples: int, *, batch_size: int, accumulate: int = 1, rank: int = 0, processes: int = 1, seed: int = 0
    ) -> None:
        self.samples, self.batch_size, self.accumulate = samples, batch_size, accumulate
        self.rank, self.processes, self.seed = rank, processes, seed
        self.updates = samples // (processes * accumulate * batch_size)
        self.epoch = self.start = 0
        if not self.updates:
            on = f" on each of {processes} processes" if processes > 1 else ""
            steps = f" in each of train.accumulate={accumulate} passes" if accumulate > 1 else ""
            most = samples // (processes * accumulate)
            hint = f"lower it to {most} or less" if most else "start fewer processes or accumulate less"
            raise ConfigError(
                f"{samples} training samples do not fill one batch of train.batch_size={batch_size}{on}{steps}; {hint}"
            )

    def seek(self, epoch: int, update: int) -> None:
        """Let the next iteration start at this update of this epoch."""
        self.epoch, self.start = epoch, update

    def __len__(self) -> int:
        return (self.updates - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples)
        shares = order[: self.updates * self.accumulate * self.processes * self.batch_size]
        shares = shares.reshape(self.updates * self.accumulate, self.processes, self.batch_size)
        for share in shares[self.start * self.accumulate :, self.rank]:
            yield share.tolist()


class ShardBatches:
    """Every `processes`-th sample from `rank` on, in batches: over all processes each sample exactly once."""

    def __init__(self, samples: int, *, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.indices = range(rank, samples, processes)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])


class Quoting(Dataset[Any]):
    """Passes the message of an unreadable sample on as text, since a loader process would wrap it in its traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    @property
    def unreadable(self) -> list[str]:
        """The samples that could not be read so far."""
        return list(self.dataset.unreadable)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return str(error)


class UnreadableSample(RuntimeError):
    """A sample could not be read and data.on_error is "raise"."""


def build_loader(dataset: Any, batches: EpochBatches | ShardBatches, *, workers: int, pin: bool) -> DataLoader[Any]:
    """Batches (float32 `[B, ...]`, class indices `[B]`); iterate through `fetch`, which raises for unreadable ones."""
    return DataLoader(
        Quoting(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_main_process,
        # Its own generator: a loader draws a seed at each start, which would advance the global one.
        generator=torch.Generator().manual_seed(0),
    )


def evaluation_loader(
    dataset: Any, config: Config, accelerator: Any, *, batch_size: int | None = None
) -> DataLoader[Any]:
    """This process's share of a data set: over all processes each sample exactly once."""
    shares = ShardBatches(
        len(dataset),
        batch_size=batch_size or config.train.batch_size,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    return build_loader(dataset, shares, workers=config.data.workers, pin=accelerator.device.type == "cuda")


@contextmanager
def closing(*loaders: DataLoader[Any]) -> Iterator[None]:
    """End the loaders' processes after the block; inside it an unreadable sample becomes a `RunError`."""
    try:
        yield
    except UnreadableSample as error:
        raise RunError(str(error)) from error
    finally:
        stop_loaders(*loaders)


def fetch(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches. Raises `UnreadableSample`, whose message names the file."""
    iterator = iter(loader)
    if loader.num_workers:
        _running.add(iterator)
    for batch in iterator:
        if isinstance(batch, str):
            raise UnreadableSample(batch)
        yield batch


class ReadableBatches:
    """The batches of a loader without the samples that could not be read; can be iterated repeatedly.

    All samples are of class -1, an unknown one, unless `labeled`.
    """

    def __init__(self, loader: DataLoader[Any], *, labeled: bool = True) -> None:
        self.loader, self.dataset, self.labeled = loader, loader.dataset, labeled

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in fetch(self.loader):
            readable = targets >= 0
            if readable.any():
                known = targets[readable]
                yield inputs[readable], known if self.labeled else torch.full_like(known, -1)


def stop_loaders(*loaders: DataLoader[Any]) -> None:
    """End the loaders' processes. They ignore the SIGTERM that Python sends at exit before it waits for them."""
    for loader in loaders:
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            loader._iterator = None


_running: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _stop_running() -> None:
    # Registered after Python's own waiting for processes, and therefore called before it.
    for iterator in list(_running):
        iterator._shutdown_workers()


def _collate(samples: list[Any]) -> Any:
    unreadable = next((sample for sample in samples if isinstance(sample, str)), None)
    if unreadable is not None:
        return unreadable
    inputs, targets = zip(*samples, strict=True)
    return torch.stack(inputs), torch.tensor(targets)


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C and a batch system's SIGTERM reach the whole process group; the main process needs its loaders to finish.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
