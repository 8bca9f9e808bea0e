"""All findings about a model in one folder: figures as CSV, JSON and text, plots, and a page that shows them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ..evaluation import Batches, each_of, input_of
from ..files import written_together
from ..inference.folded import folded
from ..neuron import find_neurons
from . import plots, tables
from .attention_maps import maps_of_blocks, upsample
from .audit import Audit, audit
from .counters import find_counters
from .energy import EnergyReport, energy, millijoules
from .energy_models import EnergyModel
from .measured import Measured, measure
from .moments import check_confidence, level, share_interval
from .outcome import Outcome, look
from .page import Extras, write_page
from .probe import batch_axis, is_first_process, unwrap
from .rates import FiringRates, firing_rates
from .record import record
from .summary import NO_LATENCY, joules, layer_tables, sweep, sweep_table
from .tables import counted


class ReportOptions(NamedTuple):
    """Further options of an analysis.

    `class_names` are printed next to the samples drawn (by default those of the model's card). Each latency and
    throughput is measured for `seconds`, with `counters` also the joules of an inference, if the machine has energy
    counters. `energy_models` are added to the kit's. Intervals are those of `confidence`.
    """

    class_names: Sequence[str] = ()
    seconds: float = 0.0
    counters: bool = False
    energy_models: Sequence[EnergyModel] = ()
    confidence: float = 0.95


class _Asked(NamedTuple):
    """What the folder of an analysis shows, and for which form of the network."""

    folder: Path
    title: str
    layer: str | None
    images: int
    form: str
    names: Sequence[str]
    axis: int
    confidence: float


def analyze_model(
    model: nn.Module,
    batches: Batches,
    output_dir: str | Path,
    *,
    title: str = "",
    layer: str | None = None,
    images: int = 4,
    as_trained: bool = False,
    options: ReportOptions | None = None,
) -> tuple[FiringRates, EnergyReport]:
    """Analyzes a model on batches of (inputs, targets) and writes the folder; returns the rates and the energy.

    Every process calls this with its own share of the samples; `batches` are read more than once, and the first process
    writes. `layer` is the neuron layer to draw (the last by default), `images` the number of overlays. The samples are
    on the first axis of the inputs, or on the second if the network takes time first. The network is judged as
    it is deployed, with norms folded and chains of layers merged, unless `as_trained`.

    If the targets are classes `[B]`, accuracy is given after each time step and the overlays are of different
    classes; a negative class is unknown. Only the first process measures.

    Raises `TypeError` for batches that can be read only once, and `ValueError` for an unknown layer, a negative number
    of images, a confidence outside of 0..1, no batch, or a model without neurons.
    """
    model, options = unwrap(model), options or ReportOptions()
    if isinstance(batches, Iterator):
        raise TypeError("batches are read more than once; give a list or a data loader instead of an iterator")
    if images < 0:
        raise ValueError(f"images must not be negative, got {images}")
    check_confidence(options.confidence)
    neurons = find_neurons(model)
    if layer is not None and layer not in neurons:
        raise ValueError(f"no neuron layer is called {layer!r}; there are {', '.join(neurons) or 'none'}")
    form = "trained" if as_trained else "deployed"
    first = next(iter(each_of(batches)), None)
    # With few samples a process may have none; if no process has any, the rates raise an error.
    axis = 0 if first is None else batch_axis(model, input_of(first))
    measured = None
    if options.seconds > 0 and first is not None and is_first_process():
        measured = _measure(model, input_of(first), axis, options)
    # One form for all analyses of the network, and one warning about parts that have none.
    with nullcontext() if as_trained else folded(model):
        rates = firing_rates(model, batches, as_trained=True)
        report = energy(model, batches, as_trained=True)
        for one in options.energy_models:
            report.estimate(one)
        outcome = look(model, batches, images, axis)
        if is_first_process():
            names = options.class_names or getattr(getattr(model, "card", None), "class_names", None) or ()
            title = title or type(model).__name__
            with written_together(Path(output_dir), last="energy.json") as folder:
                asked = _Asked(folder, title, layer, images, form, list(names), axis, options.confidence)
                _write(model, input_of(first), rates, report, outcome, measured, asked)
            print(f"all in {Path(output_dir) / 'index.html'}")
    return rates, report


def _measure(model: nn.Module, batch: Tensor, axis: int, options: ReportOptions) -> Measured:
    where = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found, missing = find_counters(where) if options.counters else ([], "the counters were not asked for")
    return measure(model, batch, axis=axis, seconds=options.seconds, counters=found, missing=missing)


def _write(
    model: nn.Module,
    first: Tensor,
    rates: FiringRates,
    report: EnergyReport,
    outcome: Outcome,
    measured: Measured | None,
    asked: _Asked,
) -> None:
    """The folder of an analysis."""
    folder, axis = asked.folder, asked.axis
    (folder / "overlays").mkdir()
    one = first.narrow(axis, 0, 1)
    found = audit(model, first.narrow(axis, 0, min(2, first.shape[axis])), as_trained=True)
    found.silence, found.form = rates.silence, asked.form  # from all samples, not from two
    rates.to_csv(folder / "rates.csv", asked.confidence)
    report.to_json(folder / "energy.json", asked.confidence)
    _write_tables(report, outcome, measured, asked)
    (folder / "audit.txt").write_text(str(found), encoding="utf-8")
    plots.energy_bars(report).savefig(folder / "energy.png", dpi=120)
    plots.rate_map(rates).savefig(folder / "rates.png", dpi=120)
    drawn = asked.layer or [name for name in rates.layers if name in find_neurons(model)][-1]
    figures = {
        "Attention": draw_attention(model, outcome, asked),
        "A neuron layer": draw_neurons(model, one, drawn, rates, folder),
    }
    sample = " x ".join(str(size) for at, size in enumerate(first.shape) if at != axis)
    write_page(
        folder / "index.html",
        title=asked.title,
        subtitle=f"{counted(rates.samples, 'sample')}, {counted(report.steps, 'time step')}, input {sample}",
        rates=rates,
        report=report,
        audit=found,
        figures=figures,
        extras=Extras(sum(parameter.numel() for parameter in model.parameters()), outcome, measured, asked.confidence),
    )
    print_summary(rates, report, found, outcome, measured, asked.confidence)


def _write_tables(report: EnergyReport, outcome: Outcome, measured: Measured | None, asked: _Asked) -> None:
    """Layers and time steps as CSV, Markdown and LaTeX; measurements as JSON."""
    steps = sweep_table(sweep(report, outcome, measured, asked.confidence), measured, asked.confidence)
    for name, texts in (("layers", layer_tables(report, asked.confidence)), ("time_steps", steps)):
        tables.write(texts, asked.folder / name)
    if measured is not None:
        text = json.dumps(measured.to_dict(), indent=2) + "\n"
        (asked.folder / "measured.json").write_text(text, encoding="utf-8")


def draw_attention(model: nn.Module, outcome: Outcome, asked: _Asked) -> list[tuple[Path, str]]:
    """Overlays of the last block by step, and of all blocks, and a PNG for each image. Empty without mixers.

    Maps of different sizes are drawn at the largest size; of samples of different shapes, those like the first.
    """
    folder = asked.folder
    if not outcome.drawn or outcome.drawn[0].ndim not in (3, 4):
        return []
    drawable = [place for place, sample in enumerate(outcome.drawn) if sample.shape == outcome.drawn[0].shape]
    images = torch.stack([outcome.drawn[place] for place in drawable])
    maps = maps_of_blocks(model, images.transpose(0, asked.axis))
    if not maps:
        return []
    names = [_caption(outcome.targets[place], outcome.answers[place], asked.names) for place in drawable]
    by_step = maps[-1]
    steps = [f"t={t}" for t in range(len(by_step))]
    figure = plots.attention_figure(images, by_step[:8], steps, by_step=True, names=names)
    figure.savefig(folder / "attention_steps.png", dpi=120)
    drawn = [(folder / "attention_steps.png", "What the last block's attention passes on, by time step")]
    height, width = max((tuple(one.shape[-2:]) for one in maps), key=math.prod)
    by_block = torch.stack([upsample(one.mean(0), (height, width)) for one in maps])
    if len(by_block) > 1:
        blocks = [f"block {i}" for i in range(len(by_block))]
        figure = plots.attention_figure(images, by_block, blocks, names=names)
        figure.savefig(folder / "attention_blocks.png", dpi=120)
        drawn.append((folder / "attention_blocks.png", "The same by block, a mean over time steps"))
    for i, (image, attention) in enumerate(zip(images, by_step.mean(0), strict=True)):
        plots.overlay_figure(image, attention, names[i]).savefig(folder / "overlays" / f"image_{i}.png", dpi=120)
    return drawn


def _caption(target: int, answer: int, names: Sequence[str]) -> str:
    """The class of a sample, and the network's answer."""

    def name(index: int) -> str:
        return names[index] if index < len(names) else f"class {index}"

    parts = [name(target)] if target >= 0 else []
    if answer >= 0:
        parts.append("recognized" if answer == target else f"taken for {name(answer)}")
    return ", ".join(parts)


def draw_neurons(
    model: nn.Module, inputs: Tensor, layer: str, rates: FiringRates, folder: Path
) -> list[tuple[Path, str]]:
    """Raster and membranes of one neuron layer for one sample, if they are visible, and its distribution of rates."""
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


def print_summary(
    rates: FiringRates,
    report: EnergyReport,
    found: Audit,
    outcome: Outcome,
    measured: Measured | None,
    confidence: float,
) -> None:
    """The findings on the terminal."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if rates.silence:
        console.print(rates.silence, style="bold red")
    console.print(found.finding, style="green" if found.spike_driven and not found.dead else "bold red")
    for operation in report.not_counted:
        console.print(f"not counted, as no rule knows what it costs: {operation}", style="bold red")
    console.print(
        f"{millijoules(report.total_mj)} an inference ({millijoules(report.ann_mj)} as an ANN), mean firing rate "
        f"{rates.mean:.1%} over {counted(rates.samples, 'sample')} and {counted(report.steps, 'step')}"
    )
    console.print(report.verdict)
    ends = report.estimates["formula"].interval(confidence)
    if ends is not None:
        told = " to ".join(map(millijoules, ends))
        console.print(f"{level(confidence)} confidence interval of the mean over samples: {told}")
    if outcome.accuracy:
        low, high = share_interval(outcome.accuracy[-1], outcome.samples, confidence) or (0.0, 1.0)
        samples = counted(outcome.samples, "sample")
        console.print(f"accuracy {outcome.accuracy[-1]:.2%} ({low:.2%} to {high:.2%}) on {samples}")
    if report.attention and report.attention.sdsa_mj:
        ratio = report.attention.vanilla_mj / report.attention.sdsa_mj
        console.print(f"attention alone: {ratio:,.1f} times less than softmax attention of its size")
    for layer in sorted(report.layers, key=lambda layer: -layer.energy_mj)[:5]:
        share = layer.energy_mj / (report.total_mj or 1.0)
        console.print(f"  {share:6.1%}  {millijoules(layer.energy_mj):>9}  {layer.kind:3}  {layer.name}")
    if measured is None:
        return
    for form in measured.forms:
        if form.missing:
            console.print(f"{form.name}: not measured, {form.missing}")
            continue
        taken = f", {joules(form.energy.total)} ({joules(form.energy.above_idle)} above idle)" if form.energy else ""
        console.print(f"{form.name}: {form.latency_ms:.3g} ms a sample, {form.throughput:.4g} a second{taken}")
    if measured.latency_missing:
        console.print(f"{NO_LATENCY} {measured.latency_missing}")
    console.print(f"on {measured.machine}; energy: {measured.counters}")
