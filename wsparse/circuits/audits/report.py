"""The report of an audit: one HTML page without scripts, for the screen and for paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import html

from wsparse.circuits.audits.claims import CLAIMS, statement
from wsparse.circuits.audits.record import Audit, Curve, Measurement, TestResult

FILE = "audit.html"
MARKS = {"passed": "✓", "failed": "✗", "reported": "•", "not run": "○"}
"""What stands before a verdict, so that it does not hang on color."""

_HELD_TO = {
    "labels": "the right answers",
    "model": "the model's own answers",
    "vocabulary": "the model's probabilities of all tokens",
}
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; color: #1b1f24;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; border-bottom: 2px solid #1b1f24; }
h3 { font-size: 1.05rem; margin: 1.9rem 0 .3rem; display: flex; gap: 1rem; justify-content: space-between; }
p { margin: .35rem 0; } ul { margin: .3rem 0; padding-left: 1.3rem; } li { margin: .25rem 0; }
code { font: .88em ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  overflow-wrap: anywhere; white-space: pre-wrap; }
code span { display: inline-block; max-width: 100%; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; }
th, td { text-align: left; padding: .22rem .8rem .22rem 0; border-bottom: 1px solid #d4d9df;
  vertical-align: top; font-weight: normal; overflow-wrap: anywhere; }
thead th { font-size: .85rem; color: #59636e; border-bottom-color: #59636e; }
.n, .u { white-space: nowrap; width: 8.2rem; } .u { width: 6rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.facts th { width: 9rem; color: #59636e; }
.verdict { font-weight: 650; white-space: nowrap; }
.passed { color: #17692f; } .failed { color: #a3151f; } .reported, .not-run { color: #59636e; }
.quiet { color: #59636e; font-size: .9rem; }
.what { display: grid; grid-template-columns: 6.2rem 1fr; gap: .1rem .6rem; margin: .4rem 0;
  font-size: .93rem; }
.what dt { color: #59636e; } .what dd { margin: 0; }
svg { display: block; margin: .6rem 0; max-width: 100%; height: auto; }
.list h3 { display: block; }
@page { size: A4; margin: 16mm 15mm 18mm; @bottom-right { content: counter(page) " / " counter(pages);
  font: 8pt sans-serif; color: #59636e; } }
@media print {
  html { font-size: 12px; }
  body { font-size: 9.5pt; line-height: 1.4; margin: 0; padding: 0; max-width: none; }
  h2, h3, .what, thead, .test > p:first-of-type { break-after: avoid; }
  .what, svg, tr, li { break-inside: avoid; }
  tbody tr:last-child, svg { break-before: avoid; } tbody tr:first-child { break-after: avoid; }
  h2.statement { break-before: page; margin-top: 0; } thead { display: table-header-group; }
  p { orphans: 3; widows: 3; } .verdict { print-color-adjust: exact; }
}
"""  # fmt: skip


def render(audit: Audit) -> str:
    """Returns the page."""
    said = statement(audit)
    tests = "\n".join(map(_test, audit.tests))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Audit of {_text(audit.task)} in {_text(audit.run)}</title><style>{_STYLE}</style></head><body>
<h1>Audit of the circuit of <code>{_text(audit.task)}</code> in <code>{_text(audit.run)}</code></h1>
<p>{audit.nodes:,} nodes, {audit.edges:,} edges. Loss {audit.loss:.3f} nats under mean ablation, target
{audit.target:g}: {_text(audit.status)}. {_text(_counts(audit))}</p>
<p class="quiet">What each test shows, and what it does not, is in docs/evidence.md of wsparse. The report
ends in what may and what may not be concluded.</p>
<h2>Verdicts</h2>{_verdicts(audit)}
<h2>What was tested, and with what</h2>{_facts(audit)}
<h2>Tests</h2>
<p class="quiet">Losses are in nats; 0.693 is chance. Unless a row says otherwise, intervals are 95% bootstrap
intervals over pairs of prompts.</p>
{tests}
<h2 class="statement">Statement</h2>
<p>This follows from the verdicts alone, by the table of claims in docs/evidence.md.</p>
<div class="list">
<h3>What may be said</h3>{_list(said.allowed, "Nothing: no test was passed.")}
<h3>What must be said beside it</h3>{_list(said.required, "No test failed.")}
<h3>What was not shown either way</h3>{_list(said.untested, "Nothing: every test has a verdict.")}
<h3>What does not follow</h3>{_list(said.forbidden, "")}
</div></body></html>
"""


def table(audits: Sequence[Audit]) -> str:
    """Returns a row of text for each audit: how many tests were passed, and which failed."""
    width = max([len(audit.task) for audit in audits] + [len("task")])
    columns = [f"{verdict:>{max(len(verdict), 6)}}" for verdict in MARKS]
    lines = [f"{'task':<{width}}  {'nodes':>6}  {'loss':>6}  {'  '.join(columns)}  which failed"]
    for audit in audits:
        counts = [f"{_count(audit, v):>{len(column)}}" for v, column in zip(MARKS, columns, strict=True)]
        failed = [test.name for test in audit.tests if test.verdict == "failed"]
        line = f"{audit.task:<{width}}  {audit.nodes:>6}  {audit.loss:>6.3f}  {'  '.join(counts)}  "
        lines.append((line + ", ".join(failed)).rstrip())
    return "\n".join(lines)


def _text(value: object) -> str:
    return html.escape(str(value))


def _count(audit: Audit, verdict: str) -> int:
    return sum(test.verdict == verdict for test in audit.tests)


def _counts(audit: Audit) -> str:
    counts = {verdict: _count(audit, verdict) for verdict in MARKS}
    others = len(CLAIMS.keys() - {test.name for test in audit.tests})
    parts = [f"{n} {verdict}" for verdict, n in (counts | {"not asked for": others}).items() if n]
    return f"Tests: {', '.join(parts)}."


def _mark(verdict: str) -> str:
    return f'<span class="verdict {verdict.replace(" ", "-")}">{MARKS[verdict]} {verdict}</span>'


def _verdicts(audit: Audit) -> str:
    rows = (
        f"<tr><td>{_text(test.title)}</td><td>{_mark(test.verdict)}</td><td>{_text(meaning(test))}</td></tr>"
        for test in audit.tests
    )
    return _table(("test", "verdict", "meaning"), rows)


def meaning(test: TestResult) -> str:
    """Returns what a test's verdict says, in a sentence."""
    claim = CLAIMS.get(test.name)
    if claim is None or test.verdict not in ("passed", "failed"):
        return test.reason
    return claim.passed if test.verdict == "passed" else claim.failed


