"""The common part of image and event data sets: reproducible samples, and handling of samples that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdt_datasets.errors import IGNORED, DataError, LeftOutWarning, UnreadableError


class SampleDataset(Dataset[tuple[Tensor, int]]):
    """`dataset[i]` is (float32 tensor, class index); `.classes` are the names, `.targets` all indices, int64 `[N]`.

    Training samples are augmented with draws that depend only on (seed, epoch, i), so that neither the number of loader
    processes nor a resumed run changes them; `set_epoch` reaches loader processes that are already running.

    A sample that cannot be read raises `UnreadableError` with the name of its file. With `on_error="skip"` it is named
    in a warning and in `.unreadable`: in training the next readable sample replaces it; in evaluation, where a
    replacement would be counted twice, it is blank and its label is `IGNORED`.

    A data set implements `_read`, `_sample`, `_blank` and `_name`; `rows` are the rows of its source that it has.
    """

    kind = "samples"
    by_class = True
    """Whether the order goes class by class, so that the first samples do not represent the whole."""

    def __init__(
        self,
        *,
        rows: np.ndarray | Sequence[int],
        targets: np.ndarray,
        classes: Sequence[str],
        training: bool,
        seed: int,
        on_error: str,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
        self._rows, self.targets, self.classes = np.asarray(rows, dtype=np.int64), targets, list(classes)
        self.training, self.seed, self.skip = training, seed, on_error == "skip"
        # In shared memory, since persistent loader processes have a copy of the rest of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(self._rows), dtype=torch.bool).share_memory_()

    def _read(self, row: int) -> Any:
        """The content of a row's file; any error becomes an `UnreadableError`."""
        raise NotImplementedError

    def _sample(self, content: Any, key: tuple[int, int, int]) -> Tensor:
        """The tensor for the content; in training augmented with draws from `key`. `ValueError` for unfit contents."""
        raise NotImplementedError

    def _blank(self) -> Tensor:
        """Zeros of a sample's shape."""
        raise NotImplementedError

    def _name(self, row: int) -> str:
        """The file that contains a row."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._rows)

    def keep_first(self, samples: int) -> None:
        """Keep only the first `samples` samples, or all if there are fewer; call it before any is read.

        If the order goes class by class, they are the first of each class in turn.
        """
        chosen: Any = slice(samples)
        if self.by_class:
            turns = np.zeros(len(self), dtype=np.int64)
            for label in np.unique(self.targets):
                positions = np.flatnonzero(self.targets == label)
                turns[positions] = np.arange(len(positions))
            chosen = np.sort(np.lexsort((self.targets, turns))[:samples])
        self._rows, self.targets = self._rows[chosen], self.targets[chosen]

    def keep_asked(self, samples: int | None, key: str, given: str = "") -> None:
        """`keep_first` as the setting `key` asks, None being all; `given` says in the error what else limits them.

        Raises `DataError` if there are fewer.
        """
        if samples is None:
            return
        if not 1 <= samples <= len(self):
            there = f"there are {len(self)} {self.kind}{given}"
            raise DataError(f"data.{key}: {samples} samples were asked for, but {there}")
        self.keep_first(samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of the samples that are drawn from now on."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> list[str]:
        """The files that could not be read so far, in the order of the data set."""
        return [self._name(int(self._rows[i])) for i in self._unreadable.nonzero().flatten().tolist()]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        key = (self.seed, int(self._epoch), index)
        for candidate in range(index, index + len(self)):
            position = candidate % len(self)
            try:
                return self._load(int(self._rows[position]), key), int(self.targets[position])
            except UnreadableError as error:
                if not self.skip:
                    hint = "replace or remove the file, or set data.on_error=skip to go on without it"
                    raise UnreadableError(f"{error}; {hint}") from error
                if not self._unreadable[position]:
                    warnings.warn(f"{error}; it is left out", LeftOutWarning, stacklevel=2)
                self._unreadable[position] = True
                if not self.training:
                    return self._blank(), IGNORED
        first = self._name(int(self._rows[index]))
        raise UnreadableError(f"none of the {self.kind} can be read, {first} for one")

    def _load(self, row: int, key: tuple[int, int, int]) -> Tensor:
        try:
            content = self._read(row)
        except Exception as error:  # decoders raise nearly anything on a damaged file
            raise UnreadableError(f"{self._name(row)} cannot be read ({_reason(error)})") from error
        try:
            return self._sample(content, key)
        except (ValueError, OSError, MemoryError) as error:
            raise UnreadableError(f"{self._name(row)} cannot be used ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
