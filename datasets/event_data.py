"""Event data sets for the recipes: every sample, including its augmentation, depends only on (seed, epoch, index)."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdt_datasets.augment import build_augmentations
from sdt_datasets.cache import ArrayCache
from sdt_datasets.columns import LARGEST_SIDE, check_inside
from sdt_datasets.errors import NO_EVENT, DataError, UnreadableError
from sdt_datasets.event_sources import ClassFolders, Source
from sdt_datasets.events import EventsToFrames
from sdt_datasets.files import LARGEST_CONTENT
from sdt_datasets.layouts import Part, open_layout
from sdt_datasets.samples import SampleDataset

_log = logging.getLogger(__name__)
RELEASED_SIZE = {"cifar10_dvs": 64, "cifar10_dvs_tet": 64}
"""Side in pixels to which the released models' frames were resized; the other data sets keep the sensor's size."""

_CACHE_VERSION = 2


class EventDataset(SampleDataset):
    """`dataset[i]` is (float32 frames `[T, 2, H, W]`, class index); OFF events are channel 0, ON events channel 1.

    `part` has the recordings; for `time_steps` and `split_by` see `EventsToFrames`. `size` is the side of the square
    frames in pixels, None keeps the sensor's. `augment` are names of `EVENT_AUGMENTATIONS` and `FRAME_AUGMENTATIONS`;
    for their random draws, and for recordings that cannot be read, see `SampleDataset`. A recording without an event
    counts as unreadable. `cache` keeps the frames on disk, or the events if those are augmented.

    Raises `DataError` for frames that would take more than `LARGEST_CONTENT` bytes, and for augmentations of events if
    the recordings contain frames.
    """

    kind = "recordings"
    in_channels = 2

    def __init__(
        self,
        part: Part,
        *,
        time_steps: int,
        split_by: str = "number",
        size: int | None = None,
        augment: Sequence[str] = (),
        training: bool = False,
        cache: ArrayCache | None = None,
        on_error: str = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__(
            rows=part.rows,
            targets=np.array(part.source.targets, dtype=np.int64)[part.rows],
            classes=part.source.classes,
            training=training,
            seed=seed,
            on_error=on_error,
        )
        self.source, self.cache = part.source, cache
        self.sensor_size = _sensor_size(self.source, part.rows, time_steps)
        self.to_frames = EventsToFrames(sensor_size=self.sensor_size, time_steps=time_steps, split_by=split_by)
        self.frame_size = (size, size) if size else (self.sensor_size[1], self.sensor_size[0])
        _check_size(time_steps, self.sensor_size, self.frame_size)
        self._of_events, self._of_frames = build_augmentations(augment, self.sensor_size)
        if self._of_events and self.source.holds != "events":
            raise DataError(f"augment={list(augment)} drops events, but {self.source.data[0]} holds frames already")

    def _read(self, row: int) -> np.ndarray:
        """The events of a recording if events are augmented, else its frames; from the cache if it has them."""
        array = self._decode(row) if self.cache is None else self.cache.get(self._key(row), lambda: self._decode(row))
        if self._of_events:  # cached events may be of a run with another sensor or other frames
            self._check_events(array)
        return array

    def _sample(self, content: np.ndarray, key: tuple[int, int, int]) -> Tensor:
        array, rng = content, np.random.default_rng(key)
        if self._of_events:
            for augment_events in self._of_events:
                array = augment_events(array, rng)
            array = self._frames(array)
        frames = torch.from_numpy(array)
        for augment_frames in self._of_frames:
            frames = augment_frames(frames, rng)
        return frames

    def _blank(self) -> Tensor:
        return torch.zeros(self.to_frames.time_steps, self.in_channels, *self.frame_size)

    def _name(self, row: int) -> str:
        return str(self.source.data[row])

    def _decode(self, row: int) -> np.ndarray:
        array = self.source[row][0]
        if self._of_events:
            return array
        if self.source.holds == "events":
            self._check_events(array)
        return self._frames(array)

    def _check_events(self, events: np.ndarray) -> None:
        if len(events) == 0:
            raise ValueError(NO_EVENT)
        try:
            check_inside(events["x"], events["y"], self.sensor_size)
        except ValueError as error:
            hint = "; of an event_folder whose sensor is larger, events.sensor_size=[W,H] says so"
            raise ValueError(f"{error}{hint if isinstance(self.source, ClassFolders) else ''}") from error
        time_steps, first, last = self.to_frames.time_steps, int(events["t"].min()), int(events["t"].max())
        if self.to_frames.split_by == "time" and last - first < time_steps <= len(events):
            raise ValueError(
                f"its times run from {first} to {last}, too short for {time_steps} frames of equal duration; set "
                f"events.split_by=number, or store finer times"
            )

    def _frames(self, array: np.ndarray) -> np.ndarray:
        if self.source.holds == "events":
            array = self.to_frames(array)
        width, height, _ = self.sensor_size
        expected = (self.to_frames.time_steps, self.in_channels, height, width)
        if array.shape != expected:
            raise ValueError(f"expected frames of shape {expected}, found {array.shape}")
        return resize_frames(array, self.frame_size)

    def _key(self, row: int) -> dict[str, object]:
        path = Path(self.source.data[row]).absolute()
        status = path.stat()
        key: dict[str, object] = {
            "version": _CACHE_VERSION,
            "file": str(path),
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
            "reader": f"{type(self.source).__name__}/{self.source.holds}",
            "segment": getattr(self.source, "segments", {row: None})[row],
        }
        if not self._of_events:
            settings = self.to_frames
            key |= {"time_steps": settings.time_steps, "split_by": settings.split_by}
            key |= {"sensor_size": list(self.sensor_size), "frame_size": list(self.frame_size)}
        return key


def _check_size(time_steps: int, *sizes: Sequence[int]) -> None:
    for width, height, *_ in sizes:
        if max(width, height) > LARGEST_SIDE or 8 * time_steps * width * height > LARGEST_CONTENT:
            raise DataError(
                f"{time_steps} frames of {width} x {height} pixels would take {8 * time_steps * width * height} bytes "
                f"for one recording; a side may have {LARGEST_SIDE} pixels, all frames {LARGEST_CONTENT} bytes. Set "
                f"events.sensor_size and events.size, or find the stray event"
            )


def _say_passed_over(sensor_size: Sequence[int], frame_size: Sequence[int]) -> None:
    """Warn if `resize_frames` does not use every pixel."""
    width, height = sensor_size[:2]
    share = _looked_at(width, frame_size[1]) * _looked_at(height, frame_size[0])
    if share < 1:
        _log.warning(
            "a sensor of %d x %d pixels becomes frames of %d x %d (W x H), each of whose pixels is made of the four "
            "nearest: %.0f %% of the sensor are ignored, with the events there; events.size=%d uses all of it",
            *(width, height, frame_size[1], frame_size[0], 100 * (1 - share), -(-max(width, height) // 2)),
        )


def _looked_at(old: int, new: int) -> float:
    """The share of `old` pixels in a row that are used when bilinear resizing makes `new` ones of them."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return len(np.union1d(np.floor(at), np.ceil(at))) / old


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, without antialiasing: float32 `[T, C, H, W]` -> `[T, C, *size]`.

    From 128 to 64 pixels each new pixel is the mean of four, as in the frames of the released CIFAR10-DVS models; if a
    side shrinks to less than half, all pixels but the nearest two are ignored.
    """
    if frames.shape[-2:] == tuple(size):
        return frames
    return F.interpolate(torch.from_numpy(frames), size=size, mode="bilinear", align_corners=False).numpy()


def build_event_datasets(
    name: str,
    root: str | os.PathLike | None,
    *,
    time_steps: int,
    split_by: str = "number",
    size: int | None = None,
    augment: Sequence[str] | str | None = (),
    cache: bool | str | None = True,
    on_error: str = "raise",
    train_samples: int | None = None,
    test_samples: int | None = None,
    sensor_size: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[EventDataset, EventDataset]:
    """The training and the validation set of an event data set, in whichever of its layouts is under `root`.

    `name` is `dvs128_gesture`, `cifar10_dvs`, `cifar10_dvs_tet`, `n_mnist` or `event_folder`. `root` is the folder that
    Tonic was given as `save_to`, or the data set's own folder, or one of the layouts of the original
    (`frames_number_T_split_by_number`, `events_np`, `train/N.pt`).

    A recording is divided into `time_steps` frames with equal `"number"` of events or equal `"time"` (`split_by`), with
    `size` x `size` pixels; None means 64 for CIFAR10-DVS, as released, else the sensor's own size. `sensor_size` is the
    `(W, H)` of an `event_folder`; None takes the AEDAT4 header's or the smallest that fits. `augment` names, in a list
    or separated by commas, the augmentations in training, which are drawn by `seed`: `hflip`, `roll`, `cutout`,
    `random_op`, `random_op_wide`, `drop_by_time`, `drop_by_area`, `drop_at_random`, `event_drop`.

    `cache` True or `"auto"` keeps the frames in `root/.frames_cache`, a path in that folder, False or `"none"` nowhere.
    `train_samples` and `test_samples` keep only that many recordings, taken from each class in turn. For `on_error` see
    `EventDataset`.

    Gesture labels are Tonic's 0..10; in SpikingJelly's layout they are the positions of the folder names in
    alphabetical order (0, 1, 10, 2, ...), as there. `classes` names them in either case.

    Raises `DataError` (a `ValueError`) for missing or unfit data, `ValueError` for a setting out of range.

    >>> train, test = build_event_datasets("dvs128_gesture", "data", time_steps=16)
    >>> frames, label = train[0]  # [16, 2, 128, 128]
    """
    if size is not None and (isinstance(size, bool) or int(size) != size or size < 1):
        raise ValueError(f"size must be a whole number of pixels >= 1, got {size!r}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed!r}")
    names = [part.strip() for part in augment.split(",") if part.strip()] if isinstance(augment, str) else augment or ()
    # Settings are checked before anything is read.
    of_events, _ = build_augmentations(names, (1, 1, 2))
    EventsToFrames(sensor_size=(1, 1, 2), time_steps=time_steps, split_by=split_by)
    if name == "dvs128_gesture" and "hflip" in names:
        _log.warning("hflip turns left-hand gestures into right-hand ones and cw into ccw, but not their labels")

    train, validation = open_layout(
        name,
        root,
        time_steps=time_steps,
        split_by=split_by,
        sensor_size=sensor_size,
        needs_events=bool(of_events),
    )
    store = _open_cache(cache, Path(os.fspath(root or ".")))
    dataset = partial(
        EventDataset,
        time_steps=time_steps,
        split_by=split_by,
        size=size or RELEASED_SIZE.get(name),
        cache=store,
        on_error=on_error,
        seed=seed,
    )
    training, evaluation = dataset(train, augment=names, training=True), dataset(validation)
    _say_passed_over(training.sensor_size, training.frame_size)
    training.keep_asked(train_samples, "train_samples")
    evaluation.keep_asked(test_samples, "test_samples")
    return training, evaluation


def _open_cache(cache: bool | str | None, root: Path) -> ArrayCache | None:
    if cache in (False, None, "none"):
        return None
    folder = root / ".frames_cache" if cache in (True, "auto") else Path(str(cache))
    try:
        return ArrayCache(folder)
    except OSError as error:
        raise DataError(str(error.strerror)) from error


def _sensor_size(source: Source, rows: Sequence[int], time_steps: int) -> tuple[int, int, int]:
    """`(W, H, 2)`; for frames that of the first readable ones, which must have as many steps as requested."""
    if source.holds == "events":
        return tuple(source.sensor_size)
    for row in rows:
        try:
            frames = source[row][0]
        except Exception:  # it is reported where it is read for use
            continue
        if frames.ndim != 4 or frames.shape[:2] != (time_steps, 2):
            raise DataError(
                f"{source.data[row]} holds frames of shape {list(frames.shape)}, expected [{time_steps}, 2, H, W]; set "
                f"events.time_steps to the number of frames in the files, or use recordings that hold events"
            )
        return frames.shape[3], frames.shape[2], 2
    raise UnreadableError(f"none of the recordings can be read, {source.data[rows[0]]} for one")
