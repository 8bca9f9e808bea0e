"""The style of an analysis page, for light and dark mode, phones and desktops."""

from __future__ import annotations

from .plots import COLORS

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2430; --soft: #5d6b7a; --page: #f7f8fa; --card: #fff; --line: #dfe4ea;
  --mac: MAC_COLOR; --ac: AC_COLOR; --memory: #b08900; --bad: #c62828; --good: #2e7d32; --other: #7b5ea7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6eaf0; --soft: #9aa7b5; --page: #14181d; --card: #1d232b; --line: #303945;
    --mac: #ec7c8a; --ac: #3cb4c4; --memory: #e0b93c; --bad: #ff8a80; --good: #81c784; --other: #b79be0;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
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
a { color: var(--ac); }
.bar {
  display: grid; grid-template-columns: minmax(0, 17rem) 1fr 5.5rem; gap: .1rem .7rem; align-items: center;
  font-size: .82rem; padding: .12rem 0;
}
.rates .bar { grid-template-columns: minmax(0, 17rem) 1fr 11rem; }
.bar span { overflow-wrap: anywhere; }
.bar .number { text-align: right; }
.track { background: var(--line); border-radius: 3px; height: .75rem; position: relative; display: flex; }
.track i { height: 100%; min-width: 1px; }
.track b { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; margin-left: -1px; }
.MAC { background: var(--mac); }
.AC, .wins { background: var(--ac); }
.memory { background: var(--memory); }
.loses { background: var(--mac); }
.even { background: var(--ink); }
.even8 { background: var(--other); }
.key { margin-right: 1.2rem; white-space: nowrap; display: inline-block; font-size: .82rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .4rem; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label {
  display: inline-block; padding: .2rem .8rem; margin: 0 .4rem .5rem 0; border: 1px solid var(--line);
  border-radius: 999px; cursor: pointer; font-size: .85rem;
}
.tabs > input:checked + label { background: var(--ink); color: var(--card); }
.tabs > input:focus-visible + label { outline: 2px solid var(--ac); }
.panels > div { display: none; }
.chart svg { width: 100%; height: auto; display: block; }
.chart text { fill: var(--soft); font-size: 11px; }
.chart .grid { stroke: var(--line); }
.chart polyline { fill: none; stroke: currentColor; stroke-width: 2; }
.chart circle { fill: currentColor; }
.chart polygon { fill: currentColor; opacity: .22; }
.s0 { color: var(--ac); } .s1 { color: var(--memory); } .s2 { color: var(--mac); }
.s3 { color: var(--other); } .s4 { color: var(--good); } .s5 { color: var(--ink); }
.key i[class^="s"] { background: currentColor; }
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
  .rates .bar { grid-template-columns: 1fr 10.5rem; }
}
""".replace("MAC_COLOR", COLORS["MAC"]).replace("AC_COLOR", COLORS["AC"])
