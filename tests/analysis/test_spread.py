"""The spread over samples, against the figures of each sample alone."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from sdt_blocks.analysis import energy, energy_from_rates, firing_rates
from sdt_blocks.analysis.moments import Moments, interval, merged, merged_steps, share_interval


def batches(frames):
    torch.manual_seed(3)
    shape = (7, 3, 2, 16, 16) if frames else (7, 3, 16, 16)
    return torch.rand(shape) * torch.rand(7, *[1] * (len(shape) - 1)).round(decimals=1) * (torch.rand(shape) < 0.7)


@pytest.mark.parametrize("frames", [False, True])
def test_energies_of_each_sample(small, frames):
    model, x = small(in_channels=2 if frames else 3), batches(frames)
    whole, alone = energy(model, [x[:3], x[3:5], x[5:]]), [energy(model, x[i : i + 1]) for i in range(len(x))]
    for name, found in whole.estimates.items():
        totals = [one.estimates[name].cost.total_mj for one in alone]
        assert found.cost.total_mj == pytest.approx(np.mean(totals)) and found.samples == 7
        assert found.std_mj == pytest.approx(np.std(totals, ddof=1), rel=1e-6) and found.std_mj > 0
        low, high = found.interval(0.9)
        expected = stats.t.interval(0.9, 6, loc=np.mean(totals), scale=stats.sem(totals))
        assert (low, high) == pytest.approx(expected, rel=1e-6)
        assert len(found.steps_std_mj) == whole.steps > 2
        for step, std in enumerate(found.steps_std_mj, 1):
            totals = [sum(cost.total_mj for cost in one.estimates[name].steps[:step]) for one in alone]
            assert std == pytest.approx(np.std(totals, ddof=1), rel=1e-6)
            expected = stats.t.interval(0.8, 6, loc=np.mean(totals), scale=stats.sem(totals))
            assert found.interval(0.8, steps=step) == pytest.approx(expected, rel=1e-6)
        for place, row in enumerate(found.rows):
            each = [one.estimates[name].rows[place].cost.total_mj for one in alone]
            assert row.std_mj == pytest.approx(np.std(each, ddof=1), rel=1e-6, abs=1e-18), row.name
            assert row.std_mj < 1e-15 or row.interval(0.9)[0] < row.cost.total_mj < row.interval(0.9)[1]
        assert (found.rows[0].std_mj > 0) == frames
    assert alone[0].estimates["step"].std_mj is None and alone[0].estimates["step"].interval() is None
    assert json.loads(whole.to_json())["estimates"]["yan"]["std_mj"] == whole.estimates["yan"].std_mj


def test_rates_of_each_sample(small, tmp_path):
    model, x = small(), batches(False)
    whole, alone = firing_rates(model, [x[:4], x[4:]]), [firing_rates(model, x[i : i + 1]) for i in range(len(x))]
    for name, layer in whole.layers.items():
        assert layer.std == pytest.approx(np.std([one[name].mean for one in alone], ddof=1), abs=1e-12), name
    assert whole.std == pytest.approx(np.std([one.mean for one in alone], ddof=1)) and whole.std > 0
    low, high = whole.interval()
    assert low < whole.mean < high
    whole.to_csv(tmp_path / "rates.csv")
    header, first = (tmp_path / "rates.csv").read_text().splitlines()[:2]
    assert header.split(",")[2] == "std" and float(first.split(",")[2]) == next(iter(whole.layers.values())).std
    assert "± std" in str(whole)


def test_one_sample_has_no_spread(small):
    rates = firing_rates(small(), torch.rand(1, 3, 16, 16))
    assert rates.std is None and rates.interval() is None and "None" not in str(rates)
    given = energy_from_rates(small(), 0.2, (3, 16, 16))
    assert all(found.std_mj is None for found in given.estimates.values()) and "None" not in str(given)


@pytest.mark.parametrize("parts", [[7], [3, 4], [1, 1, 5], [0, 7]])
def test_parts_give_the_moments_of_the_whole(parts):
    """Also where values are large against their spread, and where a part lacks one."""
    values = 1e9 + np.random.default_rng(0).normal(size=(7, 3))
    split = np.split(values, np.cumsum(parts)[:-1])
    found = merged(Moments.of({name: part[:, name] for name in range(3)}) if len(part) else Moments() for part in split)
    weights = {0: 1.0, 1: -2.0, 2: 0.5}
    assert found.std(weights) == pytest.approx(np.std(values @ list(weights.values()), ddof=1), rel=1e-5)
    assert found.products.shape == (3, 3) and found.samples == 7


def test_a_value_that_a_part_lacks_is_zero_there():
    found = merged([Moments.of({"a": np.array([1.0, 2.0])}), Moments.of({"b": np.array([3.0, 5.0, 4.0])})])
    table = np.array([[1, 0], [2, 0], [0, 3], [0, 5], [0, 4]])
    assert found.std({"a": 1.0, "b": 2.0}) == pytest.approx(np.std(table @ [1, 2], ddof=1))


def test_a_part_of_fewer_steps_keeps_its_last():
    short, long = ([Moments.of({"a": np.array(each)}) for each in of] for of in ([[1.0, 2.0]], [[3.0], [7.0]]))
    found = merged_steps([short, [], long])
    expected = [np.std(each, ddof=1) for each in ([1, 2, 3], [1, 2, 7])]
    assert [one.std({"a": 1.0}) for one in found] == pytest.approx(expected)


@pytest.mark.parametrize(("right", "samples"), [(0, 7), (5, 7), (7, 7), (180, 200)])
def test_the_interval_of_an_accuracy(right, samples):
    expected = stats.binomtest(right, samples).proportion_ci(0.9, method="wilson")
    assert share_interval(right / samples, samples, 0.9) == pytest.approx(tuple(expected), abs=1e-12)
    assert share_interval(0.5, 0, 0.9) is None


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5])
def test_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        interval(0.5, 0.1, 5, confidence)
    with pytest.raises(ValueError, match=f"such as 0.95, got {confidence}"):
        share_interval(0.5, 5, confidence)
