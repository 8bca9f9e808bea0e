"""Columns of recordings: what is understood equals a plain cast of the true values, all else is refused by row."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_datasets.columns import (
    FIELD_NAMES,
    LARGEST_SIDE,
    check_inside,
    columns_of_table,
    events_from_columns,
    frames_from_counts,
    named_columns,
    polarity_is_on,
)

SIGNED = (np.int16, np.int32, np.int64, np.float32, np.float64)


def draw(number, seed=0, last=1_000_000):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, last, number))
    return {
        "t": t,
        "x": rng.integers(0, 100, number),
        "y": rng.integers(0, 80, number),
        "p": rng.integers(0, 2, number),
    }


def changed(number=1000, **change):
    columns = draw(number)
    for name, (row, value) in change.items():
        columns[name] = columns[name].astype(np.result_type(columns[name], np.asarray(value)))
        columns[name][row] = value
    return columns


class Said(dict):
    def __call__(self, kind, text):
        self[kind] = text


@settings(deadline=None, max_examples=60)
@given(
    number=st.integers(0, 300),
    pixels=st.sampled_from([*SIGNED, np.uint8, np.uint16]),
    times=st.sampled_from([np.int32, np.int64, np.uint32, np.uint64, np.float64]),
    coding=st.sampled_from(["0/1", "-1/1", "bool"]),
    polarity=st.sampled_from(SIGNED),
    seed=st.integers(0, 99),
)
def test_every_number_type_and_coding_gives_the_same_events(number, pixels, times, coding, polarity, seed):
    columns = draw(number, seed)
    coded = {"0/1": columns["p"], "-1/1": 2 * columns["p"] - 1, "bool": columns["p"] > 0}[coding]
    events = events_from_columns(
        columns["t"].astype(times),
        columns["x"].astype(pixels),
        columns["y"].astype(pixels),
        coded if coding == "bool" else coded.astype(polarity),
    )
    for name, column in columns.items():
        np.testing.assert_array_equal(events[name], column)


@settings(deadline=None, max_examples=60)
@given(
    column=st.sampled_from("txyp"),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e300, 2.0**63]),
    row=st.integers(0, 49),
)
def test_what_is_no_number_is_refused_by_row_and_value(column, value, row):
    with pytest.raises(ValueError, match=rf"^{column} is {value} in row {row}; expected ".replace("+", r"\+")):
        events_from_columns(**changed(50, **{column: (row, value)}))


@settings(deadline=None, max_examples=100)
@given(column=st.sampled_from("xyp"), value=st.floats(allow_nan=True, width=64), row=st.integers(0, 49))
def test_a_value_is_taken_exactly_or_refused(column, value, row):
    columns = changed(50, **{column: (row, value)})
    fits = value == int(value) if np.isfinite(value) else False
    if fits and (0 <= value < LARGEST_SIDE if column != "p" else value in (0, 1)):
        assert events_from_columns(**columns)[column][row] == value
    else:
        with pytest.raises(ValueError, match=f"in row {row}" if column != "p" else "in row"):
            events_from_columns(**columns)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (3, -1)}, "x is -1 in row 3; expected a whole pixel"),
        ({"y": (7, LARGEST_SIDE)}, "y is 8192 in row 7"),
        ({"x": (4, 10.5)}, "x is 10.5 in row 4"),
        ({"p": (slice(None), 2)}, "p is 2 in row 0"),
        ({"p": (5, 0.5)}, "p is 0.5 in row 5"),
        ({"p": (slice(None), [-1, 0] * 500)}, r"-1 and 0 do not go together"),
        ({"t": (9, np.uint64(2**63 + 5))}, "t is 9223372036854775813 in row 9|t is 9.2"),
        ({"t": (2, -(2**63))}, "t is -9223372036854775808 in row 2"),
        ({"t": (400, 10**9)}, r"jumps back from t=1000000000 in row 400 to t=\d+ in row 401"),
        ({"t": (999, 10**9)}, "t is 1000000000 in row 999, 1e\\+03 times the length"),
        ({"t": (0, -(10**9))}, "t is -1000000000 in row 0, 1e\\+03 times the length"),
    ],
)
def test_refused_with_row_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        events_from_columns(**changed(**change))


def test_polarity_one_and_two_says_what_to_subtract():
    columns = draw(100)
    with pytest.raises(ValueError, match="where 1 is OFF and 2 is ON, subtract 1"):
        events_from_columns(**{**columns, "p": columns["p"] + 1})
    for kind in ("U1", "S1", "datetime64[us]", object):
        with pytest.raises(ValueError, match="p must be numbers"):
            polarity_is_on(np.zeros(3).astype(int).astype(kind))


def test_normalized_coordinates_say_so():
    columns = draw(100)
    with pytest.raises(ValueError, match=r"x is 0\.\d+ in row \d; .* within 0 \.\.\. 1: multiply"):
        events_from_columns(**{**columns, "x": columns["x"] / 100})


@pytest.mark.parametrize("value, told", [(1, True), (1.0, True), (0, False), (-1, False), (True, False)])
def test_one_polarity_is_taken_and_said_where_it_could_be_another(value, told):
    said = Said()
    events = events_from_columns(**{**draw(9), "p": np.full(9, value)}, note=said)
    assert (events["p"] == (value > 0)).all()
    assert ("one polarity" in said) == told


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
def test_seconds_become_microseconds_and_are_said(dtype):
    said, columns = Said(), draw(500, last=900_000)
    events = events_from_columns(**{**columns, "t": (columns["t"] * 1e-6).astype(dtype)}, note=said)
    assert "taken as seconds" in said["seconds"]
    np.testing.assert_array_equal(events["t"], columns["t"])


def test_float32_microseconds_that_lost_their_digits_are_said():
    said = Said()
    events_from_columns(**{**draw(50), "t": np.linspace(4e9, 4.1e9, 50, dtype=np.float32)}, note=said)
    assert "holds only every 256th" in said["coarse"]


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([16, 23, 24, 31, 32]),
    signed=st.booleans(),
    laps=st.integers(1, 4),
    start=st.integers(0, 2**16),
)
def test_a_clock_that_wraps_is_unwrapped(bits, signed, laps, start):
    true = np.linspace(start, start + laps * 2**bits + 5, 40 * (laps + 1)).astype(np.int64)
    least = -(2 ** (bits - 1)) if signed else 0
    wrapped = true % 2**bits + least
    said = Said()
    columns = {**draw(len(true)), "t": wrapped}
    events = events_from_columns(**columns, note=said)
    assert f"wraps at 2**{bits} after row" in said["wrap"]
    np.testing.assert_array_equal(np.diff(events["t"]), np.diff(true))


def test_recordings_one_after_another_are_refused():
    columns = draw(500)
    twice = {name: np.concatenate([column, column]) for name, column in columns.items()}
    with pytest.raises(ValueError, match=r"jumps back from t=\d+ in row 499 to t=\d+ in row 500; divide"):
        events_from_columns(**twice)


@settings(deadline=None, max_examples=40)
@given(number=st.integers(150, 400), how=st.sampled_from(["shuffled", "backwards", "jitter"]), seed=st.integers(0, 99))
def test_events_out_of_order_are_sorted_and_said(number, how, seed):
    # Of such times many are equal: the order of their events is that of the file.
    columns, rng = draw(number, seed, last=500), np.random.default_rng(seed)
    order = {
        "shuffled": rng.permutation(number),
        "backwards": np.arange(number)[::-1],
        "jitter": np.argsort(np.arange(number) + rng.uniform(0, 3, number)),
    }[how]
    said = Said()
    events = events_from_columns(**{name: column[order] for name, column in columns.items()}, note=said)
    expected = np.lexsort((np.argsort(order), columns["t"]))
    for name, column in columns.items():
        np.testing.assert_array_equal(events[name], column[expected])
    assert ("unsorted" in said) == bool((np.diff(columns["t"][order]) < 0).any())


def test_a_stray_among_shuffled_events_has_the_row_of_the_file():
    columns, order = changed(t=(999, 10**9)), np.random.default_rng(0).permutation(1000)
    row = int(np.flatnonzero(order == 999)[0])
    with pytest.raises(ValueError, match=rf"t is 1000000000 in row {row}|jumps back from t=1000000000 in row {row}"):
        events_from_columns(**{name: column[order] for name, column in columns.items()})


def test_a_gap_that_could_be_a_pause_is_said():
    said = Said()
    assert events_from_columns(**changed(t=(999, 5 * 10**6)), note=said)["t"][-1] == 5 * 10**6
    assert "t is 5000000 in row 999" in said["gap"]


def test_a_clock_set_back_a_little_is_refused():
    columns = draw(1000)
    columns["t"][600:] -= 40_000
    with pytest.raises(ValueError, match=r"jumps back from t=\d+ in row 599"):
        events_from_columns(**columns)


def test_a_pause_between_many_events_is_no_stray():
    t = np.concatenate([np.arange(100), 10**7 + np.arange(100)])
    assert events_from_columns(**{**draw(200), "t": t})["t"][-1] == 10**7 + 99


@pytest.mark.parametrize("order", ["txyp", "xytp", "pxyt", "ptxy", "tpxy", "yxtp", "txpy", "xtpy"])
@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_tables_in_another_order_are_refused(order, dtype):
    table = np.stack([draw(200)[name] for name in order], 1).astype(dtype)
    with pytest.raises(ValueError, match=r"not in the order x, y, p, t: .*Save array"):
        columns_of_table(table)


def test_a_table_is_read_as_x_y_p_t():
    columns = draw(200)
    for polarity in (columns["p"], 2 * columns["p"] - 1):
        table = np.stack([columns["x"], columns["y"], polarity, columns["t"]], 1)
        for taken, column in zip(
            columns_of_table(table), (columns["t"], columns["x"], columns["y"], polarity), strict=True
        ):
            np.testing.assert_array_equal(taken, column)
    for shape in ((4, 200), (200, 3), (800,), (200, 4, 1)):
        with pytest.raises(ValueError, match=r"expected the columns \[N, 4\]"):
            columns_of_table(np.zeros(shape))


def test_columns_go_by_their_names():
    columns = draw(20)
    for number in range(4):
        names = {name: known[min(number, len(known) - 1)].upper() for name, known in FIELD_NAMES.items()}
        arrays = {names[name]: columns[name] for name in "pyxt"}
        for taken, name in zip(named_columns(arrays, tuple(arrays)), "txyp", strict=True):
            np.testing.assert_array_equal(taken, columns[name])
    with pytest.raises(ValueError, match=r"no array 'p', only t, x, y, label"):
        named_columns({**columns, "label": 1}, ("t", "x", "y", "label"))
    with pytest.raises(ValueError, match=r"several \(ts, time\)"):
        named_columns({}, ("ts", "time", "x", "y", "p"))


def test_each_finding_is_said_once_with_the_file(caplog):
    from sdt_datasets.columns import Notes

    note = Notes()
    for number in range(3):
        note.name = f"{number}.npz"
        events_from_columns(**{**draw(9), "t": np.linspace(0, 0.5, 9)}, note=note)
    assert caplog.text.count("taken as seconds") == 1
    assert "0.npz: times have fractions" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_pixels_outside_the_sensor_have_a_row():
    x, y = np.array([0, 3, 9]), np.array([1, 1, 1])
    check_inside(x, y, (10, 2, 2))
    with pytest.raises(ValueError, match="row 102 at x=9 lies outside the sensor of 9 x 2"):
        check_inside(x, y, (9, 2, 2), first_row=100)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_frames_that_are_not_finite_are_refused(value):
    frames = np.zeros((3, 2, 4, 5))
    frames[2, 1, 0, 4] = value
    with pytest.raises(ValueError, match=r"frame 2 holds .* at channel 1, row 0, column 4"):
        frames_from_counts(frames)
    for wrong in (np.zeros((3, 1, 4, 5)), np.zeros((2, 4, 5)), np.zeros((3, 2, 0, 5)), np.zeros((3, 2, 4, 5), complex)):
        with pytest.raises(ValueError, match=r"expected frames \[T, 2, H, W\]"):
            frames_from_counts(wrong)
    assert frames_from_counts(np.full((3, 2, 1, 1), 7, np.uint16)).dtype == np.float32
