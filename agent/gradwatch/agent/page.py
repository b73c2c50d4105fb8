"""The status page: the runs that an agent follows, for who has no Grafana at hand.

Plain HTML made here, without a script, readable on a phone and in the dark.
Everything that came from a journal is escaped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final
from urllib.parse import quote

from gradwatch import __version__
from gradwatch.agent.followed import Followed
from gradwatch.collect.model import Finding
from gradwatch.collect.steps import OptimizerFold
from gradwatch.journal.manifest import clean_text

REFRESH_SECONDS: Final = 5
#: Runs on the front page, the newest first.
MAX_RUNS: Final = 200
_WIDTH, _HEIGHT = 160, 36
_MAX_TEXT: Final = 300

_STYLE: Final = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1a1d21; --dim: #667; --line: #d8dbe0; --card: #f7f8fa;
  --blue: #2563c9; --red: #b3261e; --amber: #8a5a00; --green: #1a6b35; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --fg: #e6e8eb; --dim: #9aa3ad; --line: #33383f;
  --card: #1b1e23; --blue: #7fb0ff; --red: #ff8a80; --amber: #f0bd5e; --green: #7fd49a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.2rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
a { color: var(--blue); } .dim { color: var(--dim); } code, .n { font-variant-numeric: tabular-nums; }
.run { border: 1px solid var(--line); background: var(--card); border-radius: 8px; padding: .8rem 1rem;
  margin: .8rem 0; }
.head { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline; }
.name { font-weight: 600; overflow-wrap: anywhere; }
.state { border: 1px solid currentColor; border-radius: 99px; padding: 0 .6rem; font-size: .85rem; }
.running, .finished { color: var(--green); } .starting { color: var(--blue); } .stalled { color: var(--amber); }
.failed, .killed, .abrupt, .page { color: var(--red); } .ticket { color: var(--amber); } .info { color: var(--blue); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem 1rem;
  margin-top: .6rem; }
.facts div span { display: block; color: var(--dim); font-size: .8rem; }
svg { display: block; width: 100%; max-width: 20rem; height: 2.4rem; } polyline { fill: none; stroke: var(--blue);
  stroke-width: 1.5; vector-effect: non-scaling-stroke; }
th { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; vertical-align: top; } th { color: var(--dim);
  font-weight: 500; } .wide { overflow-x: auto; }
footer { margin-top: 2rem; color: var(--dim); font-size: .85rem; }
"""


def front(runs: Sequence[Followed], old: int, root: str, now: float) -> bytes:
    """The list of runs, newest first."""
    shown = sorted(runs, key=_start, reverse=True)[:MAX_RUNS]
    parts = [f"<h1>gradwatch</h1><p class=dim>{len(runs)} {_plural('run', len(runs))} in {_text(root)}</p>"]
    parts += [_card(run, now) for run in shown]
    if not runs:
        parts.append("<p>No run yet. This page looks again by itself.</p>")
    if len(runs) > MAX_RUNS:
        parts.append(f"<p class=dim>and {len(runs) - MAX_RUNS} older ones</p>")
    if old:
        verb = "has" if old == 1 else "have"
        parts.append(
            f"<p class=dim>{old} {_plural('run', old)} here {verb} ended more than an hour before this agent came: "
            f"<code>gradwatch runs {_text(root)}</code> lists them.</p>"
        )
    return _page("gradwatch", parts)


def detail(run: Followed, now: float) -> bytes:
    """One run: its numbers, what was found, its validations and hyperparameters."""
    fold = run.tail.fold
    parts = ['<p><a href="../">all runs</a></p>', _card(run, now, link=False)]
    parts += [f"<p class=ticket>{_text(trouble)}</p>" for trouble in run.tail.troubles]
    parts.append(_findings(run))
    if fold.validations.last:
        rows = [
            (metric, slice_ or "all", _number(s.value), _number(s.training), _percent(s.gap, sign=True))
            for (metric, slice_), s in sorted(fold.validations.last.items())
        ]
        parts.append("<h2>Validation</h2>" + _table(("metric", "slice", "validation", "training", "gap"), rows))
    if fold.layers is not None and (norms := fold.layers.grad_norms()):
        weights, ratios = fold.layers.weight_norms(), fold.layers.update_ratios()
        rows_ = [(n, _number(v), _number(weights.get(n)), _number(ratios.get(n))) for n, v in norms.items()]
        parts.append("<h2>Layers</h2>" + _table(("layer", "gradient norm", "weight norm", "update / weight"), rows_))
    if fold.facts is not None:
        known = sorted(fold.facts.hyperparameters.items())
        parts.append("<h2>Hyperparameters</h2>" + _table(("name", "value"), [(k, str(v)) for k, v in known]))
        unchecked = [(u.get("check", ""), u.get("reason", "")) for u in fold.facts.manifest.unchecked]
        if unchecked:
            parts.append("<h2>Not checked</h2>" + _table(("check", "why"), unchecked))
    return _page(_name(run), parts)


def path_of(run: Followed) -> str:
    """Where a run's page is."""
    return f"runs/{quote(run.run, safe='')}"


# -- pieces


