"""Recordings of shapes that move in one of four directions, which a single moment does not reveal."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

DIRECTIONS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}
"""Rows and columns that a shape moves in one step."""
SIDE = 32
"""Side length of the sensor, in pixels."""
STEPS, STEP_MS = 8, 10
SPEED = 2
"""Pixels per step."""
NOISE = 8
"""Events per step that belong to no shape."""

_GRID = np.stack(np.meshgrid(np.arange(-5, 6), np.arange(-5, 6), indexing="ij"))
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda y, x: y**2 + x**2 <= 20,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) <= 4,
    "diamond": lambda y, x: abs(y) + abs(x) <= 5,
    "plus": lambda y, x: np.minimum(abs(y), abs(x)) <= 1,
}


def draw_recording(rng: np.random.Generator, direction: str) -> np.ndarray:
    """Events of one moving shape, int64 `[N, 4]`: the columns x, y, p, t (us, whole milliseconds) of a `.npy`.

    At each step the shape moves by `SPEED` pixels, and every pixel of it fires once with either polarity, at a random
    time within the step. The scene wraps around and the shape starts anywhere, so at every moment all places and all
    polarities are equally likely in each direction: only the order of the moments distinguishes the directions.
    """
    inside = SHAPES[str(rng.choice(list(SHAPES)))]
    offsets = _GRID[:, inside(*_GRID)]
    start = rng.integers(0, SIDE, size=(2, 1))
    velocity = SPEED * np.array(DIRECTIONS[direction])[:, None]
    steps = []
    for step in range(STEPS):
        shape = (start + step * velocity + offsets) % SIDE
        y, x = np.concatenate([shape, rng.integers(0, SIDE, size=(2, NOISE))], axis=1)
        t = np.sort(rng.integers(step * STEP_MS, (step + 1) * STEP_MS, len(x)))
        order = rng.permutation(len(x))
        steps.append(np.stack([x[order], y[order], rng.integers(0, 2, len(x)), 1000 * t], axis=1))
    return np.concatenate(steps)


def write_recordings(root: Path, *, train: int, test: int, seed: int = 0) -> None:
    """Write `train` files `root/train/DIRECTION/N.npy` and `test` files `root/test/DIRECTION/N.npy`.

    An existing root is left as it is. Several processes may do so at once: the recordings appear all at once, and are
    the same whichever process wrote them.
    """
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_name(f".{root.name}-{uuid.uuid4().hex}")
    for label, direction in enumerate(DIRECTIONS):
        for split, count in (("train", train), ("test", test)):
            folder = unfinished / split / direction
            folder.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([seed, label, split == "test", number])
                np.save(folder / f"{number:04d}.npy", draw_recording(rng, direction))
    try:
        os.rename(unfinished, root)
    except OSError:
        shutil.rmtree(unfinished)
        if not root.exists():
            raise
