"""One self-contained HTML page of an analysis: opens from disk, loads nothing over the network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from . import charts
from .audit import BREAKS, Audit
from .energy import CONVENTION, EnergyReport, millijoules
from .energy_models import Estimate, RowEstimate
from .measured import Measured
from .moments import level, share_interval
from .outcome import Outcome
from .plots import short
from .rates import FiringRates
from .style import STYLE
from .summary import NO_LATENCY, joules, layer_tables, sweep, sweep_table
from .tables import HIGH, LOW, counted


class Extras(NamedTuple):
    """Optional content of a page, in addition to rates, energy and audit."""

    parameters: int = 0
    outcome: Outcome | None = None
    measured: Measured | None = None
    confidence: float = 0.95


def write_page(
    path: str | Path,
    *,
    title: str,
    subtitle: str,
    rates: FiringRates,
    report: EnergyReport,
    audit: Audit,
    figures: Mapping[str, Sequence[tuple[str | Path, str]]],
    extras: Extras | None = None,
) -> None:
    """Writes the page. `figures` holds PNG files and their captions by section heading; the page embeds them."""
    extras = extras or Extras()
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="bad">{escape(rates.silence)}</p>' if rates.silence else "",
        f'<p class="soft">{escape(subtitle)}</p>',
        _tiles(rates, report, audit, extras),
        _section("Energy of one inference", _energy(report)),
        _section("Break-even with an ANN", _break_even(report)),
        _section("Step by step", _steps(rates, report, extras)),
        _section("Measured on this machine", _measured(extras.measured, report)) if extras.measured else "",
        _section("Firing rates", _rates(rates)),
        *(_section(heading, _figures(images)) for heading, images in figures.items() if images),
        _section("What multiplies, and what only adds", _audit(audit)),
        _section("Downloads", _downloads(rates, report, extras)),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n' + "\n".join(body)
    Path(path).write_text(text + "\n</main></body></html>\n", encoding="utf-8")


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _tiles(rates: FiringRates, report: EnergyReport, audit: Audit, extras: Extras) -> str:
    layers = rates.layers.values()
    silent = sum(layer.silent * len(layer.channel_rate) for layer in layers)
    channels = sum(len(layer.channel_rate) for layer in layers)
    verdict = ("yes", "good") if audit.spike_driven else (f"no, {len(audit.violations)} violations", "bad")
    if audit.spike_driven and (audit.dead or rates.mean == 0):
        verdict = ("not shown: no neuron fired", "bad")
    tiles = [
        ("energy of one inference", millijoules(report.total_mj), ""),
        ("the same network as an ANN", millijoules(report.ann_mj), ""),
        ("spike-driven", *verdict),
        ("mean firing rate", f"{rates.mean:.1%}", ""),
        ("silent channels", f"{silent / channels:.1%}", ""),
        ("synaptic operations", quantity(report.synaptic_operations), ""),
    ]
    with_memory = report.estimates.get("step")
    if with_memory is not None:
        tiles.insert(1, ("the same with memory", millijoules(with_memory.cost.total_mj), ""))
    if extras.parameters:
        tiles.append(("parameters", quantity(extras.parameters), ""))
    if extras.outcome is not None and extras.outcome.accuracy:
        samples = counted(extras.outcome.samples, "sample")
        tiles.append((f"accuracy on {samples}", f"{extras.outcome.accuracy[-1]:.1%}", ""))
        ends = share_interval(extras.outcome.accuracy[-1], extras.outcome.samples, extras.confidence)
        if ends is not None:
            tiles.append((f"its {level(extras.confidence)} interval", f"{ends[0]:.1%} to {ends[1]:.1%}", ""))
    for form in (extras.measured.forms if extras.measured else [])[:1]:
        if not form.missing:
            tiles.append(("latency of a sample", f"{form.latency_ms:.3g} ms", ""))
            tiles.append(("samples a second", quantity(form.throughput), ""))
    cells = (f'<div><dt>{escape(name)}</dt><dd class="{css}">{escape(value)}</dd></div>' for name, value, css in tiles)
    return f"<dl>{''.join(cells)}</dl>"


def _energy(report: EnergyReport) -> str:
    left_out = "; ".join(str(operation) for operation in report.not_counted)
    missing = f'<p class="bad">Not counted, as no rule knows what it costs: {escape(left_out)}</p>' if left_out else ""
    note = f"{counted(report.steps, 'time step')}, mean of {counted(report.samples, 'sample')}. {CONVENTION}"
    kinds = {layer.name: layer.kind for layer in report.layers}
    models = {name: _by_model(found, kinds) for name, found in report.estimates.items()}
    key = charts.keys({"MAC": "multiplies (MAC)", "AC": "adds where a spike comes in (AC)", "memory": "moves memory"})
    return (
        f'{missing}<p>{escape(report.verdict)}</p><p class="soft">{escape(note)}</p>{key}'
        f"{charts.tabs('energy', models)}{_attention(report)}"
    )


def _by_model(found: Estimate, kinds: Mapping[str, str]) -> str:
    """All layers by one energy model: compute and memory, and the totals with the ANNs'."""

    def bar(row: RowEstimate) -> charts.Bar:
        kind = kinds.get(row.name, "AC") if row.type != "neuron" else "AC"
        name = f"{_name(row.name)}{' (neurons)' if row.type == 'neuron' else ''}"
        cost = row.cost
        return charts.Bar(name, {kind: cost.compute_mj, "memory": cost.memory_mj}, millijoules(cost.total_mj))

    totals = {
        "spiking": found.cost,
        "as an ANN": found.ann,
        f"as an ANN of {found.bits}-bit activations": found.quantised,
    }
    cells = {
        name: [millijoules(part) for part in (cost.compute_mj, cost.memory_mj, cost.total_mj)]
        for name, cost in totals.items()
    }
    rows = [bar(row) for row in found.rows if row.type != "neuron" or row.cost.total_mj]
    return (
        f'<p class="soft">{escape(found.model.name)}: {escape(found.model.source)}</p>'
        f"{_table(('the whole network', 'compute', 'memory', 'total'), cells)}{charts.bars(rows)}"
    )


