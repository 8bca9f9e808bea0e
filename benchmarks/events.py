"""Event data: events per second into frames, and samples per second from the data sets, with and without cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dv_processing
import numpy as np
import tonic
from harness import Bench, ParityError, Sample
from torch.utils.data import DataLoader

from sdt_datasets.columns import EVENT_DTYPE
from sdt_datasets.event_data import build_event_datasets
from sdt_datasets.events import EventsToFrames
from sdt_datasets.recordings import read_events

ALLOCATORS = ["default"]
DEVICES = ["cpu"]
RECORDINGS = 30
"""Recordings of each data set. They were just written, so the first epoch reads them from memory, not from a disk."""
GESTURE_EVENTS, CIFAR10_DVS_EVENTS = 350_000, 200_000
"""Events per recording, about the mean of the real data sets."""


def run(bench: Bench) -> None:
    if bench.device.type != "cpu":
        print("  event data are read on the CPU; nothing to measure here")
        return
    frames(bench)
    with tempfile.TemporaryDirectory() as folder:
        gestures, cifar10_dvs = Path(folder, "gesture"), Path(folder, "cifar10_dvs")
        write_gestures(gestures)
        write_cifar10_dvs(cifar10_dvs)
        decoding(bench, cifar10_dvs)
        pipeline(bench, "dvs128_gesture", gestures, time_steps=16)
        pipeline(bench, "cifar10_dvs", cifar10_dvs, time_steps=10)


def draw_events(number: int, seed: int) -> np.ndarray:
    """Events of a 128 x 128 sensor, concentrated around its center like those of a moving object."""
    rng = np.random.default_rng(seed)
    events = np.empty(number, dtype=EVENT_DTYPE)
    events["t"] = np.sort(rng.integers(0, 5_000_000, number))
    for field in ("x", "y"):
        events[field] = np.clip(rng.normal(64, 24, number), 0, 127)
    events["p"] = rng.integers(0, 2, number)
    return events


def frames(bench: Bench) -> None:
    """Event array -> frames, in memory, on one core."""
    for number, time_steps in ((200_000, 10), (350_000, 16), (2_000_000, 16)):
        # The peers' frames are the same if the number of events is a multiple of the frames': Tonic drops the rest.
        events = draw_events(number - number % time_steps, seed=0)
        sensor_size = (128, 128, 2)
        by_number = EventsToFrames(sensor_size=sensor_size, time_steps=time_steps)
        contestants: dict[str, Callable[[], np.ndarray]] = {
            "sdt_datasets, by number": lambda transform=by_number, events=events: transform(events),
            "Tonic ToFrame": lambda t=time_steps, events=events: tonic.transforms.ToFrame(
                sensor_size=(128, 128, 2), n_event_bins=t
            )(events),
        }
        try:
            from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number
        except ImportError:
            print('  spikingjelly is not installed: pip install -e ".[bench]"')
        else:
            columns = {name: events[name] for name in "txyp"}
            contestants["SpikingJelly"] = lambda c=columns, t=time_steps: integrate_events_by_fixed_frames_number(
                c, "number", t, 128, 128
            )
        by_time = EventsToFrames(sensor_size=sensor_size, time_steps=time_steps, split_by="time")
        timed = {**contestants, "sdt_datasets, by time": lambda transform=by_time, events=events: transform(events)}
        expected = by_number(events)
        samples = bench.race(
            "events to frames",
            f"{len(events)} events, T={time_steps}, 128 x 128",
            timed,  # type: ignore[arg-type]
            baseline="sdt_datasets, by number",
            parity={name: lambda make=make, e=expected: same_counts(make(), e) for name, make in contestants.items()},
        )
        for name, sample in samples.items():
            rates = Sample([len(events) / seconds / 1e6 for seconds in sample.values])
            bench.record("events to frames, rate", f"{len(events)} events, T={time_steps}", name, rates, unit="M ev/s")


def same_counts(found: np.ndarray, expected: np.ndarray) -> str:
    """Parity of frames: every count is the same."""
    if found.shape != expected.shape or not np.array_equal(found, expected):
        raise ParityError(f"{np.count_nonzero(found != expected)} counts differ")
    return "equal"


def write_gestures(root: Path) -> None:
    for number in range(RECORDINGS):
        split = "ibmGestureTest" if number >= 27 else "ibmGestureTrain"
        folder = root / split / f"user{number // 11:02d}_led"
        folder.mkdir(parents=True, exist_ok=True)
        events = draw_events(GESTURE_EVENTS, seed=number)
        columns = [events["x"], events["y"], events["p"], events["t"] // 1000]
        np.save(folder / f"{number % 11}.npy", np.stack(columns, 1).astype(np.int64))


def write_cifar10_dvs(root: Path) -> None:
    for number in range(RECORDINGS):
        folder = root / list(tonic.datasets.CIFAR10DVS.classes)[number % 10]
        folder.mkdir(parents=True, exist_ok=True)
        camera = dv_processing.io.MonoCameraWriter.EventOnlyConfig("DVXplorer_sample", (128, 128))
        writer = dv_processing.io.MonoCameraWriter(str(folder / f"{number:02d}.aedat4"), camera)
        events = draw_events(CIFAR10_DVS_EVENTS, seed=number)
        for start in range(0, len(events), 10_000):
            store = dv_processing.EventStore()
            for t, x, y, p in events[start : start + 10_000].tolist():
                store.push_back(t, x, y, p)
            writer.writeEvents(store)
        del writer


def decoding(bench: Bench, root: Path) -> None:
    """AEDAT4 file -> event array."""
    paths = sorted(root.rglob("*.aedat4"))[:8]
    rates = []
    for path in paths:
        start = time.perf_counter()
        events = read_events(path)
        rates.append(len(events) / (time.perf_counter() - start) / 1e6)
    bench.record(
        "AEDAT4 to events, rate", f"{CIFAR10_DVS_EVENTS} events a file", "sdt_datasets", Sample(rates), unit="M ev/s"
    )


def pipeline(bench: Bench, name: str, root: Path, *, time_steps: int) -> None:
    """Files -> batches: without a cache, filling it, and from it, including the start of the loader's processes."""
    setting = f"{name}, T={time_steps}, batches of 8"
    for workers in (0, 2):
        with tempfile.TemporaryDirectory() as folder:
            uncached, _ = build_event_datasets(name, root, time_steps=time_steps, cache=False)
            cached, _ = build_event_datasets(name, root, time_steps=time_steps, cache=folder)
            seconds = {}
            for epoch, dataset, passes in (
                ("no cache", uncached, 1),
                ("first epoch", cached, 1),
                ("from cache", cached, 9),
            ):
                order = list(range(len(dataset))) * passes
                start = time.perf_counter()
                count = sum(len(labels) for _, labels in DataLoader(dataset, 8, sampler=order, num_workers=workers))
                seconds[epoch] = (time.perf_counter() - start) / count
                rate = 1 / seconds[epoch]
                bench.record(f"{epoch}, {workers} workers", setting, "sdt_datasets", rate, unit="samples/s")
            gain = seconds["first epoch"] / seconds["from cache"]
            bench.record(f"gain from the cache, {workers} workers", setting, "sdt_datasets", gain, unit="x")