def _facts(audit: Audit) -> str:
    facts = {
        "model": f"{audit.model} (parameters), after {audit.step:,} steps",
        "data": f"{audit.data} (tokens that it was trained on)",
        "circuit": audit.circuit,
        "candidates": audit.form,
        "procedure": f"masks learned under {audit.objective} ablation, to a loss of {audit.target:g} "
        f"against {_HELD_TO[audit.held_to]}",
        "prompts": f"{audit.pairs} pairs of the report split, where a test does not say otherwise",
        "options": ", ".join(f"{name} {value}" for name, value in audit.options.items()),
        "command": audit.command or "none: made in a program",
        "version": f"wsparse {audit.wsparse}",
        "time": f"{audit.seconds:.0f} s",
    }
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td><code>{_words(value)}</code></td></tr>'
        for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table><p class="quiet">Digests are SHA-256.</p>'


def _words(text: str) -> str:
    """Returns a text that breaks between words, and at no hyphen of an option."""
    return " ".join(f"<span>{_text(word)}</span>" for word in text.split(" "))


def _test(test: TestResult) -> str:
    heading = f"<h3>{_text(test.title)} {_mark(test.verdict)}</h3>"
    if test.verdict == "not run":
        return f'<section class="test">{heading}<p>{_text(test.reason)}</p></section>'
    parts = {"procedure": test.procedure, "control": test.control, "criterion": test.criterion}
    what = "".join(f"<dt>{name}</dt><dd>{_text(text)}</dd>" for name, text in parts.items() if text)
    columns = ("", "value", "interval", "control", "unit")
    measured = _table(columns, map(_row, test.measurements)) if test.measurements else ""
    curves = "".join(map(_plot, test.curves))
    return (
        f'<section class="test">{heading}<p>{_text(test.question)}</p><dl class="what">{what}</dl>'
        f'{measured}{curves}<p class="quiet">{test.seconds:.1f} s</p></section>'
    )


def _table(columns: Sequence[str], rows: Iterable[str]) -> str:
    kinds = {"value": "n", "interval": "n", "control": "n", "unit": "u"}
    head = "".join(f'<th scope="col" class="{kinds.get(column, "")}">{column}</th>' for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(m: Measurement) -> str:
    value, low, high, control = (_number(x, m.unit) for x in (m.value, m.low, m.high, m.control))
    cells = (value or "none", f"{low} to {high}" if low and high else "", control)
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f'<tr><td>{_text(m.name)}</td>{numbers}<td class="u">{_text(m.unit)}</td></tr>'


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.5g}" if unit in ("nodes", "edges") else f"{value:z.3f}"


def _list(items: Sequence[str], otherwise: str) -> str:
    if not items:
        return f"<p>{_text(otherwise)}</p>"
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 210, 58, 80, 14, 40
_COLOR, _CONTROL, _GRID = "#1f6fb5", "#59636e", "#d4d9df"


def _plot(curve: Curve) -> str:
    """Returns a curve as SVG; the control's is dashed."""
    largest = max([*curve.y, *(curve.control or []), 1e-9])
    first, span = curve.x[0], (curve.x[-1] - curve.x[0]) or 1.0
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    bottom, right = _TOP + height, _LEFT + width

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + width * (x - first) / span, bottom - height * y / largest

    def line(values: Sequence[float], color: str, dashes: str, label: str) -> str:
        points = [place(x, y) for x, y in zip(curve.x, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>{dots}'
            f'<text x="{right + 9}" y="{points[-1][1] + 4 + _nudge(curve, values):.1f}" fill="{color}">'
            f"{label}</text>"
        )

    grid = "".join(
        f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="{_GRID}"/>'
        f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (0.0, largest / 2, largest)
        for y in [place(first, value)[1]]
    )
    ticks = "".join(
        f'<text x="{place(x, 0)[0]:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>' for x in curve.x
    )
    control = curve.control and line(curve.control, _CONTROL, ' stroke-dasharray="5 4"', "control")
    label = _text(f"{curve.y_label} over {curve.x_label}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{label}" font-size="11" font-family="sans-serif" fill="#1b1f24">{grid}{ticks}'
        f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{_text(curve.x_label)}</text>'
        f'<text transform="translate(13 {_TOP + height / 2}) rotate(-90)" text-anchor="middle">'
        f"{_text(curve.y_label)}</text>{control or ''}{line(curve.y, _COLOR, '', 'circuit')}</svg>"
    )


def _nudge(curve: Curve, values: Sequence[float]) -> float:
    """Returns how far down the label of a line moves, so that two labels do not lie on one another."""
    if curve.control is None:
        return 0.0
    apart = (curve.y[-1] - curve.control[-1]) / max(*curve.y, *curve.control, 1e-9)
    if abs(apart) * (_HEIGHT - _TOP - _BOTTOM) >= 13:
        return 0.0
    above = (apart >= 0) == (values is curve.y)
    return -6.0 if above else 7.0
