"""The demo that plays a recording: what it answers, on a terminal and without one, and what it refuses."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from sdt_blocks import DataCard, save_model
from sdt_datasets.events import FramesOfEvents
from sdt_datasets.recordings import read_events

NAMES = ["up", "down", "[left]"]


@pytest.fixture
def saved(tmp_path, firing_model, monkeypatch):
    """A model of three classes that takes event frames, saved, and a recording of 16 x 12 pixels."""
    monkeypatch.chdir(tmp_path)
    model = firing_model(in_channels=2, num_classes=3)
    model.card = DataCard(NAMES, [12, 16])
    save_model(model, tmp_path / "mine")
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(10**15, 10**15 + 200_000, 400))
    np.savez(
        tmp_path / "mine.npz", t=t, x=rng.integers(0, 16, 400), y=rng.integers(0, 12, 400), p=rng.integers(0, 2, 400)
    )
    return model, t


ARGUMENTS = ["checkpoint=mine", "recording=mine.npz", "speed=0", "events.sensor_size=[16,12]", "threads=1"]


@pytest.mark.parametrize("form", ["plain", "dense", "events"])
def test_lines_where_there_is_no_terminal(saved, capsys, form):
    import stream_demo as recipe

    model, _ = saved
    recipe.main([*ARGUMENTS, "frame_events=60", "chunk_ms=20", f"form={form}"])
    out = capsys.readouterr().out
    frames = torch.from_numpy(FramesOfEvents(sensor_size=(16, 12, 2), events=60)(read_events("mine.npz")))[None]
    label = NAMES[int(model(frames).argmax())]
    assert len(frames[0]) == 6 and "6 frames, " in out and out.rstrip().endswith(f"at the end: {label}")
    assert 1 < out.count("frames a second") <= 6 and " ms  " in out


def test_a_class_that_is_judged_by_itself_has_its_own_probability(saved, capsys):
    import stream_demo as recipe

    model, _ = saved
    model.card = DataCard(NAMES, [12, 16], activation="sigmoid")
    save_model(model, "mine")
    recipe.main([*ARGUMENTS, "frame_events=400", "chunk_ms=1000", "form=plain"])
    frames = torch.from_numpy(FramesOfEvents(sensor_size=(16, 12, 2), events=400)(read_events("mine.npz")))[None]
    logits = model(frames)[0]
    shares = [f"({logits.sigmoid().max():.0%})", f"({logits.softmax(0).max():.0%})"]
    assert shares[0] != shares[1] and capsys.readouterr().out.splitlines()[0].endswith(shares[0])


def test_the_live_view(saved):
    import stream_demo as recipe

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    recipe.main([*ARGUMENTS, "frame_ms=20", "form=plain"], console)
    shown = screen.getvalue()
    for words in ("latency of a frame", "median", "label over time", "[left]", "mine, plain: 400 events of mine.npz"):
        assert words in shown
    assert shown.count("latency of a frame") >= 9


def test_it_plays_at_the_recordings_pace(saved, monkeypatch):
    """Each piece comes when it came: 200 ms in pieces of 50, at half the speed."""
    import stream_demo as recipe

    clock, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(recipe.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(recipe.time, "sleep", sleep)
    recipe.main([*ARGUMENTS, "speed=0.5", "chunk_ms=50", "form=plain", "live=false"])
    assert len(slept) == 4 and slept == pytest.approx([0.1] * 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["checkpoint=FOLDER"]),
        (["checkpoint=mine", "frame_events=3", "frame_ms=2"], ["two ways to end a frame"]),
        (["checkpoint=mine", "recording=nowhere.npz"], ["recording=nowhere.npz"]),
        (["checkpoint=mine", "form=fast"], ["form", "fast", "plain, dense, events"]),
        (["checkpoint=mine", "speed=-1"], ["speed", "at least 0"]),
        ([*ARGUMENTS, "frame_events=500"], ["no frame is finished by 400 events"]),
        (["checkpoint=mine", "recording=mine.npz", "events.sensor_size=[8,8]"], ["outside"]),
    ],
)
def test_refusals(saved, arguments, words):
    import stream_demo as recipe
    from common.config import ConfigError, RunError

    with pytest.raises((ConfigError, RunError)) as refused:
        recipe.main(arguments)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(("milliseconds", "last"), [(3.0, 9_000), (0.1, 11_000), (5.0, 15_000), (5.0, 0)])
def test_no_event_is_left_out_of_the_pieces(milliseconds, last):
    from stream_demo import pieces

    events = np.zeros(3, dtype=[("t", "<i8")])
    events["t"] = [0, last // 2, last]
    found = list(pieces(events, milliseconds))
    assert sum(len(part) for _, part in found) == 3
    assert all((part["t"] <= 1e6 * end + 1e-6).all() for end, part in found)
