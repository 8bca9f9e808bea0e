"""EventsToFrames against direct counts and SpikingJelly; the event-level augmentations against their definitions."""

import numpy as np
import pytest
import tonic
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_datasets.events import (
    MOST_EMPTY,
    DropAtRandom,
    DropByArea,
    DropByTime,
    EventDrop,
    EventsToFrames,
    FramesOfEvents,
)

CAMERA = np.dtype([("t", np.uint64), ("x", np.uint16), ("y", np.uint16), ("p", bool)])
GESTURE = np.dtype([("x", np.int16), ("y", np.int16), ("p", bool), ("t", np.int64)])
NMNIST = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])


def make_events(number, width=128, height=128, dtype=CAMERA, seed=0):
    rng = np.random.default_rng(seed)
    events = np.empty(number, dtype=dtype)
    events["t"] = np.sort(rng.integers(1000, 5_000_000, number))
    events["x"] = rng.integers(0, width, number)
    events["y"] = rng.integers(0, height, number)
    events["p"] = rng.integers(0, 2, number)
    return events


def direct_count(events, frame_of_event, time_steps, width, height):
    frames = np.zeros((time_steps, 2, height, width))
    at = (frame_of_event, events["p"].astype(int), events["y"].astype(int), events["x"].astype(int))
    np.add.at(frames, at, 1)
    return frames


