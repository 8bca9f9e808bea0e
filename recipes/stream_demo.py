"""Plays an event recording to a model as a camera would: frames are filled as events come, with a live answer to each.

    accelerate launch recipes/events_demo.py
    python recipes/stream_demo.py checkpoint=runs/events_demo [recording=FILE]

The model keeps its membranes from frame to frame (`sdt_blocks.Stream`), so that each answer is that for all frames so
far, at the cost of one. A terminal shows rate, latency of a frame, the probabilities, and the label over time; without
one, or with live=false, one line per frame is printed. A frame has a fixed number of events (by default as many as if
the recording were cut into the time steps of the training), or those of a number of milliseconds (frame_ms). The keys
are at the end of --help; all others are those of a training run.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.command_line import command
from common.config import ConfigError, RunError, load_config
from common.schema import option
from common.trained import class_names, load, probabilities, read_trained
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sdt_blocks.analysis.tables import counted

RECORDING = Path(__file__).with_name("data") / "davis346_crop.npz"
"""A crop of a DAVIS346 camera's recording, and its sensor's size."""
SENSOR = (128, 128)
REMEMBERED, LISTED = 60, 8
"""Number of past labels that are shown, and of classes with their probabilities."""


@dataclass
class Options:
    """The keys of this recipe, in addition to those of a training run."""

    checkpoint: str | None = option(None, "a run folder or a saved model that takes event frames", path=True)
    recording: str | None = option(
        None, "an event recording; null: the crop of a DAVIS346 camera in recipes/data", path=True
    )
    frame_events: int | None = option(None, "events per frame; null: divide the recording as in training", least=1)
    frame_ms: float | None = option(None, "milliseconds per frame, instead of a number of events", above=0)
    chunk_ms: float = option(5.0, "length of the pieces in which events come, in milliseconds", above=0)
    speed: float = option(1.0, "speed of the playback; 0: as fast as the model answers", least=0)
    window: int | None = option(None, "answer for this number of last frames; null: all since the start", least=1)
    form: str = option("events", "the network as it is, or optimized", choices=("plain", "dense", "events"))
    live: bool = option(True, "a live view on a terminal; false: print lines")


@dataclass
class Played:
    """The playback so far: number of frames, milliseconds that each took, and the labels."""

    frames: int = 0
    seconds: float = 0.0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    labels: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    probabilities: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Frames per second of the playback."""
        return self.frames / self.seconds if self.seconds else 0.0


def read_recording(options: Options, config: Any) -> tuple[Any, tuple[int, int]]:
    """Events in order of time, and the sensor's width and height. Raises `ConfigError`."""
    import numpy as np

    from sdt_datasets.columns import Notes
    from sdt_datasets.event_sources import read_recording_of

    path = RECORDING if options.recording is None else Path(options.recording)
    try:
        events = read_recording_of(config.data.name, str(path), Notes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"recording={path}: {error}") from error
    if len(events) == 0:
        raise ConfigError(f"recording={path} holds no event")
    size = SENSOR if options.recording is None else config.events.sensor_size
    if size is None:
        size = [int(np.max(events[axis])) + 1 for axis in ("x", "y")]
    return events, (int(size[0]), int(size[1]))


