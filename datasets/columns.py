"""The columns of an event recording, checked: a file's numbers become events, or are rejected with row and value.

Nothing is cast unchecked. Whatever can be understood in only one way (times in seconds, a clock that wraps, events out
of order) is converted and reported; everything else raises `ValueError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np

_log = logging.getLogger(__name__)

EVENT_DTYPE = np.dtype([("t", np.int64), ("x", np.uint16), ("y", np.uint16), ("p", bool)])
"""Events: time (microseconds in all data sets here), pixels, polarity (ON is True)."""

LARGEST_SIDE = 8192
"""In pixels; a larger coordinate is no pixel of an event camera, and would need frames of gigabytes."""

FIELD_NAMES = {
    "t": ("t", "ts", "time", "times", "timestamp", "timestamps"),
    "x": ("x", "xs"),
    "y": ("y", "ys"),
    "p": ("p", "ps", "pol", "pols", "polarity", "polarities", "on"),
}
"""The names of the columns in files, in any case of letters."""

_CLOCK_BITS = (16, 23, 24, 31, 32)
_STRAY_SHARE, _GAP, _STRAY_DISTANCE = 1000, 2, 10

Note = Callable[[str, str], None]
"""Reports a conversion: the kind of finding, and a sentence."""


class Notes:
    """Reports each kind of finding once, as a warning that names the first recording with it."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.name = ""

    def __call__(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            _log.warning("%s: %s (reported once, for the first such recording)", self.name or "the events", text)


def events_from_columns(
    t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray, *, note: Note | None = None
) -> np.ndarray:
    """The columns `[N]` of a recording as structured events `[N]` of `EVENT_DTYPE`, in order of time.

    Times with fractions are seconds and become microseconds; a counter of 16, 23, 24, 31 or 32 bits that wraps is
    unwrapped; single events out of order are sorted. Each is reported to `note`. Polarity is 0/1, -1/1 or boolean.

    Raises `ValueError`, with row and value, for columns of different lengths, for coordinates that are not whole pixels
    below `LARGEST_SIDE`, for another polarity, for times that are not finite, jump back, or are far from the others.

    >>> events_from_columns(np.array([0.5e-3, 1e-3]), np.array([0, 3]), np.array([1, 1]), np.array([-1, 1]))["t"]
    array([ 500, 1000])
    """
    note = Notes() if note is None else note
    columns = {name: np.asarray(column) for name, column in (("t", t), ("x", x), ("y", y), ("p", p))}
    lengths = {name: column.shape for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or columns["t"].ndim != 1:
        raise ValueError(f"the columns t, x, y, p must be of one length, got the shapes {lengths}")
    events = np.empty(len(columns["t"]), dtype=EVENT_DTYPE)
    if not len(events):
        return events
    for name in "xy":
        events[name] = _whole_pixels(name, columns[name])
    on = polarity_is_on(columns["p"])
    if columns["p"].dtype.kind != "b" and on.all():
        note("one polarity", f"all {len(events)} events have the polarity {columns['p'][0]}; they are taken as ON")
    events["p"] = on
    events["t"] = _microseconds(columns["t"], note)
    return _in_order(events, note)


def named_columns(arrays: Mapping[str, np.ndarray] | np.ndarray, names: tuple[str, ...]) -> list[np.ndarray]:
    """The columns t, x, y, p from arrays or fields with these names, or with others of `FIELD_NAMES`.

    Raises `ValueError` if one is missing or present twice.
    """
    columns = []
    for column, known in FIELD_NAMES.items():
        found = [name for name in names if name == column] or [name for name in names if name.lower() in known]
        if len(found) != 1:
            there = f"several ({', '.join(found)})" if found else f"no array {column!r}"
            raise ValueError(f"it has {there}, only {', '.join(names) or 'nothing'}; expected t, x, y and p")
        columns.append(arrays[found[0]])
    return columns


def columns_of_table(table: np.ndarray) -> list[np.ndarray]:
    """The columns t, x, y, p of an array `[N, 4]` = x, y, p, t.

    Raises `ValueError` for another shape, and if the values show another order.
    """
    if table.ndim != 2 or table.shape[1] != 4 or table.dtype.kind not in "iuf":
        raise ValueError(f"expected the columns [N, 4] = x, y, p, t, found {table.dtype} of shape {table.shape}")
    x, y, p, t = table.T
    if np.isin(p, (-1, 0, 1)).all() and (np.diff(t) >= 0).all():
        return [t, x, y, p]
    binary = [i for i in range(4) if np.isin(table[:, i], (-1, 0, 1)).all()]
    forward = [i for i in range(4) if (np.diff(table[:, i]) >= 0).all() and table[0, i] < table[-1, i]]
    signs = []
    if binary and 2 not in binary:
        signs.append(f"polarity (0/1 or -1/1) is in column {binary[-1]} and not in column 2")
    if len(table) >= 10 and len(forward) == 1 and forward != [3]:
        signs.append(f"column {forward[0]} runs forward in time and column 3 does not")
    if signs:
        raise ValueError(
            f"its columns are not in the order x, y, p, t: {' and '.join(signs)} (counted from 0; row 0 is "
            f"{table[0].tolist()}). Save array[:, [i, j, k, l]] with the positions of x, y, p, t"
        )
    return [t, x, y, p]


def polarity_is_on(p: np.ndarray, *, first_row: int = 0) -> np.ndarray:
    """Polarities `[N]` coded 0/1, -1/1 or boolean as booleans `[N]`, True for ON; `ValueError` for others.

    Rows in the message are counted from `first_row`.
    """
    if p.dtype.kind == "b" or not len(p):
        return p.astype(bool, copy=False)
    _check_numbers("p", p)
    # Two sweeps for integers of 0 and 1, the usual case; NaN fails both comparisons.
    if p.min() >= 0 and p.max() <= 1 and p.dtype.kind != "f":
        return p > 0
    signed = bool((p == -1).any())
    bad = ~((p == 1) | (p == (-1 if signed else 0)))
    if bad.any():
        hint = "; where 1 is OFF and 2 is ON, subtract 1" if np.isin(p, (1, 2)).all() else ""
        mixed = " (-1 and 0 do not go together)" if signed and (p == 0).any() else ""
        _refuse("p", p, bad, f"0/1, -1/1 or booleans for OFF and ON{mixed}{hint}", first_row)
    return p > 0


def check_inside(x: np.ndarray, y: np.ndarray, sensor_size: tuple[int, int, int], *, first_row: int = 0) -> None:
    """Raise `ValueError`, with row and value, if a pixel `x`, `y` `[N]` lies outside the sensor `(W, H, 2)`.

    Rows are counted from `first_row`.
    """
    width, height, _ = sensor_size
    for name, values, side in (("x", x, width), ("y", y, height)):
        if len(values) and (int(values.min()) < 0 or int(values.max()) >= side):
            row = int(np.argmax((values < 0) | (values >= side)))
            raise ValueError(
                f"the event in row {first_row + row} at {name}={values[row]} lies outside the sensor of {width} x "
                f"{height} pixels (W x H)"
            )


def frames_from_counts(frames: np.ndarray) -> np.ndarray:
    """Counts `[T, 2, H, W]` of any number type as float32; `ValueError` for another shape and for NaN or infinity."""
    if frames.ndim != 4 or frames.shape[1] != 2 or 0 in frames.shape or frames.dtype.kind not in "biuf":
        raise ValueError(f"expected frames [T, 2, H, W], found {frames.dtype} of shape {list(frames.shape)}")
    with np.errstate(over="ignore"):
        counts = np.ascontiguousarray(frames, dtype=np.float32)
    if not np.isfinite(counts).all():
        place = np.unravel_index(int(np.argmin(np.isfinite(counts))), counts.shape)
        step, channel, row, column = (int(i) for i in place)
        raise ValueError(
            f"frame {step} holds {frames[place].item()} at channel {channel}, row {row}, column {column}; expected "
            f"finite counts"
        )
    return counts


def _check_numbers(name: str, column: np.ndarray) -> None:
    if column.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be numbers, found {column.dtype}, {column[0]!r} in row 0")


def _refuse(name: str, column: np.ndarray, bad: np.ndarray, expected: str, first_row: int = 0) -> None:
    row = int(np.argmax(bad))
    raise ValueError(f"{name} is {column[row].item()} in row {first_row + row}; expected {expected}")


def _whole_pixels(name: str, column: np.ndarray) -> np.ndarray:
    _check_numbers(name, column)
    expected = f"a whole pixel, 0 ... {LARGEST_SIDE - 1}"
    if column.dtype.kind == "f":
        bad = ~np.isfinite(column) | (column != np.rint(column))
        if bad.any():
            normalized = column.min() >= 0 and column.max() <= 1
            hint = "; all lie within 0 ... 1: multiply by the sensor's side and round" if normalized else ""
            _refuse(name, column, bad, expected + hint)
    bad = (column < 0) | (column >= LARGEST_SIDE)
    if bad.any():
        _refuse(name, column, bad, expected)
    return column


def _microseconds(t: np.ndarray, note: Note) -> np.ndarray:
    _check_numbers("t", t)
    limit = 2**62  # differences of two such times fit in 64 bits
    if t.dtype.kind != "f":
        bad = (t > limit) | (t < -limit) if t.dtype.itemsize == 8 else np.zeros(1, dtype=bool)
        if bad.any():
            _refuse("t", t, bad, "a time within +-2**62")
        return t.astype(np.int64)
    wide = t.astype(np.float64)
    bad = ~np.isfinite(wide)
    if bad.any():
        _refuse("t", t, bad, "a finite time")
    if (wide != np.rint(wide)).any():
        note(
            "seconds",
            f"times have fractions ({t.min()} ... {t.max()}): they are taken as seconds and kept in microseconds",
        )
        wide = np.rint(wide * 1e6)
    elif (step := float(np.spacing(np.abs(t).max()))) > 1:
        note("coarse", f"times up to {t.max()} are stored as {t.dtype}, which holds only every {step:g}th of them")
    bad = np.abs(wide) > limit
    if bad.any():
        _refuse("t", t, bad, "a time within +-2**62 microseconds")
    return wide.astype(np.int64)


def _in_order(events: np.ndarray, note: Note) -> np.ndarray:
    """The events sorted by time; `ValueError` if the clock jumps back or a time is far from all others."""
    t = np.ascontiguousarray(events["t"])
    back = np.flatnonzero(t[1:] < t[:-1])
    if len(back):
        if bits := _wrapped_bits(t, back):
            note("wrap", f"the clock wraps at 2**{bits} after row {back[0]} (t={t[back[0]]}): it is unwrapped")
            t[1:] += np.cumsum(t[1:] < t[:-1]) << bits
            events["t"] = t
        else:
            span = int(t.max()) - int(t.min())
            jumps = back[t[back] - t[back + 1] > span * max(0.01, 20 / len(t))]
            # A shuffled recording goes far back at every other row, a clock that was reset only in a few places.
            if len(jumps) and 20 * len(jumps) <= len(t):
                row = int(jumps[0])
                raise ValueError(
                    f"its clock jumps back from t={t[row]} in row {row} to t={t[row + 1]} in row {row + 1}; divide "
                    f"the recording there, or correct the times"
                )
            note("unsorted", f"{len(back)} of {len(t)} events come before their predecessor in time: they are sorted")
            order = np.argsort(t, kind="stable")
            _check_strays(t[order], order, note)
            return events[order]
    _check_strays(t, np.arange(len(t)), note)
    return events


def _wrapped_bits(t: np.ndarray, back: np.ndarray) -> int | None:
    """The width of a counter that overflows wherever the times go back."""
    before, after = t[back], t[back + 1]
    for bits in _CLOCK_BITS:
        for least in (0, -(2 ** (bits - 1))):
            near = 2**bits // 10
            if (
                t.min() >= least
                and t.max() < least + 2**bits
                and (before >= least + 2**bits - near).all()
                and (after <= least + near).all()
            ):
                return bits
    return None


def _check_strays(t: np.ndarray, rows: np.ndarray, note: Note) -> None:
    """Report sorted times of which a few at one end are far from all others; `ValueError` if they are too far."""
    if len(t) < 10:
        return
    few = max(1, len(t) // _STRAY_SHARE)
    first = rows[:few], t[:few], np.diff(t[: few + 1]), t[-1] - t[1 : few + 1]
    last = rows[-few:], t[-few:], np.diff(t[-few - 1 :]), t[-few - 1 : -1] - t[0]
    for at, times, gaps, rests in (first, last):
        distances = gaps / np.maximum(rests, 1)
        worst = int(np.argmax(distances))
        if distances[worst] > _GAP:
            text = (
                f"t is {times[worst]} in row {at[worst]}, {distances[worst]:.3g} times the length of the other events "
                f"(t={t[len(t) // 2]} in their middle) away from them"
            )
            if distances[worst] > _STRAY_DISTANCE:
                raise ValueError(f"{text}; correct or remove such rows")
            note("gap", f"{text}, which leaves frames of equal duration between them empty")
