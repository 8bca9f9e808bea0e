"""One self-contained HTML page of an analysis: opens from disk, asks for nothing over the network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .audit import MULTIPLIES, VERDICTS, Audit
from .energy import EnergyReport, millijoules
from .plots import COLORS, short
from .rates import FiringRates

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2430; --soft: #5d6b7a; --page: #f7f8fa; --card: #fff; --line: #dfe4ea;
  --mac: MAC_COLOR; --ac: AC_COLOR; --bad: #c62828; --good: #2e7d32;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6eaf0; --soft: #9aa7b5; --page: #14181d; --card: #1d232b; --line: #303945;
    --mac: #ec7c8a; --ac: #3cb4c4; --bad: #ff8a80; --good: #81c784;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 .8rem; }
.soft, figcaption, dt, summary, th { color: var(--soft); }
.good { color: var(--good); }
.bad, tr.bad td { color: var(--bad); }
.number { font-variant-numeric: tabular-nums; }
section, dl div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; }
section { margin-top: 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem; margin: 1rem 0 0; }
dl div { padding: .7rem .9rem; }
dt { font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; }
.bar {
  display: grid; grid-template-columns: minmax(0, 17rem) 1fr 5.5rem; gap: .1rem .7rem; align-items: center;
  font-size: .82rem; padding: .12rem 0;
}
.bar span { overflow-wrap: anywhere; }
.bar .number { text-align: right; }
.track { background: var(--line); border-radius: 3px; height: .75rem; }
.fill { height: 100%; border-radius: 3px; min-width: 1px; }
.MAC { background: var(--mac); }
.AC { background: var(--ac); }
.key { margin-right: 1.2rem; white-space: nowrap; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .4rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .82rem; width: 100%; }
th, td { padding: .22rem .5rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; }
th.number, td.number { text-align: right; white-space: nowrap; }
td:first-child { overflow-wrap: anywhere; min-width: 7rem; }
td.number:first-child { min-width: 0; }
td.rate { text-align: center; padding: .22rem .3rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure.wide { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { font-size: .82rem; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  .bar { grid-template-columns: 1fr 5.5rem; padding: .3rem 0; }
  .bar span:first-child { grid-column: 1 / 3; }
}
""".replace("MAC_COLOR", COLORS["MAC"]).replace("AC_COLOR", COLORS["AC"])


def write_page(
    path: str | Path,
    *,
    title: str,
    subtitle: str,
    rates: FiringRates,
    report: EnergyReport,
    audit: Audit,
    figures: Mapping[str, Sequence[tuple[str | Path, str]]],
) -> None:
    """Writes the page. `figures` holds PNG files and their captions by section heading; the page takes them in."""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="bad">{escape(rates.silence)}</p>' if rates.silence else "",
        f'<p class="soft">{escape(subtitle)}</p>',
        _tiles(rates, report, audit),
        _section("Energy of one inference", _energy(report)),
        _section("Firing rates", _rates(rates)),
        *(_section(heading, _figures(images)) for heading, images in figures.items() if images),
        _section("What multiplies, and what only adds", _audit(audit)),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n' + "\n".join(body)
    Path(path).write_text(text + "\n</main></body></html>\n", encoding="utf-8")


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _tiles(rates: FiringRates, report: EnergyReport, audit: Audit) -> str:
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
    cells = (f'<div><dt>{escape(name)}</dt><dd class="{css}">{escape(value)}</dd></div>' for name, value, css in tiles)
    return f"<dl>{''.join(cells)}</dl>"


def _energy(report: EnergyReport) -> str:
    most = max((layer.energy_mj for layer in report.layers), default=0.0) or 1.0
    rows = "".join(
        f'<div class="bar"><span>{_name(layer.name)}</span><div class="track"><div class="fill {layer.kind}" '
        f'style="width:{100 * layer.energy_mj / most:.2f}%"></div></div>'
        f'<span class="number">{millijoules(layer.energy_mj)}</span></div>'
        for layer in report.layers
    )
    key = (
        '<span class="key"><i class="MAC"></i>multiplies (MAC)</span>'
        '<span class="key"><i class="AC"></i>adds where a spike comes in (AC)</span>'
    )
    once = ""
    if report.total_once_mj < report.total_mj:
        once = f" With the first layer computed once for a still image: {millijoules(report.total_once_mj)}."
    note = (
        f"{report.steps} time steps, mean of {report.samples} samples, {report.e_mac:g} pJ a multiply-accumulate and "
        f"{report.e_ac:g} pJ an accumulate.{once}"
    )
    left_out = "; ".join(str(operation) for operation in report.not_counted)
    missing = f'<p class="bad">Not counted, as no rule knows what it costs: {escape(left_out)}</p>' if left_out else ""
    return f'{missing}<p class="soft">{escape(note)}</p><p>{key}</p>{rows}{_attention(report)}'


def _attention(report: EnergyReport) -> str:
    found = report.attention
    if found is None:
        return ""
    rows = [("the operator alone", found.sdsa_mj, found.vanilla_mj)]
    rows.append(("with its projections", found.whole_mj, found.vanilla_whole_mj))
    cells = "".join(
        f'<tr><td>{name}</td><td class="number">{millijoules(ours)}</td><td class="number">{millijoules(vanilla)}</td>'
        f'<td class="number">{f"{vanilla / ours:,.1f}" if ours else "-"}</td></tr>'
        for name, ours, vanilla in rows
    )
    columns = "".join(f'<th class="number">{name}</th>' for name in ("spikes", "softmax", "ratio"))
    return f'<div class="scroll"><table><tr><th>attention</th>{columns}</tr>{cells}</table></div>'


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
        # Where the PNG format keeps them.
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        image = f'<img src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}" alt="{escape(caption)}">'
        css = ' class="wide"' if width > 1.6 * height else ""
        parts.append(f"<figure{css}>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


def _audit(audit: Audit) -> str:
    counts = [(len(audit.of(verdict)), verdict, why) for verdict, why in VERDICTS.items()]
    listed = "".join(
        f"<tr{_bad(verdict)}><td class=number>{n}</td><td>{escape(verdict)}</td><td>{escape(why)}</td></tr>"
        for n, verdict, why in counts
        if n
    )
    rows = "".join(
        f"<tr{_bad(p.verdict)}><td>{_name(p.module)}</td><td>{escape(p.operation)}</td>"
        f"<td>{escape(p.operands)}</td><td>{escape(p.verdict)}</td><td>{escape(p.reason)}</td></tr>"
        for p in sorted(audit.products, key=lambda p: p.verdict != MULTIPLIES)
    )
    head = "<tr><th>module</th><th>operation</th><th>operands</th><th>verdict</th><th>why</th></tr>"
    details = (
        f'<details><summary>every product</summary><div class="scroll"><table>{head}{rows}</table></div></details>'
    )
    form = f"It is judged as it is {audit.form}."
    return f'<p>{escape(audit.finding)} {form}</p><div class="scroll"><table>{listed}</table></div>{details}'


def _name(layer: str) -> str:
    """A layer's name that can be broken at its dots and underscores."""
    return escape(short(layer)).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _bad(verdict: str) -> str:
    return ' class="bad"' if verdict == MULTIPLIES else ""


def quantity(value: float) -> str:
    """A large number in short."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
