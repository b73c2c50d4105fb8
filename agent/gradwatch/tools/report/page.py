"""The page of a report: one HTML file that opens offline, in light and dark, on paper and on a phone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

import numpy as np
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from gradwatch import __version__
from gradwatch.collect.model import Finding
from gradwatch.tools.report.drawing import Figure
from gradwatch.tools.report.figures import figures
from gradwatch.tools.report.record import Record, flat
from gradwatch.tools.report.verdict import verdict

#: Steps before the end that are listed.
LAST: Final = 20
_EVIDENCE: Final = 160

_STYLE: Final = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1a1d21; --dim: #5b6470; --line: #d8dbe0; --card: #f6f7f9;
  --bad: #b3261e; --warn: #8a5a00; --good: #1a6b35; --link: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --fg: #e6e8eb; --dim: #9aa3ad; --line: #33383f;
  --card: #1b1e23; --bad: #ff8a80; --warn: #f0bd5e; --good: #7fd49a; --link: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--bg); color: var(--fg);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; scroll-margin-top: 3.5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0; } p { margin: .3rem 0; } .dim { color: var(--dim); }
a { color: var(--link); } code { font-size: .92em; }
nav { position: sticky; top: 0; z-index: 5; background: var(--bg); border-bottom: 1px solid var(--line);
  padding: .4rem 0; display: flex; gap: .2rem 1rem; flex-wrap: wrap; }
.verdict { list-style: none; padding: 0; margin: 1rem 0; display: grid; gap: .4rem; }
.verdict li { border-left: 4px solid var(--line); background: var(--card); padding: .45rem .8rem;
  border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
.verdict .bad { border-color: var(--bad); } .verdict .warn { border-color: var(--warn); }
.verdict .good { border-color: var(--good); } .verdict li:first-child { font-weight: 600; }
.page { color: var(--bad); } .ticket { color: var(--warn); } .info { color: var(--dim); }
details { border: 1px solid var(--line); border-radius: 8px; background: var(--card); padding: .5rem .8rem;
  margin: .5rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; } details p { margin: .4rem 0; }
.figure { min-height: 200px; width: 100%; } section { break-inside: avoid; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; } th { color: var(--dim); font-weight: 500; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; } .changed td { font-weight: 600; }
footer { margin: 2.5rem 0 1rem; color: var(--dim); font-size: .85rem; }
@media print { :root { --bg: #fff; --fg: #000; --card: #fff; --dim: #444; --line: #bbb; } nav { display: none; }
  body { max-width: none; font-size: 11px; } details { break-inside: avoid; } .modebar { display: none !important; } }
"""

#: Draws the figures in the colours of the page, again when these change, and narrower for paper.
_SCRIPT: Final = """
const figures = JSON.parse(document.getElementById('figures').textContent);
const drawn = [];
function colours() {
  const style = getComputedStyle(document.body);
  return { 'font.color': style.getPropertyValue('--dim') };
}
for (const [name, figure] of Object.entries(figures)) {
  const place = document.getElementById('figure-' + name);
  const options = { responsive: true, displayModeBar: false };
  Plotly.newPlot(place, figure.data, figure.layout, options).then(() => Plotly.relayout(place, colours()));
  drawn.push(place);
}
const recolour = () => drawn.forEach(place => Plotly.relayout(place, colours()));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolour);
addEventListener('beforeprint', () => {
  document.querySelectorAll('details').forEach(one => { one.open = true; });
  drawn.forEach(place => Plotly.relayout(place, { width: 680 }));
});
addEventListener('afterprint', () => drawn.forEach(place => Plotly.relayout(place, { width: null, autosize: true })));
"""


def render(record: Record, findings: Sequence[Finding], *, now: float | None = None) -> str:
    """The report of a run as HTML. ``now`` is the time that it says it was made at."""
    drawn = figures(record, findings)
    facts = record.facts
    sections: list[tuple[str, str, str]] = [
        ("findings", "Findings", _findings(findings)),
        ("curves", "Curves", "".join(_place(figure) for figure in drawn)),
        ("hyperparameters", "Hyperparameters", _hyperparameters(record)),
        ("end", "The last steps", _last_steps(record)),
        ("unchecked", "Not checked", _unchecked(record)),
    ]
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    said = "".join(f"<li class={sentence.tone}>{_text(sentence.text)}</li>" for sentence in verdict(record, findings))
    body = "".join(f"<h2 id={name}>{title}</h2>{content}" for name, title, content in sections)
    made = _when(time.time() if now is None else now)
    head = f"{_text(facts.model)} · started {_when(facts.start_time)} · run <code>{_text(facts.run)}</code>"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_text(facts.run_name)} · gradwatch</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{_text(facts.run_name)}</h1><p class=dim>{head}</p></header>"
        f"<ul class=verdict>{said}</ul><nav>{nav}</nav><main>{body}</main>"
        f"<footer>Made by gradwatch {__version__}, {made}. Norms are before clipping, unscaled and global.</footer>"
        f'<script type="application/json" id=figures>{_json(drawn)}</script>'
        f"<script>{get_plotlyjs()}</script><script>{_SCRIPT}</script></body></html>\n"
    )