def _break_even(report: EnergyReport) -> str:
    note = (
        "Firing rate of each layer's input, and the rates at which the layer would cost as much as in an ANN: left of "
        "the line the spiking layer needs less. A line at the right end lies at 100 % or beyond."
    )
    key = charts.keys(
        {
            "wins": "rate, below the ANN's line",
            "loses": "rate, above it",
            "even": "break-even with the ANN",
            "even8": "with the ANN of few bits",
        }
    )
    models = {name: _break_even_by_model(found) for name, found in report.estimates.items()}
    return f'<p class="soft">{escape(note)} {escape(CONVENTION)}</p>{key}{charts.tabs("even", models)}'


def _break_even_by_model(found: Estimate) -> str:
    rows = []
    for row in found.rows:
        if row.break_even is None or row.break_even_quantised is None:
            continue
        css = "wins" if row.rate <= row.break_even else "loses"
        marks = {"even": row.break_even, "even8": row.break_even_quantised}
        text = f"{row.rate:.1%}, even at {_percent(row.break_even)}"
        rows.append(charts.Bar(_name(row.name), {css: row.rate}, text, marks))
    whole = (
        f"The whole network breaks even at a rate of {_percent(found.break_even)} in all layers, with the ANN "
        f"of {found.bits} bits at {_percent(found.break_even_quantised)}."
    )
    return f'<p>{escape(whole)}</p><div class="rates">{charts.bars(rows, 1.0)}</div>'


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table of figures: the row's name first; a row with a single cell has it across all columns."""
    names = "".join(f'<th class="number">{name}</th>' for name in heads[1:])
    body = []
    for name, cells in rows.items():
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        whole = f'<td colspan="{len(heads) - 1}">{escape(cells[0])}</td>' if len(cells) == 1 else numbers
        body.append(f"<tr><td>{name}</td>{whole}</tr>")
    return f'<div class="scroll"><table><tr><th>{heads[0]}</th>{names}</tr>{"".join(body)}</table></div>'