def _card(run: Followed, now: float, link: bool = True) -> str:
    tail = run.tail
    fold = tail.fold
    state = tail.state
    name = _text(_name(run))
    title = f'<a class=name href="{escape(path_of(run))}">{name}</a>' if link else f"<span class=name>{name}</span>"
    head = f'<div class=head>{title}<span class="state {state}">{state}</span>'
    if fold.facts is not None:
        manifest = fold.facts.manifest
        about = [manifest.model, f"attempt {fold.facts.attempt}" if fold.facts.attempt else "", run.run]
        if manifest.world_size > 1:
            about.append(f"{len(tail.ranks)} of {manifest.world_size} ranks here")
        head += "".join(f"<span class=dim>{_text(part)}</span>" for part in about if part)
    head += "</div>"
    if tail.end is not None and tail.end.reason not in ("", tail.end.state):
        reason = tail.end.reason if not tail.end.message else f"{tail.end.reason}: {tail.end.message}"
        head += f"<div class=dim>{_text(reason)}</div>"
    facts = [("last step", f"{tail.last_step:,} <span class=dim>{_ago(now - fold.last_time)}</span>")]
    if tail.last_step < 0:
        facts = [("last step", "none yet")]
    losses = [o.windows.mean_loss for o in fold.optimizers.values() if o.windows is not None]
    if known := [loss for loss in losses if loss is not None]:
        facts.append(("training loss", _number(known[0])))
    facts += [pair for optimizer in fold.optimizers.values() for pair in _optimizer(optimizer, len(fold.optimizers))]
    active = run.ledger.active
    told = ", ".join(f'<span class="{escape(severity)}">{_text(code)}</span>' for code, severity in active)
    facts.append(("findings", told or f"{sum(run.ledger.counts.values())} so far, none active"))
    cells = "".join(f"<div class=n><span>{_text(what)}</span>{value}</div>" for what, value in facts)
    curves = "".join(
        f"<div><span>{what}</span>{svg}</div>"
        for what, svg in (
            ("loss", curve([(s, loss) for s, loss, _ in fold.curve])),
            ("gradient norm (log)", curve([(s, _log(norm)) for s, _, norm in fold.curve])),
        )
        if svg
    )
    return f"<section class=run>{head}<div class=facts>{cells}{curves}</div></section>"


def _optimizer(fold: OptimizerFold, count: int) -> Iterable[tuple[str, str]]:
    whose = f" ({fold.name})" if count > 1 else ""
    norm = fold.last.get("grad_norm")
    if norm is not None:
        yield f"gradient norm{whose}", _number(norm)
    recent = fold.recent.counts
    threshold = fold.last.get("clip_threshold")
    if threshold is not None and recent.steps:
        rate = _percent(recent.clipped / recent.steps)
        yield f"clip rate{whose}", f"{rate} <span class=dim>above {_number(threshold)}</span>"
    if fold.nonfinite:
        yield f"non-finite steps{whose}", f"{fold.nonfinite:,}"
    if fold.skipped:
        yield f"skipped by the scaler{whose}", f"{fold.skipped:,}"


def _findings(run: Followed) -> str:
    found: list[Finding] = run.ledger.all
    if not found:
        return "<h2>Findings</h2><p class=dim>Nothing was found wrong so far.</p>"
    rows = "".join(
        f'<tr><td><span class="{escape(f.severity)}">{_text(f.code)}</span><br><span class=dim>{_text(f.severity)}'
        f"{'' if f.active else ', over'}</span></td><td class=n>{f.step:,}</td>"
        f"<td>{_text(f.message)}<br><span class=dim>{_text(f.advice)}</span></td></tr>"
        for f in reversed(found)
    )
    head = "<tr><th>code</th><th>step</th><th>what, and what to do</th></tr>"
    return f"<h2>Findings</h2><div class=wide><table>{head}{rows}</table></div>"


def curve(points: Sequence[tuple[int, float]]) -> str:
    """A small line of (step, value), scaled to its own range; "" where there is nothing to draw."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) < 2:
        return ""
    left, right = finite[0][0], max(finite[-1][0], finite[0][0] + 1)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    span = high - low or 1.0
    dots = " ".join(
        f"{_WIDTH * (x - left) / (right - left):.1f},{_HEIGHT - 2 - (_HEIGHT - 4) * (y - low) / span:.1f}"
        for x, y in finite
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img"><polyline points="{dots}"/></svg>'
    )


def _page(title: str, parts: Sequence[str]) -> bytes:
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    document = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<meta http-equiv=refresh content={REFRESH_SECONDS}>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}"
        f"<footer>gradwatch {__version__}, {made}. Norms are pre-clip, unscaled, global. "
        "Numbers for machines: <a href=/metrics>/metrics</a></footer></body></html>"
    )
    return document.encode("utf-8", "replace")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{titles}</tr>{body}</table></div>"


def _name(run: Followed) -> str:
    facts = run.tail.fold.facts
    return run.run if facts is None else facts.run_name


def _start(run: Followed) -> float:
    facts = run.tail.fold.facts
    return 0.0 if facts is None else facts.start_time


def _text(value: Any) -> str:
    return escape(clean_text(value, _MAX_TEXT))


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _log(value: float) -> float:
    return math.log10(value) if value > 0 and math.isfinite(value) else math.nan


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _percent(value: float | None, sign: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f} %"


def _ago(seconds: float) -> str:
    if seconds < 0 or seconds > 1e9:
        return ""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