def _place(figure: Figure) -> str:
    title = f"<h3>{_text(figure.title)}</h3><p class=dim>{_text(figure.caption)}</p>"
    return f'<section>{title}<div class=figure id="figure-{_text(figure.name)}"></div></section>'


def _json(drawn: Sequence[Figure]) -> str:
    """The figures as JSON that may stand inside a script element."""
    told = {figure.name: json.loads(figure.figure.to_json()) for figure in drawn}
    text = json.dumps(told, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>Nothing was found wrong.</p>"
    by_code: dict[str, list[Finding]] = {}
    for finding in findings:
        by_code.setdefault(finding.code, []).append(finding)
    order = {"page": 0, "ticket": 1, "info": 2}
    worst = {code: min(order[f.severity] for f in group) for code, group in by_code.items()}
    parts = []
    for code, group in sorted(by_code.items(), key=lambda item: (worst[item[0]], item[1][0].attempt, item[1][0].step)):
        severity = next(name for name, rank in order.items() if rank == worst[code])
        count = f" × {len(group)}" if len(group) > 1 else ""
        told = "".join(f"<p>{_where(f)}{_text(f.message)}{_evidence(f)}</p>" for f in group[:5])
        more = f"<p class=dim>and {len(group) - 5} more</p>" if len(group) > 5 else ""
        is_open = " open" if severity != "info" else ""
        parts.append(
            f"<details{is_open}><summary><strong class={severity}>{_text(code)}</strong>{count} "
            f"<span class=dim>{severity}, first at step {group[0].step:,}</span></summary>{told}{more}"
            f"<p><em>What to do:</em> {_text(group[0].advice)}</p></details>"
        )
    return "".join(parts)


def _where(finding: Finding) -> str:
    parts = [f"attempt {finding.attempt}"] if finding.attempt else []
    parts += [f"rank {finding.rank}"] if finding.rank else []
    parts += [f"step {finding.step:,}"] if finding.step >= 0 else []
    return f"<span class=dim>{', '.join(parts)}:</span> " if parts else ""


def _evidence(finding: Finding) -> str:
    parts = []
    for name, value in finding.evidence.items():
        text = (
            f"{value:.4g}"
            if isinstance(value, float)
            else value
            if isinstance(value, str)
            else json.dumps(value, default=str)
        )
        parts.append(f"{name} = {text if len(text) <= _EVIDENCE else text[: _EVIDENCE - 1] + '…'}")
    return f"<br><code class=dim>{_text('; '.join(parts))}</code>" if parts else ""


def _hyperparameters(record: Record) -> str:
    """All of them; where an attempt ran with others, each attempt's beside each other, the changed ones first."""
    latest = flat(record.facts.hyperparameters)
    earlier = [flat(manifest.hyperparameters) for manifest in record.manifests[:-1]]
    heads = ["name", *(f"attempt {m.attempt}" for m in record.manifests[:-1]), "value" if not earlier else "now"]
    names = sorted({name for known in (latest, *earlier) for name in known})

    def changed(name: str) -> bool:
        return any(name in one and name in latest and one[name] != latest[name] for one in earlier)

    rows = []
    for name in sorted(names, key=lambda name: (not changed(name), name)):
        cells = [name, *(one.get(name, "") for one in earlier), latest.get(name, "")]
        rows.append((cells, "changed" if changed(name) else ""))
    return _table(heads, rows) if rows else ""


def _last_steps(record: Record) -> str:
    steps = record.main
    if not len(steps):
        return ""
    rows = []
    for i in range(max(len(steps) - LAST, 0), len(steps)):
        state = (
            "skipped"
            if not steps.taken[i]
            else "not finite"
            if steps.nonfinite[i]
            else "clipped"
            if steps.clipped[i]
            else ""
        )
        values = [steps.loss[i], steps.norm[i], steps.threshold[i], steps.duration[i]]
        rows.append(([f"{steps.step[i]:,}", _when(float(steps.time[i])), *(_short(v) for v in values), state], ""))
    heads = ["step", "time", "loss", "gradient norm", "threshold", "seconds", ""]
    return _table(heads, rows, numbers=(0, 2, 3, 4, 5))


def _unchecked(record: Record) -> str:
    told = [([str(u.get("check", "")), str(u.get("reason", ""))], "") for u in record.facts.manifest.unchecked]
    return _table(["check", "why gradwatch could not make it"], told) if told else ""


def _table(heads: Sequence[str], rows: Iterable[tuple[Sequence[str], str]], numbers: Sequence[int] = ()) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        return f"<{tag}{' class=n' if index in numbers else ''}>{_text(text)}</{tag}>"

    top = "".join(cell("th", i, head) for i, head in enumerate(heads))
    body = "".join(
        f"<tr{f' class={mark}' if mark else ''}>{''.join(cell('td', i, text) for i, text in enumerate(cells))}</tr>"
        for cells, mark in rows
    )
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _short(value: Any) -> str:
    number = float(value)
    return f"{number:.4g}" if np.isfinite(number) else "–" if math.isnan(number) else str(number)


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment)) if 0 < moment < 1e11 else "–"


def _text(text: object) -> str:
    return escape(str(text))
