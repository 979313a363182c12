"""A validation as one page (HTML, self-contained) or as Markdown: tables, and predicted against measured as plots.

The page runs no script and loads nothing; names of plans, models and sources are text in it and never markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from autotune.report.bands import verdict
from autotune.report.coverage import COVERAGE, COVERAGE_HEAD, coverage_cells
from autotune.report.diagonal import GRADES, Dot, diagonal
from autotune.report.diagonal import STYLE as PLOT
from autotune.report.document import document
from autotune.report.units import percent, seconds, signed, size
from autotune.spec.validation import Judgement, Summary, Validation

SHORT = 60  # rows of a table that are shown at once; more are behind a click
MORE = """
.plots{display:flex;flex-wrap:wrap;gap:16px;margin:0 0 12px}.plots figure{margin:0;flex:1 1 300px;max-width:460px}
figcaption{font-size:12px;color:var(--soft)}td.n,th.n{text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:110px}h2{text-transform:none;margin-top:22px}summary{cursor:pointer;margin:0 0 8px}
#legend i{border-radius:50%}thead th{text-transform:none}
"""

HINT = (
    "Bands: 5 % and 12 % of the measured value. Hollow points: rows that coefficients were fitted to. Errors are "
    "predicted / measured - 1; regret is what the plan predicted best took longer than the best measured."
)
SUMMARY_HEAD = ("table", "metric", "rows", "mean", "bias", "worst", "tau-b", "rho", "regret", "worst regret")
ROW_HEAD = ("setup", "plan", "metric", "predicted", "measured", "error", "band", "inside", "rests on")


def figure(metric: str, value: float) -> str:
    """A value of a metric as people read it."""
    unit = metric.rpartition(" ")[2]
    if unit in ("s", "ms"):
        return seconds(value / (1000 if unit == "ms" else 1))
    return size(value) if unit == "bytes" else f"{value:.4g}"


def error(row: Judgement) -> str:
    return signed(row.error) if row.relative else f"{row.error:+.4f}"


def grade(row: Judgement) -> str:
    """What a prediction rests on: the grade of most of it, and its share where others are in it too."""
    share = row.shares.get(row.grade, 1.0)
    part = "" if share > 0.995 else f" {share:.0%}"
    more = (", calibrated" if row.calibrated else "") + (", fitted to" if row.fitted else "")
    return f"{row.grade}{part}{more}"


def summary_cells(summary: Summary) -> list[str]:
    """The cells under SUMMARY_HEAD."""
    size_of = percent if summary.relative else lambda value: f"{value:.4f}"
    sign_of = signed if summary.relative else lambda value: f"{value:+.4f}"
    rest = [
        "–" if value is None else form(value)
        for value, form in (
            (summary.tau, lambda v: f"{v:.3f}"),
            (summary.rho, lambda v: f"{v:.3f}"),
            (summary.regret, percent),
            (summary.worst_regret, percent),
        )
    ]
    name = summary.group or (f"{summary.metric}, fitted to" if summary.fitted else summary.metric)
    numbers = [size_of(summary.mean), sign_of(summary.bias), sign_of(summary.worst)]
    return [summary.table, name, str(summary.rows), *numbers, *rest]


def row_cells(row: Judgement) -> list[str]:
    """The cells under ROW_HEAD."""
    values = [figure(row.metric, row.predicted), figure(row.metric, row.measured)]
    return [row.setup, row.name, row.metric, *values, error(row), band(row), verdict(row.inside), grade(row)]


def band(row: Judgement) -> str:
    """`441 to 489`, of a row that its band is judged by."""
    return "-" if row.interval is None else " to ".join(figure(row.metric, end) for end in row.interval)


def facts(found: Validation) -> list[str]:
    """What a reader must know first: where, what predicted, by which version, and what is left out."""
    lines = [f"measured on: {found.machine}", f"predicted from: {found.profile}", f"cost model {found.cost_model}"]
    return lines + list(found.notes)


def tables(found: Validation) -> dict[str, list[Judgement]]:
    """The rows of each table, in the order of the validation."""
    parts: dict[str, list[Judgement]] = {}
    for row in found.rows:
        parts.setdefault(row.table, []).append(row)
    return parts


def markdown(found: Validation) -> str:
    """The report as Markdown."""
    lines = [f"# Validation: {_cell(found.suite)}", ""]
    lines += [f"- {_cell(fact)}" for fact in facts(found)]
    lines += ["", *_table(SUMMARY_HEAD, map(summary_cells, found.summaries))]
    if found.groups:
        lines += [
            "",
            "## By group (judged rows)",
            "",
            *_table(SUMMARY_HEAD[:6], (summary_cells(g)[:6] for g in found.groups)),
        ]
    if found.coverage:
        lines += ["", "## Coverage of bands", "", COVERAGE, ""]
        lines += _table(COVERAGE_HEAD, map(coverage_cells, found.coverage))
    for name, rows in tables(found).items():
        lines += ["", f"## {_cell(name)}", "", f"Source: {_cell(', '.join(dict.fromkeys(r.source for r in rows)))}", ""]
        lines += _table(ROW_HEAD, map(row_cells, rows))
    if found.failed:
        lines += ["", "## Did not run", "", *(f"- {_cell(plan)}: {_cell(why)}" for plan, why in found.failed.items())]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(text: str) -> str:
    """Text that is neither a column's end nor markup."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def page(found: Validation) -> str:
    """The report as a page."""
    title = f"Validation: {found.suite}"
    told = "".join(f"<li>{escape(fact)}</li>" for fact in facts(found))
    used = dict.fromkeys(row.grade for row in found.rows)
    legend = "".join(f'<li><i class="g-{name}"></i>{name}</li>' for name in GRADES if name in used)
    body = [_html_table(SUMMARY_HEAD, map(summary_cells, found.summaries), 2)]
    if found.groups:
        inner = _html_table(SUMMARY_HEAD[:6], (summary_cells(group)[:6] for group in found.groups), 2)
        body.append(f"<details><summary>By group, judged rows</summary>{inner}</details>")
    if found.coverage:
        inner = _html_table(COVERAGE_HEAD, map(coverage_cells, found.coverage), 4)
        body.append(f"<h2>Coverage of bands</h2><p>{COVERAGE}</p>{inner}")
    for name, rows in tables(found).items():
        sources = ", ".join(dict.fromkeys(row.source for row in rows))
        body.append(f"<h2>{escape(name)}</h2><p>{escape(sources)}</p>{_plots(rows)}")
        inner = _html_table(ROW_HEAD, map(row_cells, rows), 3)
        many = f"<details><summary>{len(rows)} rows</summary>{inner}</details>"
        body.append(inner if len(rows) <= SHORT else many)
    if found.failed:
        lines = "".join(f"<li>{escape(plan)}: {escape(why)}</li>" for plan, why in found.failed.items())
        body.append(f"<h2>Did not run</h2><ul>{lines}</ul>")
    body.append(f'<p class="hint">{HINT}</p>')
    front = f'<ul>{told}</ul>\n<ul id="legend">{legend}</ul>\n'
    return document(title, front + "".join(body), style=PLOT + MORE)


