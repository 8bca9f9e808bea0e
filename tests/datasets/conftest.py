"""Recordings on disk, and frames counted one event at a time."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

# As for the tests of the recipes: this folder's own helpers.
sys.path.insert(0, str(Path(__file__).parent))
from writing import Writer


@pytest.fixture
def write() -> Writer:
    return Writer()


@pytest.fixture
def count():
    """Frames by a direct count of columns split by number: `count(columns, T, W, H)` -> `[T, 2, H, W]`."""

    def direct(columns, time_steps, width=128, height=128):
        t, x, y, p = columns
        per_frame = len(t) // time_steps
        frames = np.zeros((time_steps, 2, height, width), dtype=np.float32)
        for i in range(len(t)):
            frames[min(i // per_frame, time_steps - 1), int(p[i]), y[i], x[i]] += 1
        return frames

    return direct


@pytest.fixture
def recording() -> Path:
    """Real events of a DAVIS346 camera."""
    return Path(__file__).parents[2] / "recipes" / "data" / "davis346_crop.npz"


@pytest.fixture(scope="session")
def photograph():
    """Crops of two real photographs: `photograph(name, number, (height, width))`, a different one for each number."""
    pictures = dict(zip(("china", "flower"), load_sample_images().images, strict=True))

    def crop(name, number, size=(40, 48)):
        height, width = size
        top, left = 37 * number % (427 - height), 53 * number % (640 - width)
        return Image.fromarray(pictures[name][top : top + height, left : left + width])

    return crop


@pytest.fixture
def tree(tmp_path, photograph):
    """An ImageNet-style tree: six training and three validation PNG crops of each of the two photographs."""
    for split, count in (("train", 6), ("val", 3)):
        for name in ("china", "flower"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                photograph(name, number + 10 * (split == "val")).save(folder / f"{number}.png")
    return tmp_path / "tree"
