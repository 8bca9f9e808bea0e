from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

RECIPES = Path(__file__).parents[2] / "recipes"
# As Python does for a script in that folder, and for this folder's own helpers.
sys.path[:0] = [str(RECIPES), str(Path(__file__).parent)]


@pytest.fixture
def launcher(tmp_path: Path):
    from launching import Launcher

    launcher = Launcher(tmp_path)
    yield launcher
    launcher.clean_up()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-style tree of crops of scikit-learn's two photographs: 24 to train, 14 to validate."""
    from sklearn.datasets import load_sample_images

    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", 12), ("val", 7)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                y, x = rng.integers(0, [photograph.shape[0] - 200, photograph.shape[1] - 200])
                Image.fromarray(photograph[y : y + 200, x : x + 200]).save(folder / f"{i}.jpg")
    return root


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """`set_up(*arguments)` makes a run in this process, in an empty working directory."""
    from accelerate.state import AcceleratorState, GradientState
    from common import set_up as module
    from common.config import load_config

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def make(*arguments: str, default: str = "digits"):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return module.set_up(load_config(arguments, default=default))

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def train(set_up):
    """`train(*arguments)` trains in this process and gives the finished run."""
    from common.engine import train

    def go(*arguments: str, default: str = "digits"):
        run = set_up(*arguments, default=default)
        train(run)
        return run

    return go