def _plots(rows: Sequence[Judgement]) -> str:
    """A plot a metric, of the rows whose values have a logarithm."""
    plots = []
    for metric in dict.fromkeys(row.metric for row in rows):
        these = [row for row in rows if row.metric == metric]
        shown = [row for row in these if row.predicted > 0 and row.measured > 0]
        if shown:
            dots = [Dot(row.predicted, row.measured, row.grade, _said(row), row.fitted) for row in shown]
            left = f", {len(these) - len(shown)} without a logarithm left out" if len(these) > len(shown) else ""
            caption = escape(f"{metric}: {len(shown)} rows{left}")
            plots.append(f"<figure>{diagonal(dots, metric)}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="plots">{"".join(plots)}</div>'


def _said(row: Judgement) -> str:
    values = f"{figure(row.metric, row.predicted)} predicted, {figure(row.metric, row.measured)} measured"
    return f"{row.setup} {row.name}: {values}, {error(row)} ({grade(row)})"


def _html_table(head: Sequence[str], rows: Iterator[list[str]], names: int) -> str:
    """A table whose first `names` columns are words."""

    def line(tag: str, cells: Sequence[str]) -> str:
        left = f'{tag} class="n"'
        shown = (f"<{left if k < names else tag}>{escape(cell)}</{tag}>" for k, cell in enumerate(cells))
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'
