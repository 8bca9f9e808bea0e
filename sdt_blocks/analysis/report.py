"""All findings about a model in one folder: figures as CSV, JSON and text, plots, and a page that shows them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ..inference.folded import folded
from ..neuron import find_neurons
from . import plots
from .attention_maps import maps_of_blocks, upsample
from .audit import Audit, audit
from .energy import EnergyReport, energy, millijoules
from .page import write_page
from .probe import Batches, batch_axis, input_of, is_first_process, unwrap
from .rates import FiringRates, firing_rates
from .record import record


class _Asked(NamedTuple):
    """What the folder of an analysis shows, and of which form of the network."""

    folder: Path
    title: str
    layer: str | None
    images: int
    form: str


def analyze_model(
    model: nn.Module,
    batches: Batches,
    output_dir: str | Path,
    *,
    title: str = "",
    layer: str | None = None,
    images: int = 4,
    as_trained: bool = False,
) -> tuple[FiringRates, EnergyReport]:
    """Analyses a model on batches of (inputs, targets) and writes the folder; returns the rates and the energy.

    Every process calls this with its own share of the samples, `batches` being read more than once; the first one
    writes. `layer` is the neuron layer to draw (the last by default), `images` the number of overlays. The samples lie
    on the first axis of the inputs, or on the second one where the network takes time first. The network is judged as
    it is deployed, with norms folded and chains of layers merged, unless `as_trained`.

    Raises `TypeError` for batches that can be read only once, and `ValueError` for a layer that is not there, a
    negative number of images, no batch, or a model without neurons.
    """
    model = unwrap(model)
    if isinstance(batches, Iterator):
        raise TypeError("batches are read more than once; give a list or a data loader instead of an iterator")
    if images < 0:
        raise ValueError(f"images must not be negative, got {images}")
    neurons = find_neurons(model)
    if layer is not None and layer not in neurons:
        raise ValueError(f"no neuron layer is called {layer!r}; there are {', '.join(neurons) or 'none'}")
    form = "trained" if as_trained else "deployed"
    # One form for all that is asked of the network, and one warning of what has none.
    with nullcontext() if as_trained else folded(model):
        rates = firing_rates(model, batches, as_trained=True)
        report = energy(model, batches, as_trained=True)
        if is_first_process():
            _write(
                model,
                batches,
                rates,
                report,
                _Asked(Path(output_dir), title or type(model).__name__, layer, images, form),
            )
    return rates, report


def _write(model: nn.Module, batches: Batches, rates: FiringRates, report: EnergyReport, asked: _Asked) -> None:
    """The folder of an analysis."""
    folder = asked.folder
    (folder / "overlays").mkdir(parents=True, exist_ok=True)
    first = batches if isinstance(batches, Tensor) else input_of(next(iter(batches)))
    axis = batch_axis(model, first)
    few, one = (first.narrow(axis, 0, min(count, first.shape[axis])) for count in (asked.images, 1))
    found = audit(model, first.narrow(axis, 0, min(2, first.shape[axis])), as_trained=True)
    found.silence, found.form = rates.silence, asked.form  # of all samples, not of two
    rates.to_csv(folder / "rates.csv")
    report.to_json(folder / "energy.json")
    (folder / "audit.txt").write_text(str(found), encoding="utf-8")
    plots.energy_bars(report).savefig(folder / "energy.png", dpi=120)
    plots.rate_map(rates).savefig(folder / "rates.png", dpi=120)
    drawn = asked.layer or [name for name in rates.layers if name in find_neurons(model)][-1]
    figures = {
        "Attention": draw_attention(model, few, axis, folder),
        "A neuron layer": draw_neurons(model, one, drawn, rates, folder),
    }
    sample = " x ".join(str(size) for at, size in enumerate(first.shape) if at != axis)
    write_page(
        folder / "index.html",
        title=asked.title,
        subtitle=f"{rates.samples} samples, {report.steps} time steps, input {sample}",
        rates=rates,
        report=report,
        audit=found,
        figures=figures,
    )
    print_summary(rates, report, found, folder)


def draw_attention(model: nn.Module, inputs: Tensor, axis: int, folder: Path) -> list[tuple[Path, str]]:
    """Overlays of the last block by step, and of all blocks; one PNG for each image too. Empty without mixers.

    Blocks of different grids are drawn at the largest one's size. `axis` is the one of the inputs on which the samples
    lie.
    """
    images = inputs.transpose(0, axis)
    maps = maps_of_blocks(model, inputs) if len(images) and images.ndim in (4, 5) else []
    if not maps:
        return []
    by_step = maps[-1]
    steps = [f"t={t}" for t in range(len(by_step))]
    plots.attention_figure(images, by_step[:8], steps, by_step=True).savefig(folder / "attention_steps.png", dpi=120)
    drawn = [(folder / "attention_steps.png", "What the last block's attention passes on, by time step")]
    height, width = max((tuple(one.shape[-2:]) for one in maps), key=math.prod)
    by_block = torch.stack([upsample(one.mean(0), (height, width)) for one in maps])
    if len(by_block) > 1:
        blocks = [f"block {i}" for i in range(len(by_block))]
        plots.attention_figure(images, by_block, blocks).savefig(folder / "attention_blocks.png", dpi=120)
        drawn.append((folder / "attention_blocks.png", "The same by block, a mean over time steps"))
    for i, (image, attention) in enumerate(zip(images, by_step.mean(0), strict=True)):
        plots.overlay_figure(image, attention).savefig(folder / "overlays" / f"image_{i}.png", dpi=120)
    return drawn


def draw_neurons(
    model: nn.Module, inputs: Tensor, layer: str, rates: FiringRates, folder: Path
) -> list[tuple[Path, str]]:
    """Raster and membranes of one neuron layer for one sample, where they can be had, and its spread of rates."""
    plots.rate_histogram(rates, layer).savefig(folder / "rate_histogram.png", dpi=120)
    drawn = [(folder / "rate_histogram.png", f"{layer}: firing rates of its channels over all samples")]
    try:
        recording = record(model, inputs, layer)
    except ValueError as error:
        print(f"no membranes are drawn: {error}", file=sys.stderr)
        return drawn
    plots.raster(recording).savefig(folder / "raster.png", dpi=120)
    plots.membrane_trace(recording).savefig(folder / "membrane.png", dpi=120)
    drawn.append((folder / "raster.png", f"{layer}: spikes of the first sample"))
    drawn.append((folder / "membrane.png", f"{layer}: membranes of four neurons; a dot is a spike"))
    return drawn


def print_summary(rates: FiringRates, report: EnergyReport, found: Audit, folder: Path) -> None:
    """The findings on the terminal."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if rates.silence:
        console.print(rates.silence, style="bold red")
    console.print(found.finding, style="green" if found.spike_driven and not found.dead else "bold red")
    for operation in report.not_counted:
        console.print(f"not counted, as no rule knows what it costs: {operation}", style="bold red")
    console.print(
        f"{millijoules(report.total_mj)} an inference ({millijoules(report.ann_mj)} as an ANN), mean firing rate "
        f"{rates.mean:.1%} over {rates.samples} samples and {report.steps} steps"
    )
    if report.attention and report.attention.sdsa_mj:
        ratio = report.attention.vanilla_mj / report.attention.sdsa_mj
        console.print(f"attention alone: {ratio:,.1f} times less than softmax attention of its size")
    for layer in sorted(report.layers, key=lambda layer: -layer.energy_mj)[:5]:
        share = layer.energy_mj / (report.total_mj or 1.0)
        console.print(f"  {share:6.1%}  {millijoules(layer.energy_mj):>9}  {layer.kind:3}  {layer.name}")
    console.print(f"all in {folder / 'index.html'}")
