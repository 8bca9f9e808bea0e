"""Plots of the findings of the other modules; each returns a matplotlib `Figure`, drawn without a window system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .attention_maps import overlay
from .energy import EnergyReport, millijoules, suitable_unit
from .rates import FiringRates
from .record import Recording
from .tables import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"MAC": "#d1495b", "AC": "#00798c"}
RATE_COLORMAP = "viridis"


LONGEST_NAME = 48
"""The longest name of a layer, in characters, for which a picture has room."""


def short(name: str) -> str:
    """A layer's name without the parts that carry no information."""
    return name.replace(".branch", "") or "model"


def label(name: str) -> str:
    """A layer's name escaped for matplotlib, long ones without their middle."""
    name = short(name)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2 - 1]}…{name[-LONGEST_NAME // 2 :]}"
    return name.replace("$", r"\$")


def energy_bars(report: EnergyReport) -> Figure:
    """Energy of every layer, one bar each, multiply-accumulates and accumulates in different colors."""
    figure, axes = _figure(7.5, 1.2 + 0.2 * len(report.layers))
    names = [label(layer.name) for layer in report.layers]
    unit, factor = suitable_unit(max((layer.energy_mj for layer in report.layers), default=0.0))
    energies = [layer.energy_mj * factor for layer in report.layers]
    axes.barh(range(len(names)), energies, color=[COLORS[layer.kind] for layer in report.layers])
    axes.set_yticks(range(len(names)), names)
    for kind, color in COLORS.items():
        axes.barh([0], [0], color=color, label={"MAC": "multiplies (MAC)", "AC": "only adds (AC)"}[kind])
    axes.legend(frameon=False, loc="lower right")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(f"{unit} an inference")
    axes.set_title(f"{millijoules(report.total_mj)} an inference of {counted(report.steps, 'step')}")
    return figure


def rate_map(rates: FiringRates) -> Figure:
    """Firing rate of every layer at every step, as colors, with numbers if there is room."""
    layers = list(rates.layers.values())
    figure, axes = _figure(4.2 + 0.5 * rates.steps, 1.2 + 0.22 * len(layers))
    values = np.full((len(layers), rates.steps), np.nan)
    for row, layer in enumerate(layers):
        values[row, : len(layer.rate)] = layer.rate
    image = axes.imshow(values, aspect="auto", cmap=RATE_COLORMAP, vmin=0)
    if rates.steps <= 8:
        middle = np.nanmax(values) / 2
        for (row, step), value in np.ndenumerate(values):
            color = "white" if value < middle else "black"
            axes.text(step, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=6.5)
    axes.set_yticks(range(len(layers)), [label(layer.name) for layer in layers])
    axes.set_xticks(range(rates.steps))
    axes.set_xlabel("time step")
    axes.set_title("Firing rates")
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    return figure


def rate_histogram(rates: FiringRates, layer: str) -> Figure:
    """The distribution of the firing rates of one layer's channels."""
    figure, axes = _figure(5, 3.4)
    found = rates[layer]
    axes.hist(found.channel_rate, bins=np.linspace(0, 1, 41).tolist(), color=COLORS["AC"])
    axes.axvline(found.mean, color=COLORS["MAC"], linestyle="--", label=f"mean {found.mean:.3f}")
    axes.legend(frameon=False)
    axes.set_xlabel("firing rate of a channel")
    axes.set_ylabel("channels")
    axes.set_title(f"{label(layer)}: {found.silent:.0%} of {len(found.channel_rate)} channels silent")
    return figure


def raster(recording: Recording, sample: int = 0, neurons: int = 200) -> Figure:
    """The spikes of up to `neurons` neurons of one sample, a mark for each."""
    figure, axes = _figure(5, 3.4)
    spikes = recording.spikes[:, sample].float().cpu().flatten(1)[:, :neurons]
    step, neuron = spikes.nonzero(as_tuple=True)
    axes.scatter(step, neuron, marker=".", s=14, color=COLORS["AC"])
    axes.set_xlim(-0.5, len(spikes) - 0.5)
    axes.set_ylim(-1, spikes.shape[1])
    _time_axis(axes, len(spikes))
    axes.set_ylabel("neuron")
    axes.set_title(f"{label(recording.name)}: {spikes.mean():.1%} of {spikes.numel()} fire")
    return figure


def membrane_trace(recording: Recording, sample: int = 0, units: Sequence[int] | None = None) -> Figure:
    """Membranes of a few neurons of one sample, a dot for each spike; by default four that fire about half the time."""
    figure, axes = _figure(5, 3.4)
    membrane = recording.membrane[:, sample].float().cpu().flatten(1)
    spikes = recording.spikes[:, sample].float().cpu().flatten(1)
    if units is None:
        units = (spikes.mean(0) - 0.5).abs().argsort(stable=True)[:4].tolist()
    steps = range(len(membrane))
    for unit in units:
        (line,) = axes.plot(steps, membrane[:, unit], marker=".", label=f"neuron {unit}")
        fired = spikes[:, unit].nonzero().flatten()
        axes.scatter(fired, membrane[fired, unit], s=45, color=line.get_color(), zorder=3)
    axes.axhline(recording.threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    _time_axis(axes, len(membrane))
    axes.set_ylabel("membrane before its reset")
    axes.set_title(label(recording.name))
    return figure


def attention_figure(
    images: Tensor,
    maps: Tensor,
    titles: Sequence[str] | None = None,
    *,
    by_step: bool = False,
    names: Sequence[str] = (),
) -> Figure:
    """Images in rows, each followed by the overlays of its maps `[K, B, H', W']`, such as one per step or per block.

    For frames `[B, T, C, H, W]` the overlays show their mean, or with `by_step` each the frame of its own step. `names`
    are printed above the images. Each overlay has its own scale, from zero to its highest value.
    """
    rows, columns = len(images), 1 + len(maps)
    figure, _ = _figure(1.25 * columns + 0.9, (1.55 if names else 1.35) * rows + 0.3, axes=False)
    grid = figure.subplots(rows, columns, squeeze=False)
    headings = ["input", *(titles or [str(k) for k in range(len(maps))])]
    for row, image in enumerate(images):
        still = torch.zeros(1, 1)
        for column, attention in enumerate([still, *maps[:, row]]):
            axes = grid[row][column]
            own = image[column - 1] if by_step and image.ndim == 4 and column else image
            axes.imshow(overlay(own, attention).numpy())
            axes.set_axis_off()
            heading = headings[column] if row == 0 else ""
            if column == 0 and names:
                heading = f"{heading}\n{_wrapped(names[row])}" if heading else _wrapped(names[row])
            if heading:
                axes.set_title(heading, fontsize=8 if column or not names else 7)
    _color_scale(figure, grid.ravel().tolist())
    return figure


def overlay_figure(image: Tensor, attention: Tensor, title: str = "") -> Figure:
    """One image under its attention map."""
    figure, axes = _figure(3.6, 3.2)
    axes.imshow(overlay(image, attention).numpy())
    axes.set_axis_off()
    axes.set_title(_wrapped(title), fontsize=9)
    _color_scale(figure, [axes], f"{float(attention.max()):.2g}")
    return figure


def _color_scale(figure: Figure, axes: list[Any], highest: str = "its highest value") -> None:
    """A scale for the colors of the overlays."""
    from matplotlib.cm import ScalarMappable

    scale = figure.colorbar(ScalarMappable(cmap="inferno"), ax=axes, fraction=0.04, shrink=0.6, pad=0.02, aspect=20)
    scale.set_ticks([0, 1], labels=["0", highest])
    scale.ax.tick_params(labelsize=7)
    scale.set_label("mean output of the attention", fontsize=7)


def _wrapped(name: str) -> str:
    """A class and an answer, wrapped to fit above a small picture."""
    import textwrap

    return "\n".join(textwrap.wrap(name, 22)[:3]).replace("$", r"\$")


def _figure(width: float, height: float, axes: bool = True) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib (pip install 'sdt_blocks[analysis]'): {error}") from None

    figure = Figure(figsize=(width, height), layout="constrained")
    if not axes:
        return figure, None
    made = figure.subplots()
    made.tick_params(labelsize=8)
    made.spines[["top", "right"]].set_visible(False)
    return figure, made


def _time_axis(axes: Axes, steps: int) -> None:
    axes.set_xticks(range(0, steps, max(1, steps // 16)))
    axes.set_xlabel("time step")
