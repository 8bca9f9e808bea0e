"""All findings about a model in one folder: figures as CSV, JSON and text, plots, and a page that shows them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from . import plots
from .attention_maps import attention_maps
from .audit import audit
from .energy import EnergyReport, energy, millijoules
from .page import write_page
from .probe import find_attention, find_neurons, input_of, is_first_process, unwrap
from .rates import FiringRates, firing_rates
from .record import record


def analyze_model(
    model: nn.Module,
    batches: Iterable[Any],
    output_dir: str | Path,
    *,
    title: str = "",
    layer: str | None = None,
    images: int = 4,
) -> tuple[FiringRates, EnergyReport]:
    """Analyses a model on batches of (inputs, targets) and writes the folder; returns the rates and the energy.

    Every process calls this with its own share of the samples, `batches` being read more than once; the first one
    writes. `layer` is the neuron layer to draw (the last by default), `images` the number of overlays.
    """
    model = unwrap(model)
    rates, report = firing_rates(model, batches), energy(model, batches)
    if not is_first_process():
        return rates, report
    folder = Path(output_dir)
    (folder / "overlays").mkdir(parents=True, exist_ok=True)
    first = input_of(next(iter(batches)))
    found = audit(model, first[:2])
    rates.to_csv(folder / "rates.csv")
    report.to_json(folder / "energy.json")
    (folder / "audit.txt").write_text(str(found), encoding="utf-8")
    plots.energy_bars(report).savefig(folder / "energy.png", dpi=120)
    plots.rate_map(rates).savefig(folder / "rates.png", dpi=120)
    figures = {
        "Attention": draw_attention(model, first[:images], folder),
        "A neuron layer": draw_neurons(model, first, layer or list(find_neurons(model))[-1], rates, folder),
    }
    write_page(
        folder / "index.html",
        title=title or type(model).__name__,
        subtitle=f"{rates.samples} samples, {report.steps} time steps, input {' x '.join(map(str, first.shape[1:]))}",
        rates=rates,
        report=report,
        audit=found,
        figures=figures,
    )
    print_summary(rates, report, found.summary()[0], folder)
    return rates, report


def draw_attention(model: nn.Module, images: Tensor, folder: Path) -> list[tuple[Path, str]]:
    """Overlays of the last block by step, and of all blocks; one PNG for each image too. Empty without attention."""
    if not find_attention(model) or not len(images):
        return []
    by_step = attention_maps(model, images, per_step=True)
    steps = [f"t={t}" for t in range(len(by_step))]
    plots.attention_figure(images, by_step[:8], steps, by_step=True).savefig(folder / "attention_steps.png", dpi=120)
    drawn = [(folder / "attention_steps.png", "Where q * a spikes in the last block, by time step")]
    by_block = attention_maps(model, images, block=None)
    if len(by_block) > 1:
        blocks = [f"block {i}" for i in range(len(by_block))]
        plots.attention_figure(images, by_block, blocks).savefig(folder / "attention_blocks.png", dpi=120)
        drawn.append((folder / "attention_blocks.png", "The same by block, a mean over time steps"))
    for i, (image, attention) in enumerate(zip(images, by_block[-1], strict=True)):
        plots.overlay_figure(image, attention).savefig(folder / "overlays" / f"image_{i}.png", dpi=120)
    return drawn


def draw_neurons(
    model: nn.Module, inputs: Tensor, layer: str, rates: FiringRates, folder: Path
) -> list[tuple[Path, str]]:
    """Raster, membranes and spread of rates of one neuron layer; of those for whose neurons they can be had."""
    plots.rate_histogram(rates, layer).savefig(folder / "rate_histogram.png", dpi=120)
    drawn = [(folder / "rate_histogram.png", f"{layer}: firing rates of its channels over all samples")]
    try:
        recording = record(model, inputs[:1], layer)
    except ValueError as error:
        print(f"no membranes are drawn: {error}", file=sys.stderr)
        return drawn
    plots.raster(recording).savefig(folder / "raster.png", dpi=120)
    plots.membrane_trace(recording).savefig(folder / "membrane.png", dpi=120)
    drawn.append((folder / "raster.png", f"{layer}: spikes of the first sample"))
    drawn.append((folder / "membrane.png", f"{layer}: membranes of four neurons; a dot is a spike"))
    return drawn


def print_summary(rates: FiringRates, report: EnergyReport, verdict: str, folder: Path) -> None:
    """The findings on the terminal."""
    console = Console(highlight=False, soft_wrap=True)
    layers = list(rates.layers.values())
    silent = [layer.name for layer in layers if layer.silent == 1]
    console.print(verdict, style="green" if "NOT" not in verdict else "bold red")
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
    if silent:
        console.print(f"never fires: {', '.join(silent)}", style="yellow")
    console.print(f"all in {folder / 'index.html'}")
