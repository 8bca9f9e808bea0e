"""The programs of docs/mixing.md train, and what they make goes through all that the kit has for a model."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sdt_blocks import optimize_for_inference
from sdt_blocks.analysis import audit, energy, firing_rates

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "mixing.md").read_text(encoding="utf-8")
FOUND = re.findall(
    r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, re.DOTALL | re.MULTILINE
)
PROGRAMS = {title: program for title, program, _ in FOUND}
SHOWN = {title: shown for title, _, shown in FOUND}
IN_STEPS = "Other neurons in a trained network"


def write_shd(folder: Path, images: np.ndarray, labels: np.ndarray, split: str) -> None:
    """Digits as the Spiking Heidelberg Digits lie in HDF5: columns are moments, rows bands of units, ink is spikes."""
    generator = np.random.default_rng(0)
    (folder / f"shd_{split}.h5.zip").touch()  # Tonic asks for the archive too
    with h5py.File(folder / f"shd_{split}.h5", "w") as file:
        spikes = file.create_group("spikes")
        times = spikes.create_dataset("times", len(labels), h5py.vlen_dtype(np.float16))
        units = spikes.create_dataset("units", len(labels), h5py.vlen_dtype(np.uint16))
        for i, image in enumerate(images):
            row, column = np.repeat(np.argwhere(image > 0), image[image > 0].astype(int), axis=0).T
            at = column / 8 + generator.random(len(row)) / 8
            unit = 700 * (row + generator.random(len(row))) // 8
            order = np.argsort(at)
            times[i], units[i] = at[order].astype(np.float16), unit[order].astype(np.uint16)
        file["labels"] = labels.astype(np.uint16)
        file["extra/keys"] = [str(digit).encode() for digit in range(10)]
        file["extra/speaker"] = np.zeros(len(labels), np.uint16)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that share a core with another test wait for each other at every small operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("title", PROGRAMS)
def test_programs(title, tmp_path, monkeypatch, capsys, as_printed):
    monkeypatch.chdir(tmp_path)
    if "SHD" in PROGRAMS[title]:
        digits = load_digits()
        (tmp_path / "SHD").mkdir()
        write_shd(tmp_path / "SHD", digits.images[:800], digits.target[:800], "train")
        write_shd(tmp_path / "SHD", digits.images[800:900], digits.target[800:900], "test")
    names: dict = {}
    exec(compile(PROGRAMS[title], title, "exec"), names)
    if SHOWN[title]:
        as_printed(SHOWN[title], capsys.readouterr().out)
    model, some = names["model"].eval(), names["held_out"][:64]
    rates = firing_rates(model, some)
    assert not rates.silence and all(0 < layer.mean < 1 for layer in rates.layers.values())
    assert audit(model, some).spike_driven
    report = energy(model, some)
    assert 0 < report.total_mj < report.ann_mj
    expected = model(some)
    fast = {sparse: optimize_for_inference(model, sparse=sparse) for sparse in (False, True)}
    for made in fast.values():
        same = (made(some) - expected).abs().amax(1) < 1e-3
        assert same.float().mean() > 0.95  # near its threshold a neuron may take the other side
    assert [name for name, _ in fast[True].products()] or title == IN_STEPS