def build_stream(model: Any, events: Any, sensor: tuple[int, int], options: Options, config: Any) -> Any:
    """A stream that takes raw events, after a first run, so that building and measuring do not count as latency.

    Raises `ConfigError`.
    """
    import torch

    from sdt_blocks import Stream, optimize_for_inference
    from sdt_datasets.event_data import RELEASED_SIZE, resize_frames
    from sdt_datasets.events import FramesOfEvents

    if model.in_channels != 2:
        raise ConfigError(f"checkpoint={options.checkpoint} takes {model.in_channels} channels, no event frames of 2")
    if options.frame_ms is not None:
        size: dict[str, int] = {"duration": max(round(1000 * options.frame_ms), 1)}
    else:
        size = {"events": options.frame_events or max(len(events) // config.events.time_steps, 1)}
    counted = FramesOfEvents(sensor_size=(*sensor, 2), **size)
    side = config.events.size or RELEASED_SIZE.get(config.data.name)
    wanted = (side, side) if side else (sensor[1], sensor[0])
    if options.form != "plain":
        model = optimize_for_inference(model, sparse=options.form == "events")

    def to_frames(part: Any) -> Any:
        frames = counted(part)
        return resize_frames(frames, wanted) if len(frames) else frames

    stream = Stream(model, window=options.window, to_frames=to_frames)
    stream.push(torch.zeros(1, 2, *wanted))
    stream.reset()
    return stream


def pieces(events: Any, milliseconds: float) -> Iterator[tuple[float, Any]]:
    """The events in pieces of this length, each with the second at which it is complete."""
    import numpy as np

    times = (events["t"] - events["t"][0]).astype(np.float64) / 1e6
    ends = np.arange(1, int(times[-1] / (milliseconds / 1000)) + 2) * milliseconds / 1000
    start, stops = 0, np.searchsorted(times, ends)
    stops[-1] = len(events)  # however rounding places a last event at the end of a piece
    for end, stop in zip(ends, stops, strict=True):
        yield float(end), events[start:stop]
        start = stop


def play(stream: Any, events: Any, names: Sequence[str], options: Options, config: Any) -> Iterator[Played]:
    """Yield the playback after each piece that finished a frame."""
    played, begun = Played(), time.perf_counter()
    for end, part in pieces(events, options.chunk_ms):
        if options.speed:
            time.sleep(max(begun + end / options.speed - time.perf_counter(), 0.0))
        before, start = int(stream.seen.sum()), time.perf_counter()
        answer = stream.push(part)
        taken, frames = 1000 * (time.perf_counter() - start), int(stream.seen.sum()) - before
        if not frames:
            continue
        played.frames, played.seconds = played.frames + frames, time.perf_counter() - begun
        played.latencies.extend([taken / frames] * frames)
        played.probabilities = probabilities(answer[0], config).tolist()
        played.labels.append(names[int(answer[0].argmax())])
        yield played


def line(played: Played) -> str:
    """The playback in one line."""
    return (
        f"frame {played.frames:5d}  {played.seconds:7.2f} s  {played.rate:7.1f} frames a second  "
        f"{played.latencies[-1]:7.2f} ms  {played.labels[-1]} ({max(played.probabilities):.0%})"
    )


def view(played: Played, names: Sequence[str], title: str) -> Group:
    """The playback as a terminal shows it."""
    ordered = sorted(played.latencies)
    figures = Table.grid(padding=(0, 2))
    for name, value in (
        ("frames", f"{played.frames} in {played.seconds:.1f} s, {played.rate:.1f} a second"),
        ("latency of a frame", f"{played.latencies[-1]:.2f} ms, median {statistics.median(ordered):.2f} ms, "
         f"95 % within {ordered[int(0.95 * (len(ordered) - 1))]:.2f} ms"),
        ("label", played.labels[-1]),
    ):  # fmt: skip
        figures.add_row(name, Text(value, style="bold"))
    chances = Table.grid(padding=(0, 2))
    best = sorted(range(len(names)), key=lambda place: -played.probabilities[place])[:LISTED]
    for place in sorted(best):
        share = played.probabilities[place]
        chances.add_row(Text(names[place]), ProgressBar(total=1.0, completed=share, width=30), f"{share:.0%}")
    known = list(dict.fromkeys(played.labels))
    history = Text("label over time  ")
    for label in played.labels:
        history.append("█", style=COLORS[known.index(label) % len(COLORS)])
    legend = Text("  ").join(
        Text.assemble(("█ ", COLORS[place % len(COLORS)]), label) for place, label in enumerate(known[:LISTED])
    )
    return Group(Text(title, style="bold"), figures, Text(), chances, Text(), history, legend)


COLORS = ("cyan", "magenta", "yellow", "green", "red", "blue")


def show(playing: Iterator[Played], names: Sequence[str], title: str, console: Console, *, live: bool) -> Played | None:
    """Show the playback until its end and return its last state; None if no frame was finished."""
    played = None
    if not (live and console.is_terminal):
        for played in playing:
            console.print(line(played), markup=False, highlight=False, soft_wrap=True)
        return played
    with Live(console=console, auto_refresh=False) as screen:
        for played in playing:
            screen.update(view(played, names, title), refresh=True)
    return played


def main(arguments: list[str], console: Console | None = None) -> None:
    options, checkpoint, rest = read_trained(Options, arguments)
    if options.frame_events is not None and options.frame_ms is not None:
        raise ConfigError("frame_events and frame_ms are two ways to end a frame; give one of them")
    config = load_config(rest, default="events_demo")
    import torch

    model, config = load(checkpoint, config, rest, averaged=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    events, sensor = read_recording(options, config)
    names = class_names(checkpoint, model) or [str(number) for number in range(model.num_classes)]
    try:
        stream = build_stream(model, events, sensor, options, config)
        title = (
            f"{checkpoint}, {options.form}: {counted(len(events), 'event')} of {options.recording or RECORDING.name}"
        )
        playing = play(stream, events, names, options, config)
        played = show(playing, names, title, console or Console(), live=options.live)
    except ValueError as error:
        raise RunError(str(error)) from error
    if played is None:
        raise RunError(
            f"no frame is finished by {counted(len(events), 'event')}; take fewer a frame (frame_events, frame_ms)"
        )
    median = statistics.median(played.latencies)
    print(f"{counted(played.frames, 'frame')}, {median:.2f} ms a frame (median), at the end: {played.labels[-1]}")


if __name__ == "__main__":
    command(main, default="events_demo", options=Options)