def _percent(rate: float | None) -> str:
    if rate is None:
        return "no rate"
    return ">100%" if rate > 1 else "no rate" if rate < 0 else f"{rate:.1%}"


def _steps(rates: FiringRates, report: EnergyReport, extras: Extras) -> str:
    neurons = sum(layer.neurons for layer in rates.layers.values()) or 1
    mean = [
        sum(layer.neurons * layer.rate[t] for layer in rates.layers.values() if t < len(layer.rate)) / neurons
        for t in range(rates.steps)
    ]
    drawn = [charts.lines("Firing rate at each step, mean of all neurons", {"rate": _numbered(mean)}, _rate_text)]
    for name in ("formula", "step"):
        if name in report.estimates:
            steps = report.estimates[name].steps
            series = {"compute": _numbered([step.compute_mj for step in steps])}
            if any(step.memory_mj for step in steps):
                series["memory"] = _numbered([step.memory_mj for step in steps])
            drawn.append(charts.lines(f"Energy of each step by the model {name}", series, millijoules))
    rows = sweep(report, extras.outcome, extras.measured, extras.confidence)
    banded = False
    for key, title, shown in (
        ("accuracy", "Accuracy with the first T steps", _rate_text),
        ("formula_mj", "Energy of the first T steps by the papers' formula", millijoules),
        ("memory_mj", "Energy of the first T steps with memory (step)", millijoules),
        ("latency_ms", "Latency with T steps, dense form", lambda value: f"{value:.3g} ms"),
    ):
        points = [(row["steps"], row[key]) for row in rows if row.get(key) is not None]
        band = [(row["steps"], row[f"{key}{LOW}"], row[f"{key}{HIGH}"]) for row in rows if f"{key}{LOW}" in row]
        if len(points) > 1:
            drawn.append(charts.lines(title, {key: points}, shown, label="T", band=band))
            banded = banded or bool(band)
    notes = [CONVENTION]
    if banded:
        notes.append(f"Shaded: the {level(extras.confidence)} confidence interval of the mean over samples.")
    if extras.measured is not None and extras.measured.latency_missing:
        notes.append(f"{NO_LATENCY} {extras.measured.latency_missing}.")
    return f'<div class="figures">{"".join(drawn)}</div><p class="soft">{escape(" ".join(notes))}</p>'


def _numbered(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in enumerate(values)]


def _rate_text(rate: float) -> str:
    return f"{100 * rate:.3g} %"


def _measured(found: Measured, report: EnergyReport) -> str:
    modeled = report.estimates.get("step")
    rows: dict[str, Sequence[str]] = {}
    for form in found.forms:
        if form.missing:
            rows[form.name] = [f"not measured: {form.missing}"]
            continue
        cost = None if modeled is None else modeled.ann if form.name == "ANN" else modeled.cost
        rows[form.name] = (
            f"{form.latency_ms:.3g} ms",
            f"{form.throughput:.4g}",
            joules(form.energy.total) if form.energy else "–",
            joules(form.energy.above_idle) if form.energy else "–",
            millijoules(cost.total_mj) if cost else "–",
        )
    heads = ("form", "latency", "samples a second", "measured", "above idle", "modeled, with memory")
    note = (
        f"{found.machine}; latency of one sample (median), the rest in batches of {found.batch}. "
        f"Energy of a sample: {found.counters}."
    )
    return f'<p class="soft">{escape(note)}</p>{_table(heads, rows)}'


