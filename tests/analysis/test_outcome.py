"""Accuracy after each step, and samples of different classes; charts and tables of what was found."""

import csv
import io
import re

import pytest
import torch
from torch import nn

from sdt_blocks import LIF, example_images, example_model
from sdt_blocks.analysis import analyze_model, charts, energy
from sdt_blocks.analysis.outcome import look
from sdt_blocks.analysis.report import ReportOptions
from sdt_blocks.analysis.summary import layer_tables


def test_accuracy_after_each_step_is_that_of_fewer_steps():
    model, (images, labels) = example_model(), example_images()
    found = look(model, [(images[:7], labels[:7]), (images[7:], labels[7:])], images=3)
    assert found.samples == 20 and not model.per_step
    for steps in (1, 2, 3, 4):
        model.time_steps = steps
        right = (model(images).argmax(1) == labels).float().mean()
        assert found.accuracy[steps - 1] == pytest.approx(float(right), abs=1e-6)
    assert found.accuracy[0] < found.accuracy[-1] == 1  # the first step alone does not know all digits


def test_samples_are_of_different_classes_and_unknown_ones_count_nowhere():
    model, (images, labels) = example_model(), example_images()
    order = labels.argsort(stable=True)
    assert labels[order][0] == labels[order][1]
    found = look(model, [(images[order], labels[order])], images=4)
    assert len(set(found.targets)) == 4 and found.answers == found.targets
    unknown = torch.where(labels == 3, labels, -1)
    found = look(model, [(images, unknown)], images=2)
    assert found.samples == 2 and found.accuracy[-1] == 1
    assert look(model, images, images=2).accuracy == [] and look(model, images, images=2).targets == [-1, -1]


class OnlyLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fire = nn.Linear(4, 3), LIF()

    def forward(self, x):
        return self.fire(4 * self.fc(x).expand(2, *x.shape[:1], 3)).mean(0)


def test_a_network_without_logits_of_steps_has_one_accuracy():
    torch.manual_seed(0)
    model, x = OnlyLogits().eval(), torch.rand(12, 4)
    answers = model(x).argmax(1)
    targets = torch.where(torch.arange(12) % 3 == 0, (answers + 1) % 3, answers)
    assert look(model, [(x, targets)], images=0).accuracy == pytest.approx([8 / 12])


def test_recordings_of_different_lengths(small, tmp_path):
    """The mean of a recording's logits, here of its first steps alone, is its answer to the end."""
    model, labels = small(), torch.tensor([0, 1, 2])
    batches = [(torch.rand(3, steps, 3, 16, 16), labels) for steps in (2, 4)]
    _, report = analyze_model(model, batches, tmp_path)
    found = look(model, batches, images=6)
    for step in (1, 2, 3, 4):
        right = sum(int((model(x[:, :step]).argmax(1) == labels).sum()) for x, _ in batches)
        assert found.accuracy[step - 1] == pytest.approx(right / 6)
    assert len(found.accuracy) == report.steps == 4 and found.samples == 6
    assert {len(sample) for sample in found.drawn} == {2, 4} and len(list((tmp_path / "overlays").iterdir())) == 3


def test_bars_are_shares_of_one_scale():
    html = charts.bars(
        [charts.Bar("a", {"AC": 1.0, "memory": 2.0}, "3"), charts.Bar("b", {"AC": 0.0}, "0", {"even": 9})]
    )
    assert re.findall(r"width:([\d.]+)%", html) == ["33.33", "66.67"] and "left:100.00%" in html


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [1e-9, 4e-9, 2e-9], [7.0] * 16])
def test_lines_lie_within_their_frame(values):
    html = charts.lines("title", {"one": list(enumerate(values))}, str)
    points = re.search(r'points="([^"]*)"', html)[1].split()
    places = [tuple(map(float, point.split(","))) for point in points]
    assert len(places) == len(values) and "nan" not in html
    assert all(charts.LEFT <= x <= charts.WIDTH and charts.TOP - 1 <= y <= charts.HEIGHT for x, y in places)
    assert min(y for _, y in places) == places[values.index(max(values))][1]


def test_layers_as_tables():
    report = energy(example_model(), example_images()[0])
    texts = layer_tables(report)
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    compute = sum(float(row["step_compute_mj"]) + float(row["step_memory_mj"]) for row in rows)
    assert compute == pytest.approx(report.estimates["step"].cost.total_mj) and compute > 0
    assert "after pooling" in texts["md"] and texts["tex"].count(r" \\") == 1 + len(rows)


def test_the_page_of_a_silent_network(tmp_path):
    """Whatever is drawn of nothing is whole: no division by zero, no empty chart, and it is said."""
    model, (images, labels) = example_model(), example_images()
    for parameter in model.parameters():
        parameter.data.zero_()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.zero_()
    with pytest.warns(UserWarning, match="no neuron fired"):
        rates, _ = analyze_model(model, [(images, labels)], tmp_path, options=ReportOptions(seconds=0.001))
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert rates.mean == 0 and "no neuron fired" in html and ">nan" not in html and ">inf" not in html
    for heading in ("Break-even with an ANN", "Step by step", "Measured on this machine", "Downloads"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("<svg") >= 6 and html.count('download="') == 6 and "taken for" not in html.split("<h2>")[0]
