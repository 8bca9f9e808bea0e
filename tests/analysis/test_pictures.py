"""Plots hold the figures they are given, and the page needs nothing from outside."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sdt_blocks.analysis import attention_maps, audit, energy, firing_rates, overlay, plots, record
from sdt_blocks.analysis.energy import millijoules
from sdt_blocks.analysis.page import quantity, write_page


@pytest.fixture
def findings(small):
    model, x = small(depth=2), torch.rand(3, 3, 16, 16)
    return model, x, firing_rates(model, x), energy(model, x)


def test_energy_bars(findings):
    *_, report = findings
    (axes,) = plots.energy_bars(report).axes
    widths = [bar.get_width() for bar in axes.patches][: len(report.layers)]
    energies = [layer.energy_mj for layer in report.layers]
    assert np.allclose(np.array(widths) / sum(widths), np.array(energies) / sum(energies))
    assert [label.get_text() for label in axes.get_yticklabels()] == [plots.short(x.name) for x in report.layers]


def test_rate_map(findings):
    rates = findings[2]
    axes = plots.rate_map(rates).axes[0]
    shown = axes.images[0].get_array()
    assert np.allclose(shown, [layer.rate for layer in rates.layers.values()])


def test_rate_histogram_counts_every_channel(findings):
    rates = findings[2]
    (axes,) = plots.rate_histogram(rates, "head_neuron").axes
    assert sum(bar.get_height() for bar in axes.patches) == 32


def test_raster_marks_each_spike(findings):
    model, x, *_ = findings
    recording = record(model, x, "blocks.0.mlp.branch.neuron1")
    (axes,) = plots.raster(recording, sample=1, neurons=50).axes
    marks = np.asarray(axes.collections[0].get_offsets())
    expected = recording.spikes[:, 1].flatten(1)[:, :50].nonzero().numpy()
    assert len(expected) > 0 and np.array_equal(marks, expected)


def test_membrane_trace(findings):
    model, x, *_ = findings
    recording = record(model, x, "head_neuron")
    (axes,) = plots.membrane_trace(recording, units=[3, 5]).axes
    for line, unit in zip(axes.lines[:2], (3, 5), strict=True):
        assert np.allclose(line.get_ydata(), recording.membrane[:, 0, unit])
    assert axes.lines[2].get_ydata()[0] == recording.threshold


def test_attention_figure(findings):
    model, x, *_ = findings
    figure = plots.attention_figure(x, attention_maps(model, x, per_step=True), ["a", "b", "c"])
    assert len(figure.axes) == 3 * 4 + 1  # and the color scale
    assert [axes.get_title() for axes in figure.axes[:4]] == ["input", "a", "b", "c"]


def test_attention_figure_of_frames():
    frames, maps = torch.rand(2, 3, 2, 8, 8), torch.rand(3, 2, 4, 4)
    shown = plots.attention_figure(frames, maps, by_step=True).axes[5].images[0].get_array()
    assert np.allclose(shown, overlay(frames[1, 0], maps[0, 1]))
    shown = plots.attention_figure(frames, maps).axes[5].images[0].get_array()
    assert np.allclose(shown, overlay(frames[1], maps[0, 1]))


class Page(HTMLParser):
    VOID = ("meta", "img", "wbr", "br", "input")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_self_contained(findings, tmp_path):
    model, x, rates, report = findings
    plots.energy_bars(report).savefig(tmp_path / "e.png")
    write_page(
        tmp_path / "index.html",
        title="A <b>run</b>",
        subtitle="on data & more",
        rates=rates,
        report=report,
        audit=audit(model, x),
        figures={"Pictures": [(tmp_path / "e.png", 'a "caption"')], "None": []},
    )
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    text = "".join(page.text)
    assert page.open == []
    assert "A <b>run</b>" in text and "on data & more" in text and "<b>" not in html
    assert all(link.startswith("data:") for link in page.links)
    assert sum(link.startswith("data:image/png;base64,") for link in page.links) == 1
    assert not re.search(r'@import|url\(|<script|<link|(src|href)="(?!data:)', html)
    for layer in rates.layers:
        assert plots.short(layer) in text
    assert millijoules(report.total_mj) in text and "The network is spike-driven." in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(4.5, "4.5 mJ"), (0.0123, "12.3 µJ"), (2.5e-6, "2.5 nJ"), (5e-9, "5 pJ"), (0, "0 pJ")]
)
def test_units(value, text):
    assert millijoules(value) == text


def test_quantities():
    assert [quantity(value) for value in (3.08e6, 1500, 2e9, 12)] == ["3.08 M", "1.5 k", "2 G", "12"]


def test_importing_the_analysis_loads_no_plotting():
    code = (
        "import sys, sdt_blocks.analysis, sdt_blocks.analysis.plots, sdt_blocks.analysis.page; "
        "print([m for m in ('matplotlib', 'neurobench', 'pandas', 'rich.table') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
