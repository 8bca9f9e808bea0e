"""Trains on recordings of moving shapes, which it writes itself, then shows events, frames and spikes in one picture.

    accelerate launch recipes/events_demo.py [key=value ...]

The directions of the shapes differ in time only (recipes/common/moving_shapes.py). The picture, events_demo.png in the
run folder, has one of these recordings and a real one of a DAVIS346 camera (recipes/data): the events of each time
step, the frame that counts them, and the share of the first layer's channels that spike.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.command_line import configs_of, main, short_errors
from common.config import Config, ConfigError, RunError
from common.moving_shapes import DIRECTIONS, SIDE, write_recordings

from sdt_blocks import load_model
from sdt_blocks.analysis import record
from sdt_datasets.events import EventsToFrames
from sdt_datasets.recordings import read_events

TRAIN, TEST = 200, 50
"""Number of recordings of each direction."""
REAL = Path(__file__).with_name("data") / "davis346_crop.npz"
DEFAULT = "events_demo"


def draw(config: Config) -> Path:
    """Write the picture of a finished run and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder, events = Path(config.output_dir), config.events
    model = load_model(folder / "last").eval()
    recordings = [("a DAVIS346 camera", read_events(REAL), (128, 128))]
    for direction in DIRECTIONS:
        written = sorted(Path(config.data.root or "", "test", direction).glob("*.npy"))
        if written:
            recordings.insert(0, (f"a shape that moves {direction}", read_events(written[0]), (SIDE, SIDE)))
            break
    figure = Figure(figsize=(1.3 * events.time_steps + 1.2, 4.4 * len(recordings)), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (title, recording, (width, height)) in zip(
        figure.subfigures(len(recordings), 1, squeeze=False)[:, 0], recordings, strict=True
    ):
        panel.suptitle(f"{title}: {len(recording)} events")
        to_frames = EventsToFrames(
            sensor_size=(width, height, 2), time_steps=events.time_steps, split_by=events.split_by
        )
        frames = to_frames(recording)
        with torch.no_grad():
            spikes = record(model, torch.from_numpy(frames)[None], "patch.neurons.0").spikes[:, 0]
        _draw_steps(panel.subplots(3, events.time_steps, squeeze=False), recording, frames, spikes.mean(1).numpy())
    path = folder / "events_demo.png"
    figure.savefig(path, dpi=100)
    return path


def _draw_steps(axes: Any, events: np.ndarray, frames: np.ndarray, spikes: np.ndarray) -> None:
    """One column per time step: the events `[N]`, the frames `[T, 2, H, W]` and the share of spikes `[T, H, W]`."""
    ends = frames.sum((1, 2, 3)).cumsum().astype(int)
    height, width = frames.shape[-2:]
    bright = np.quantile(frames[frames > 0], 0.9)
    for step, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        of_step, (off, on) = events[start:end], (frames[step] / bright).clip(0, 1)
        scatter, frame, rate = axes[:, step]
        scatter.scatter(of_step["x"], of_step["y"], s=1.5, c=np.where(of_step["p"], "tab:red", "tab:blue"))
        scatter.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal", title=f"step {step + 1}")
        frame.imshow(1 - np.stack([off, np.maximum(on, off), on], -1), interpolation="nearest")
        rate.imshow(spikes[step], vmin=0, vmax=max(spikes.max(), 1e-6), cmap="gray", interpolation="nearest")
    for row, name in zip(axes, ("events", "frames", "spikes"), strict=True):
        row[0].set_ylabel(name)
        for axis in row:
            axis.set(xticks=[], yticks=[])


def prepare(arguments: list[str]) -> list[Config]:
    """Write the recordings that are missing; returns the configuration of each run. Raises `ConfigError`."""
    configs = configs_of(arguments, DEFAULT)
    config = configs[0]
    if config.data.root is not None:
        try:
            write_recordings(Path(config.data.root), train=TRAIN, test=TEST, seed=config.seed)
        except OSError as error:
            raise ConfigError(f"data.root={config.data.root}: no recordings can be written there ({error})") from error
    return configs


def finish(configs: list[Config]) -> None:
    """Draw the picture of each run. Raises `RunError`."""
    for config in configs:
        try:
            print(f"events, frames and spikes: {draw(config)}", flush=True)
        except OSError as error:
            raise RunError(f"the picture cannot be written to {config.output_dir} ({error})") from error


if __name__ == "__main__":
    runs: list[Config] = []
    if not {"-h", "--help", "--print-config"} & set(sys.argv):
        with short_errors():
            runs = prepare(sys.argv[1:])
    main(DEFAULT)
    if os.environ.get("RANK", "0") == "0":
        with short_errors():
            finish(runs)
