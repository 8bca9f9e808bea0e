"""Which samples come when, from the position alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.config import KEYS, ConfigError, changed, load_config
from common.loading import (
    EpochBatches,
    ShardBatches,
    UnreadableSample,
    build_datasets,
    build_loader,
    fetch,
    stop_loaders,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import RECIPES

_sizes = st.tuples(st.integers(1, 200), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))


@settings(deadline=None)
@given(_sizes, st.integers(0, 3), st.data())
def test_an_epoch_is_divided_without_overlap_and_goes_on_from_any_update(sizes, epoch, data):
    samples, batch_size, accumulate, processes, seed = sizes
    total = batch_size * accumulate * processes
    if samples < total:
        with pytest.raises(ConfigError, match="do not fill one batch"):
            EpochBatches(samples, batch_size=batch_size, accumulate=accumulate, processes=processes)
        return
    shares = [
        EpochBatches(samples, batch_size=batch_size, accumulate=accumulate, rank=rank, processes=processes, seed=seed)
        for rank in range(processes)
    ]
    seen = []
    start = data.draw(st.integers(0, samples // total))
    for share in shares:
        share.seek(epoch, 0)
        batches = list(share)
        assert len(batches) == len(share) == (samples // total) * accumulate
        assert all(len(batch) == batch_size for batch in batches)
        seen += [index for batch in batches for index in batch]
        share.seek(epoch, start)
        assert list(share) == batches[start * accumulate :]
    assert len(set(seen)) == len(seen) == (samples // total) * total
    assert set(seen) <= set(range(samples))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = set()
    for seed in range(3):
        batches = EpochBatches(100, batch_size=100, seed=seed)
        for epoch in range(3):
            batches.seek(epoch, 0)
            orders.add(tuple(next(iter(batches))))
    assert len(orders) == 9


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 8))
def test_an_evaluation_meets_each_sample_once(samples, batch_size, processes):
    shares = [ShardBatches(samples, batch_size=batch_size, rank=r, processes=processes) for r in range(processes)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(samples))
    assert all(len(share) == len(list(share)) for share in shares)


OF_BOTH = {"data.on_error": "skip", "data.train_samples": 50, "data.test_samples": 20, "seed": 7}
OF_IMAGES = {
    **OF_BOTH, "data.img_size": 24, "data.mean": [0.1], "data.std": [0.2], "data.crop_pct": 0.8, "data.hflip": 0.9,
    "data.interpolation": "nearest", "data.scale": [0.3, 0.9], "data.ratio": [0.6, 1.5], "data.color_jitter": 0.7,
    "data.auto_augment": "rand-m3", "data.random_erasing": 0.2, "data.erasing_mode": "pixel", "data.download": True,
    "data.validation_samples": 30, "model.in_channels": 3,
}  # fmt: skip
OF_EVENTS = {
    **OF_BOTH, "events.time_steps": 7, "events.split_by": "time", "events.size": 9, "events.augment": "roll",
    "events.cache": "kept", "events.sensor_size": [5, 6],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "build", "values"),
    [
        ("folder", "common.loading.build_image_datasets", OF_IMAGES),
        ("event_folder", "sdt_datasets.event_data.build_event_datasets", OF_EVENTS),
    ],
)
def test_every_setting_of_the_data_reaches_it(monkeypatch, name, build, values):
    passed = {}
    monkeypatch.setattr(build, lambda *place, **options: passed.update(options, place=place))
    build_datasets(changed(load_config([f"data.name={name}", "data.root=here"], default="digits"), values))
    if name == "folder":
        assert passed.pop("evaluation_only") is False
    assert passed == {"place": (name, "here")} | {key.rpartition(".")[2]: value for key, value in values.items()}
    own = {key for key in KEYS if (KEYS[key].get("images") if name == "folder" else key.startswith("events."))}
    assert own <= values.keys()


class Squares:
    """Sample i is (i^2, i); sample 7 cannot be read."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 7:
            raise ValueError("seven.jpg cannot be read")
        return torch.tensor([float(index**2)]), index


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_give_batches_and_quote_an_unreadable_sample(workers):
    loader = build_loader(Squares(), ShardBatches(12, batch_size=3), workers=workers, pin=False)
    batches = fetch(loader)
    inputs, targets = next(batches)
    assert inputs.tolist() == [[0.0], [1.0], [4.0]] and targets.tolist() == [0, 1, 2]
    next(batches)
    with pytest.raises(UnreadableSample) as caught:
        next(batches)
    assert str(caught.value) == "seven.jpg cannot be read"
    stop_loaders(loader)


LEFT_OPEN = """
import sys
sys.path[:0] = {path!r}
from common.loading import ShardBatches, build_loader, fetch
from test_loading import Squares

kept = fetch(build_loader(Squares(), ShardBatches(12, batch_size=3), workers=2, pin=False))
next(kept)
print("leaving")
"""


def test_a_process_ends_though_its_loaders_were_left_open(tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN.format(path=[str(RECIPES), str(here)]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "leaving\n", done.stderr
