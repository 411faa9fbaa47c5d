"""Numbers as a reader wants them, always escaped, and the style sheet of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

ABSENT: Final = "–"

CSS: Final = """
:root { --ink: #222b36; --muted: #5b6673; --line: #dfe4e9; --good: #00734f; --bad: #b3261e; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
  max-width: 1010px; margin: 0 auto; padding: 28px 24px 60px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 38px 0 12px; padding-bottom: 5px; border-bottom: 1px solid var(--line); }
.sub { color: var(--muted); margin: 0 0 18px; }
.badge { display: inline-block; padding: 7px 14px; border-radius: 6px; font-weight: 600; margin: 0 8px 14px 0; }
.good { background: #dcefe6; color: var(--good); }
.bad { background: #fbe3e1; color: var(--bad); }
.none { background: #eef1f4; color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 11px 14px 12px; }
.card b { display: block; font-size: 23px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 13px; }
.card .label { font-weight: 600; }
figure { margin: 0 0 22px; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: 13.5px; max-width: 80ch; margin-top: 4px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 8px 24px; align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; }
td { overflow-wrap: anywhere; }
table + .sub { margin-top: 8px; }
th:first-child, td:first-child { text-align: left; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 8px 40px; align-items: start; }
h3 { font-size: 14px; margin: 10px 0 4px; }
details { margin-top: 38px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: #f6f8fa; padding: 14px; border-radius: 6px; overflow-x: auto; font: 12.5px/1.45 ui-monospace,
  "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  .pair, .tables { grid-template-columns: 1fr 1fr; } .cards { grid-template-columns: repeat(5, 1fr); gap: 6px; }
  .card, figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .badge, .card { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; }
}
"""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (a bool is none)."""
    if isinstance(value, bool) or value is None:
        return False
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def number(value: Any, digits: int = 4) -> str:
    """Escaped text of a number, with thousands separated; of anything else its text; a dash for None, NaN, infinity.

    >>> number(3358.0), number(0.123456), number(None), number("<b>"), number(15000)
    ('3,358', '0.1235', '–', '&lt;b&gt;', '15,000')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ABSENT
    if not is_number(value):
        return html.escape(str(value))
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def percent(value: Any, digits: int = 1) -> str:
    """A fraction as a percentage; what is no number as `number` shows it.

    >>> percent(0.6843, 2), percent(float("nan"))
    ('68.43 %', '–')
    """
    return f"{100 * value:.{digits}f} %" if is_number(value) else number(value)


def score(value: Any, metric: str) -> str:
    """A metric's value: percent for accuracies, four digits for all others."""
    return percent(value, 2) if "accuracy" in metric.lower() else number(value)


def seconds(value: Any) -> str:
    """A duration in its two largest units; what is no number as `number` shows it.

    >>> seconds(0.25), seconds(93.2), seconds(4000)
    ('0.25 s', '1 min 33 s', '1 h 7 min')
    """
    if not is_number(value):
        return number(value)
    if value < 60:
        return f"{value:.3g} s"
    if value < 3600:
        return f"{round(value) // 60} min {round(value) % 60} s"
    return f"{round(value / 60) // 60} h {round(value / 60) % 60} min"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the cells must be escaped already, the heads are escaped here."""
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    heads = f"<thead><tr>{first}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{heads}<tbody>{body}</tbody></table>"


def pairs(title: str, values: Any, cell: Any = number) -> str:
    """A titled two-column table of a mapping, or of what is not one as a single row; nothing if empty or None."""
    if not isinstance(values, Mapping):
        values = {} if values is None else {"": values}
    rows = [(html.escape(str(key)), cell(value)) for key, value in values.items()]
    return f"<div><h3>{html.escape(title)}</h3>{table((), rows)}</div>" if rows else ""