def _downloads(rates: FiringRates, report: EnergyReport, extras: Extras) -> str:
    files = {f"layers.{ending}": text for ending, text in layer_tables(report, extras.confidence).items()}
    rows = sweep(report, extras.outcome, extras.measured, extras.confidence)
    steps = sweep_table(rows, extras.measured, extras.confidence)
    files |= {f"time_steps.{ending}": text for ending, text in steps.items()}
    links = "".join(
        f'<li><a download="{name}" href="data:text/plain;charset=utf-8,{quote(text)}">{name}</a></li>'
        for name, text in files.items()
    )
    return f"<p class=soft>Energy and rates layer by layer, and by number of time steps.</p><ul>{links}</ul>"


def _attention(report: EnergyReport) -> str:
    found = report.attention
    if found is None:
        return ""
    costs = {
        "the operator alone": (found.sdsa_mj, found.vanilla_mj),
        "with its projections": (found.whole_mj, found.vanilla_whole_mj),
    }
    rows = {
        name: [millijoules(ours), millijoules(vanilla), f"{vanilla / ours:,.1f}" if ours else "-"]
        for name, (ours, vanilla) in costs.items()
    }
    return _table(("attention", "spikes", "softmax", "ratio"), rows)


def _rates(rates: FiringRates) -> str:
    most = max((rate for layer in rates.layers.values() for rate in layer.rate), default=0.0) or 1.0
    steps = "".join(f'<th class="number">t={step}</th>' for step in range(rates.steps))
    rows = []
    for layer in rates.layers.values():
        cells = "".join(
            f'<td class="rate number" style="background:color-mix(in srgb, var(--ac) {90 * rate / most:.0f}%, '
            f'transparent)">{rate:.3f}</td>'
            for rate in layer.rate
        )
        empty = "<td></td>" * (rates.steps - len(layer.rate))
        shares = f'<td class="number">{layer.silent:.0%}</td><td class="number">{layer.saturated:.0%}</td>'
        rows.append(f"<tr><td>{_name(layer.name)}</td>{cells}{empty}{shares}</tr>")
    head = f'<tr><th>layer</th>{steps}<th class="number">silent</th><th class="number">saturated</th></tr>'
    note = "Share of neurons that fire at each step; channels that never fire, and that fire at 95 % of their chances."
    return f'<p class="soft">{note}</p><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _figures(images: Sequence[tuple[str | Path, str]]) -> str:
    parts = []
    for path, caption in images:
        content = Path(path).read_bytes()
        # The position of width and height in a PNG file.
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        image = f'<img src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}" alt="{escape(caption)}">'
        css = ' class="wide"' if width > 1.6 * height else ""
        parts.append(f"<figure{css}>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


def _audit(audit: Audit) -> str:
    listed = "".join(
        f"<tr{_bad(verdict)}><td class=number>{n}</td><td>{escape(verdict)}</td><td>{escape(why)}</td></tr>"
        for n, verdict, why in audit.counts
    )
    rows = "".join(
        f"<tr{_bad(p.verdict)}><td>{_name(p.module)}</td><td>{escape(p.operation)}</td>"
        f"<td>{escape(p.operands)}</td><td>{escape(p.verdict)}</td><td>{escape(p.reason)}</td></tr>"
        for p in sorted(audit.products, key=lambda p: p.verdict not in BREAKS)
    )
    head = "<tr><th>module</th><th>operation</th><th>operands</th><th>verdict</th><th>why</th></tr>"
    details = (
        f'<details><summary>every product</summary><div class="scroll"><table>{head}{rows}</table></div></details>'
    )
    head = f"<p>{escape(audit.finding)} {audit.judged} {escape(audit.unjudged)}</p>"
    return f'{head}<div class="scroll"><table>{listed}</table></div>{details}'


def _name(layer: str) -> str:
    """A layer's name that can be wrapped at its dots and underscores."""
    return escape(short(layer)).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _bad(verdict: str) -> str:
    return ' class="bad"' if verdict in BREAKS else ""


def quantity(value: float) -> str:
    """A large number in short form."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