def frame_by_number(events, time_steps):
    duration = len(events) // time_steps
    position = np.arange(len(events))
    return np.minimum(position // duration, time_steps - 1) if duration else np.full(len(events), time_steps - 1)


def frame_by_time(events, time_steps):
    if len(events) == 0:
        return np.zeros(0, dtype=int)
    elapsed = events["t"].astype(int) - int(events["t"].min())
    duration = elapsed.max() // time_steps
    return np.minimum(elapsed // duration, time_steps - 1) if duration else np.full(len(events), time_steps - 1)


@pytest.mark.parametrize("split_by, frame_of_event", [("number", frame_by_number), ("time", frame_by_time)])
@pytest.mark.parametrize("time_steps", [1, 4, 10, 16])
def test_frames_equal_a_direct_count(time_steps, split_by, frame_of_event):
    for number in (0, 1, 5, time_steps - 1, time_steps, 1003, 200_007):
        events = make_events(number, 128, 96)
        frames = EventsToFrames(sensor_size=(128, 96, 2), time_steps=time_steps, split_by=split_by)(events)
        assert frames.dtype == np.float32
        expected = direct_count(events, frame_of_event(events, time_steps), time_steps, 128, 96)
        np.testing.assert_array_equal(frames, expected, err_msg=f"{number} events")


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 1003), max_size=6), time_steps=st.sampled_from([1, 4, 7]), by=st.booleans())
def test_frames_as_events_come_are_those_of_the_recording(cuts, time_steps, by):
    """However the recording is cut; what follows the last whole frame waits."""
    events = make_events(1003, 20, 12)
    split_by, size = ("number", {"events": 1003 // time_steps}) if by else ("time", {})
    if not by:
        size = {"duration": int(events["t"][-1] - events["t"][0]) // time_steps}
    whole = EventsToFrames(sensor_size=(20, 12, 2), time_steps=time_steps, split_by=split_by)(events)
    to_frames = FramesOfEvents(sensor_size=(20, 12, 2), **size)
    for _ in range(2):  # after the rest a recording starts anew
        chunks, buffer = [], np.empty_like(events)
        for part in np.split(events, sorted(cuts)):
            buffer[: len(part)] = part  # a reader may fill one buffer again and again
            chunks.append(to_frames(buffer[: len(part)]))
        rest = to_frames.rest().sum(0)
    found = np.concatenate(chunks)
    assert found.dtype == np.float32 and len(found) == time_steps
    np.testing.assert_array_equal(found[:-1], whole[:-1])
    np.testing.assert_array_equal(found[-1] + rest, whole[-1])
    assert found.sum() + rest.sum() == 1003 and to_frames.rest().shape == (0, 2, 12, 20)


def test_frames_without_events_are_empty():
    events = make_events(3, 4, 4)
    events["t"] = [100, 129, 171]
    frames = FramesOfEvents(sensor_size=(4, 4, 2), duration=10)(events)
    assert frames.sum((1, 2, 3)).tolist() == [1, 0, 1, 0, 0, 0, 0]


def test_frames_as_events_come_refuse():
    events = make_events(10, 4, 4)
    size = {"sensor_size": (4, 4, 2)}
    for options, message in (
        ({}, "give either events= or duration="),
        ({"events": 3, "duration": 4}, "give either events= or duration="),
        ({"events": 0}, "at least 1, got 0"),
        ({"duration": 1.5}, "at least 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            FramesOfEvents(**size, **options)
    to_frames = FramesOfEvents(**size, events=4)
    to_frames(events[5:])
    with pytest.raises(ValueError, match="in order of time"):
        to_frames(events[:5])
    assert to_frames.rest().sum() == 1
    to_frames(events[5:])
    to_frames.reset()
    assert len(to_frames(events[:3])) == 0 and to_frames.rest().sum() == 3
    events["t"][-1] += 10 * (MOST_EMPTY + 100)
    with pytest.raises(ValueError, match="look for a time that jumps"):
        FramesOfEvents(**size, duration=10)(events)
    with pytest.raises(TypeError, match="structured array"):
        to_frames(np.zeros((3, 4)))


@pytest.mark.parametrize("dtype", [CAMERA, GESTURE, NMNIST], ids=["camera", "gesture", "n-mnist"])
@pytest.mark.parametrize("split_by", ["number", "time"])
def test_frames_equal_spikingjelly(dtype, split_by):
    integrate = pytest.importorskip("spikingjelly.datasets.utils").integrate_events_by_fixed_frames_number
    events = make_events(10_007, 40, 30, dtype)
    columns = {name: events[name].astype(np.int64) for name in "txyp"}
    expected = integrate(columns, split_by, 10, 30, 40)
    frames = EventsToFrames(sensor_size=(40, 30, 2), time_steps=10, split_by=split_by)(events)
    np.testing.assert_array_equal(frames, expected)


@settings(deadline=None, max_examples=80)
@given(
    number=st.integers(0, 600),
    width=st.integers(1, 50),
    height=st.integers(1, 50),
    time_steps=st.integers(1, 20),
    split_by=st.sampled_from(["number", "time"]),
    dtype=st.sampled_from([CAMERA, GESTURE, NMNIST]),
    seed=st.integers(0, 99),
)
def test_no_event_is_lost(number, width, height, time_steps, split_by, dtype, seed):
    events = make_events(number, width, height, dtype, seed)
    frames = EventsToFrames(sensor_size=(width, height, 2), time_steps=time_steps, split_by=split_by)(events)
    assert frames.shape == (time_steps, 2, height, width)
    assert frames.sum() == number
    assert frames[:, 1].sum() == np.count_nonzero(events["p"])


def test_counts_do_not_wrap():
    events = np.zeros(140_000, dtype=CAMERA)
    frames = EventsToFrames(sensor_size=(3, 2, 2), time_steps=2)(events)
    assert frames[0, 0, 0, 0] == frames[1, 0, 0, 0] == 70_000


def test_one_event_out_of_order_is_seen_anywhere():
    """At the border between two parts of a long recording as well, which is looked through in parts."""
    for number in (2**16, 2**16 + 1, 2**16 + 2):
        events = np.zeros(number, dtype=CAMERA)
        events["t"] = np.arange(number)
        events["t"][-2:] = events["t"][-2:][::-1].copy()
        frames = EventsToFrames(sensor_size=(1, 1, 2), time_steps=2, split_by="time")(events)
        assert frames.flatten().tolist() == [(number - 1) // 2, 0, number - (number - 1) // 2, 0]
        with pytest.raises(ValueError, match="in order of time"):
            FramesOfEvents(sensor_size=(1, 1, 2), events=5)(events)


def test_events_out_of_order_are_split_by_their_time():
    events = make_events(5000, 20, 20)
    shuffled = events[np.random.default_rng(1).permutation(len(events))]
    by_time = EventsToFrames(sensor_size=(20, 20, 2), time_steps=7, split_by="time")
    np.testing.assert_array_equal(by_time(shuffled), by_time(events))


def test_signed_polarity_counts_as_zero_and_one():
    events = make_events(900, 8, 8, NMNIST)
    signed = events.copy()
    signed["p"] = 2 * events["p"] - 1
    to_frames = EventsToFrames(sensor_size=(8, 8, 2), time_steps=3)
    np.testing.assert_array_equal(to_frames(signed), to_frames(events))


def test_composes_with_tonic():
    compose = tonic.transforms.Compose(
        [
            tonic.transforms.RandomFlipLR(sensor_size=(128, 128, 2), p=1.0),
            DropAtRandom(0.5),
            EventsToFrames(sensor_size=(128, 128, 2), time_steps=4),
        ]
    )
    frames = compose(make_events(1000))
    assert frames.shape == (4, 2, 128, 128)
    assert frames.sum() == 500


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sensor_size": (128, 128)}, "sensor_size must be"),
        ({"sensor_size": (128, 128, 1)}, "sensor_size must be"),
        ({"sensor_size": (0, 128, 2)}, "sensor_size must be"),
        ({"time_steps": 0}, "time_steps must be"),
        ({"time_steps": 2.5}, "time_steps must be"),
        ({"split_by": "frames"}, "split_by must be one of number, time"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EventsToFrames(**{"sensor_size": (8, 8, 2), "time_steps": 4, **settings})


@pytest.mark.parametrize("field, value", [("x", 8), ("y", 6), ("x", -1), ("y", -1)])
def test_events_outside_the_sensor_are_refused(field, value):
    events = make_events(50, 8, 6, GESTURE)
    events[field][17] = value
    with pytest.raises(ValueError, match=f"{field}={value} lies outside the sensor of 8 x 6"):
        EventsToFrames(sensor_size=(8, 6, 2), time_steps=2)(events)


def test_other_inputs_are_refused():
    to_frames = EventsToFrames(sensor_size=(8, 8, 2), time_steps=2)
    with pytest.raises(TypeError, match="structured array"):
        to_frames(np.zeros((5, 4)))
    with pytest.raises(TypeError, match="fields x, y, p"):
        to_frames(np.zeros(5, dtype=[("x", int), ("y", int)]))
    with pytest.raises(TypeError, match="must be integers"):
        to_frames(np.zeros(5, dtype=[("x", float), ("y", int), ("p", bool)]))
    events = make_events(5, 8, 8, NMNIST)
    for column, found in (((2,) * 5, "2 in row 0"), ((0, 1, 1, -1, 0), "0 in row 4"), ((0, 1, 1, 3, 0), "3 in row 3")):
        events["p"] = column
        with pytest.raises(ValueError, match=f"p is {found}; expected 0/1, -1/1"):
            to_frames(events)
    for field, dtype in (("p", np.nan), ("t", 0.5)):
        odd = make_events(5, 8, 8, np.dtype([(name, float if name == field else int) for name in "xytp"]))
        odd[field][2] = dtype
        with pytest.raises((ValueError, TypeError), match=r"p is nan in row 2|times must be integers"):
            EventsToFrames(sensor_size=(8, 8, 2), time_steps=2, split_by="time")(odd)


def test_drop_by_time_empties_one_interval():
    events = make_events(20_000)
    span = float(events["t"][-1] - events["t"][0])
    for seed in range(8):
        kept = DropByTime(0.3)(events, np.random.default_rng(seed))
        dropped = np.setdiff1d(events["t"], kept["t"]).astype(float)
        assert dropped.max() - dropped.min() == pytest.approx(0.3 * span, rel=0.01)
        inside = (kept["t"] > dropped.min()) & (kept["t"] < dropped.max())
        assert not inside.any()


def test_drop_by_area_empties_one_box():
    events = make_events(50_000, 128, 64)
    kept = DropByArea(0.245, sensor_size=(128, 64, 2))(events, np.random.default_rng(0))
    to_frames = EventsToFrames(sensor_size=(128, 64, 2), time_steps=1)
    gone = to_frames(events).sum((0, 1)) - to_frames(kept).sum((0, 1)) > 0
    rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
    assert (len(rows), len(columns)) == (16, 31)
    box = np.ix_(range(rows[0], rows[-1] + 1), range(columns[0], columns[-1] + 1))
    assert to_frames(kept).sum((0, 1))[box].sum() == 0
    assert len(kept) == len(events) - to_frames(events).sum((0, 1))[box].sum()


def test_drop_at_random_keeps_the_order():
    events = make_events(1000)
    kept = DropAtRandom(0.3996)(events, np.random.default_rng(0))
    assert len(kept) == 600
    assert np.all(np.diff(kept["t"].astype(int)) >= 0)
    assert np.isin(kept, events).all()


@pytest.mark.parametrize(
    "drop",
    [DropByTime(0.9), DropByArea(0.9, sensor_size=(4, 4, 2)), DropAtRandom(0.9), EventDrop(sensor_size=(4, 4, 2))],
    ids=["time", "area", "random", "event_drop"],
)
def test_drops_follow_the_generator_and_never_empty_a_recording(drop):
    events = make_events(3, 4, 4)
    for seed in range(30):
        first, again = (drop(events, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert 1 <= len(first) <= 3
    assert len(drop(events[:0], np.random.default_rng(0))) == 0
    many = make_events(3000, 4, 4)
    np.random.seed(5)  # noqa: NPY002
    globally_seeded = [drop(many) for _ in range(4)]
    np.random.seed(5)  # noqa: NPY002
    for before, after in zip(globally_seeded, [drop(many) for _ in range(4)], strict=True):
        np.testing.assert_array_equal(before, after)


def test_event_drop_uses_all_its_operations():
    events = make_events(4000, 16, 16)
    drop = EventDrop(sensor_size=(16, 16, 2))
    sizes = [len(drop(events, np.random.default_rng(seed))) for seed in range(40)]
    assert sizes.count(4000) < 25
    assert 4000 in sizes
    assert min(sizes) < 2000


@pytest.mark.parametrize("ratio", [1.0, -0.1, (0.5, 0.2), (0.1, 1.0)])
def test_bad_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio must be"):
        DropAtRandom(ratio)
