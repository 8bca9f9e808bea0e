"""Tonic-style transforms on structured event arrays: events to frames, and event-level augmentation.

An event array is a one-dimensional structured NumPy array with the fields `t` (time), `x`, `y` (pixels) and
`p` (polarity: 0/1, -1/1 or bool), as in Tonic's data sets. Every transform here is a callable that can be combined with
Tonic's own in `tonic.transforms.Compose`.
"""

import bisect
import itertools
from dataclasses import dataclass

import numpy as np

from sdt_datasets.columns import check_inside, polarity_is_on

SPLITS = ("number", "time")

# A chunk of events is gathered, indexed and counted while it is still in the processor's second-level cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class EventsToFrames:
    """Counts the events of a recording into `time_steps` frames, per polarity and pixel.

    By number (the frames that the released models were trained on), with `N` events and `d = N // T`: frame `i`
    counts the events `[i * d, (i + 1) * d)` in the order of the recording, the last frame runs to `N`. By time,
    with `d = (t_last - t_first) // T`: frame `i` counts the times `[t_first + i * d, t_first + (i + 1) * d)`,
    and the last frame again takes all the rest. Both rules are SpikingJelly's; both put everything into the last
    frame if `d` is 0. No event is dropped: the frames add up to `N`.

    `sensor_size` is `(W, H, 2)` as in Tonic, `split_by` `"number"` or `"time"`.

    Shapes: structured events `[N]` -> float32 frames `[T, 2, H, W]`, OFF events in channel 0 and ON in channel 1.
    Counts are exact up to 2**24 events on one pixel of one frame.

    Raises `ValueError` for a setting out of range, for events outside the sensor, and for an invalid polarity, and
    `TypeError` for an input that is not a structured event array with whole pixels and times.

    >>> to_frames = EventsToFrames(sensor_size=(128, 128, 2), time_steps=10)
    >>> frames = to_frames(events)  # [10, 2, 128, 128]
    """

    sensor_size: tuple[int, int, int]
    time_steps: int
    split_by: str = "number"

    def __post_init__(self) -> None:
        size = tuple(self.sensor_size)
        if len(size) != 3 or size[2] != 2 or any(int(side) != side or side < 1 for side in size):
            raise ValueError(f"sensor_size must be (width, height, 2) in whole pixels, got {self.sensor_size!r}")
        if isinstance(self.time_steps, bool) or int(self.time_steps) != self.time_steps or self.time_steps < 1:
            raise ValueError(f"time_steps must be a whole number >= 1, got {self.time_steps!r}")
        if self.split_by not in SPLITS:
            raise ValueError(f"split_by must be one of {', '.join(SPLITS)}, got {self.split_by!r}")

    def __call__(self, events: np.ndarray) -> np.ndarray:
        fields = ("x", "y", "p") if self.split_by == "number" else ("t", "x", "y", "p")
        check_events(events, fields)
        width, height, _ = self.sensor_size
        if self.split_by == "time":
            events, edges = _edges_by_time(events, self.time_steps)
        else:
            edges = [i * (len(events) // self.time_steps) for i in range(self.time_steps)] + [len(events)]

        frames = np.empty((self.time_steps, 2 * height * width), dtype=np.float32)
        for frame, start, stop in zip(frames, edges, edges[1:], strict=False):
            frame[:] = _counted(events, self.sensor_size, start, stop)
        return frames.reshape(self.time_steps, 2, height, width)


class FramesOfEvents:
    """Counts events into frames as they come, per polarity and pixel.

    Each frame has a fixed number of `events`, or those of `duration` microseconds from the first event on: give one of
    the two. A call takes the next events, in order of time, and returns the frames that are now complete, which may be
    none; the remaining events wait for the next call, and `rest` returns them at the end. Frames of `N // T` events
    each are those of `EventsToFrames` with T steps, except that there the last frame takes all the rest. Frames of a
    duration without events are empty.

    `sensor_size` is `(W, H, 2)` as in Tonic.

    Shapes: structured events `[N]` -> float32 frames `[n, 2, H, W]`, OFF events in channel 0 and ON in channel 1.

    Raises `ValueError` for a setting out of range, for events outside the sensor, before the last one or more than
    `MOST_EMPTY` frames after it, and `TypeError` for an input that is no structured event array.

    >>> to_frames = FramesOfEvents(sensor_size=(128, 128, 2), duration=10_000)
    >>> frames = to_frames(events)  # [n, 2, 128, 128], n >= 0
    """

    def __init__(
        self, *, sensor_size: tuple[int, int, int], events: int | None = None, duration: int | None = None
    ) -> None:
        # This checks the sensor size.
        self.sensor_size = EventsToFrames(sensor_size=sensor_size, time_steps=1).sensor_size
        if (events is None) == (duration is None):
            raise ValueError(f"give either events= or duration= of a frame, got {events!r} and {duration!r}")
        size = events if duration is None else duration
        if isinstance(size, bool) or int(size) != size or size < 1:
            raise ValueError(f"a frame must have a whole number of events or microseconds, at least 1, got {size!r}")
        self.events, self.duration = events, duration
        self._waiting: np.ndarray | None = None
        self._start: int | None = None
        self._now: int | None = None

    def __call__(self, events: np.ndarray) -> np.ndarray:
        check_events(events, ("t", "x", "y", "p"))
        times = events["t"]
        if not _is_sorted(times) or (self._now is not None and len(times) and int(times[0]) < self._now):
            raise ValueError(
                "events must come in order of time; sort them, and call rest() or reset() before another recording"
            )
        whole = events if self._waiting is None else np.concatenate([self._waiting, events])
        start = int(whole["t"][0]) if self._start is None and len(whole) else self._start
        edges = self._edges(whole, start)
        frames = [_counted(whole, self.sensor_size, first, stop) for first, stop in itertools.pairwise(edges)]
        self._start = None if start is None else start + len(frames) * (self.duration or 0)
        self._now = int(times[-1]) if len(times) else self._now
        self._waiting = whole[edges[-1] :].copy()
        return self._shaped(frames)

    def rest(self) -> np.ndarray:
        """The incomplete frame `[1, 2, H, W]`, or `[0, 2, H, W]` if no event waits; the next call starts a new one."""
        waiting = self._waiting
        self.reset()
        if waiting is None or len(waiting) == 0:
            return self._shaped([])
        return self._shaped([_counted(waiting, self.sensor_size, 0, len(waiting))])

    def reset(self) -> None:
        """Leaves out the events that wait; the next call starts a new frame, of another recording if need be."""
        self._waiting, self._start, self._now = None, None, None

    def _edges(self, events: np.ndarray, start: int | None) -> list[int]:
        """Where the frames begin that the events complete, and where the rest begins."""
        if self.events is not None:
            return list(range(0, len(events) + 1, self.events))
        if len(events) == 0 or start is None or self.duration is None:
            return [0]
        times = events["t"]
        finished = (int(times[-1]) - start) // self.duration
        if finished > len(events) + MOST_EMPTY:
            raise ValueError(
                f"{len(events)} events span {finished} frames of {self.duration} microseconds; look for a time that "
                f"jumps, or take longer frames"
            )
        return [bisect.bisect_left(times, start + i * self.duration) for i in range(finished + 1)]

    def _shaped(self, frames: list[np.ndarray]) -> np.ndarray:
        width, height, _ = self.sensor_size
        return np.array(frames, dtype=np.float32).reshape(len(frames), 2, height, width)


MOST_EMPTY = 10_000
"""Frames without events that `FramesOfEvents` makes at once: a time that jumps could otherwise make any number."""


def _counted(events: np.ndarray, sensor_size: tuple[int, int, int], start: int, stop: int) -> np.ndarray:
    """The number of events from `start` to before `stop` on each pixel, flat."""
    pixels = 2 * sensor_size[0] * sensor_size[1]
    chunks = (
        _pixel_index(events[first : min(first + _CHUNK, stop)], sensor_size, first)
        for first in range(start, stop, _CHUNK)
    )
    return sum((np.bincount(chunk, minlength=pixels) for chunk in chunks), np.zeros(pixels, dtype=np.intp))


def check_events(events: np.ndarray, fields: tuple[str, ...]) -> None:
    """Raise `TypeError` if `events` is not a one-dimensional structured array with these fields."""
    names = getattr(getattr(events, "dtype", None), "names", None)
    if names is None or events.ndim != 1 or not set(fields) <= set(names):
        got = f"a {type(events).__name__} of dtype {getattr(events, 'dtype', None)}"
        raise TypeError(f"expected a one-dimensional structured array with the fields {', '.join(fields)}, got {got}")


def _pixel_index(events: np.ndarray, sensor_size: tuple[int, int, int], first_row: int) -> np.ndarray:
    """The flat index `(p * H + y) * W + x` of each event; `ValueError` if one lies outside or has no polarity."""
    x, y, polarity = (np.ascontiguousarray(events[field]) for field in ("x", "y", "p"))
    for name, values in (("x", x), ("y", y)):
        if values.dtype.kind not in "iu":
            raise TypeError(f"pixel coordinates must be integers, {name} is {values.dtype}")
    check_inside(x, y, sensor_size, first_row=first_row)
    width, height, _ = sensor_size
    index = polarity_is_on(polarity, first_row=first_row).astype(np.intp)
    index *= height
    index += y
    index *= width
    index += x
    return index


def _edges_by_time(events: np.ndarray, time_steps: int) -> tuple[np.ndarray, list[int]]:
    """Events in order of time, and the T + 1 positions at which the frames begin and end."""
    if len(events) == 0:
        return events, [0] * (time_steps + 1)
    times = events["t"]
    if times.dtype.kind not in "iu":
        raise TypeError(f"times must be integers, in microseconds, t is {times.dtype}; see events_from_columns")
    if not _is_sorted(times):
        events = events[np.argsort(times, kind="stable")]
        times = events["t"]
    first, last = times[0].item(), times[-1].item()
    duration = (last - first) // time_steps
    starts = [bisect.bisect_left(times, first + i * duration) for i in range(time_steps)]
    return events, [*starts, len(events)]


def _is_sorted(times: np.ndarray) -> bool:
    chunks = (np.ascontiguousarray(times[first : first + _CHUNK + 1]) for first in range(0, len(times), _CHUNK))
    return all(bool((chunk[1:] >= chunk[:-1]).all()) for chunk in chunks)


def _globally_seeded() -> np.random.Generator:
    """A generator that follows `np.random.seed`, as Tonic's own transforms do."""
    return np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002


class _Drop:
    """The common part of the event-level augmentations: a ratio drawn from a range, and never an empty result."""

    def __init__(self, ratio: float | tuple[float, float]) -> None:
        low, high = (ratio, ratio) if isinstance(ratio, int | float) else ratio
        if not 0 <= low <= high < 1:
            raise ValueError(f"ratio must be a number, or a (low, high) pair, within [0, 1), got {ratio!r}")
        self.ratio = (float(low), float(high))

    def __call__(self, events: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        check_events(events, ("t", "x", "y", "p"))
        if len(events) == 0:
            return events
        rng = _globally_seeded() if rng is None else rng
        kept = events[self._keep(events, rng.uniform(*self.ratio), rng)]
        return kept if len(kept) else events

    def _keep(self, events: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ratio={self.ratio})"


class DropByTime(_Drop):
    """Drops the events of one random interval that lasts `ratio` of the recording (EventDrop, arXiv:2106.05836).

    Structured events `[N]` -> `[M]`, 1 <= M <= N; an empty recording stays empty. `ratio` is a number or a
    `(low, high)` range to draw from. `rng` makes the draws; without it NumPy's global generator does.
    """

    def __init__(self, ratio: float | tuple[float, float] = (0.1, 0.9)) -> None:
        super().__init__(ratio)

    def _keep(self, events: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
        elapsed = events["t"].astype(np.float64)
        elapsed -= elapsed.min()
        duration = ratio * elapsed.max()
        start = rng.uniform(0, elapsed.max() - duration)
        return (elapsed < start) | (elapsed >= start + duration)


class DropByArea(_Drop):
    """Drops the events of one random box whose sides are `ratio` of the sensor's (EventDrop, arXiv:2106.05836).

    Structured events `[N]` -> `[M]`, 1 <= M <= N. `sensor_size` is `(W, H, 2)`.
    """

    def __init__(self, ratio: float | tuple[float, float] = (0.05, 0.25), *, sensor_size: tuple[int, int, int]) -> None:
        super().__init__(ratio)
        self.sensor_size = sensor_size

    def _keep(self, events: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
        outside = np.zeros(len(events), dtype=bool)
        for name, side in (("x", self.sensor_size[0]), ("y", self.sensor_size[1])):
            length = round(ratio * side)
            start = rng.integers(0, side - length + 1)
            outside |= (events[name] < start) | (events[name] >= start + length)
        return outside


class DropAtRandom(_Drop):
    """Drops `ratio` of the events, drawn at random; the order is kept (EventDrop, arXiv:2106.05836).

    Structured events `[N]` -> `[M]`, M = N - round(ratio * N).
    """

    def __init__(self, ratio: float | tuple[float, float] = (0.1, 0.9)) -> None:
        super().__init__(ratio)

    def _keep(self, events: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
        keep = np.ones(len(events), dtype=bool)
        keep[rng.choice(len(events), round(ratio * len(events)), replace=False)] = False
        return keep


class EventDrop:
    """Leaves a recording unchanged or drops events by time, by area or at random, each with equal probability.

    The policy of EventDrop (arXiv:2106.05836): structured events `[N]` -> `[M]`, 1 <= M <= N.
    """

    def __init__(self, *, sensor_size: tuple[int, int, int]) -> None:
        self.operations = (None, DropByTime(), DropByArea(sensor_size=sensor_size), DropAtRandom())

    def __call__(self, events: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        rng = _globally_seeded() if rng is None else rng
        operation = self.operations[rng.integers(len(self.operations))]
        return events if operation is None else operation(events, rng)
