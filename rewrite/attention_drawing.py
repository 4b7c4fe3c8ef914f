"""What became of the attentions of a model, drawn as SVG: a bar per attention, as long as it is off.

    h.0.attn  ████████░░░░░░░  0.31        dark: off by, now; light: before it learnt
    h.1.attn  as it was: some keys are padding …

Bars of one drawing have one scale, from nothing to the largest error, or to 1 if that is less than 1 and something learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from .attention_report import AttentionReport, Place
from .drawing import COLOURS, svg
from .errors import UsageError

_LETTER, _ROW, _BAR, _SPAN, _PAD = 7.3, 22.0, 14.0, 360.0, 18.0
_LONGEST = 110
"""Letters of a sentence that are drawn; the whole is shown where a reader points at it."""


def draw_attentions(reports: Sequence[AttentionReport]) -> str:
    """The drawing, as the text of an SVG file.

    Raises:
        UsageError: there is nothing to draw.

    Example: ``Path("attentions.svg").write_text(draw_attentions(fast.report.attentions))``
    """
    if not reports:
        raise UsageError("the report says nothing of attentions", hint='optimize(…, recipe="long-context") writes such a report')
    names = [place.path for report in reports for place in report.places]
    left = max((len(name) for name in names), default=0) * _LETTER + 2 * _PAD
    longest = max(map(_length, (place for report in reports for place in report.places)), default=0.0) or 1.0
    drawn, y = list[str](), _PAD
    for report in reports:
        first, *others = report.lines()
        drawn.append(_text(_PAD, y, first, bold=True))
        y += 1.5 * _ROW
        for place in report.places:
            drawn += _row(place, left, y, _SPAN / longest)
            y += _ROW
        for line in others:
            drawn.append(_text(_PAD, y, line))
            y += _ROW
        y += _PAD
    shown = [min(len(line), _LONGEST) for report in reports for line in report.lines()]
    width = max(left + _SPAN + 8 * _LETTER, left + _LONGEST * _LETTER, max(shown, default=0) * _LETTER) + 2 * _PAD
    return svg(0.0, 0.0, width, y + _PAD, drawn)


def _length(place: Place) -> float:
    """What the longest bar of a place stands for."""
    known = [place.error if place.replaced else None, place.learning.before if place.learning and place.replaced else None]
    return max((x for x in known if x is not None and math.isfinite(x)), default=0.0)


def _row(place: Place, left: float, y: float, scale: float) -> Iterator[str]:
    yield _text(left - _PAD, y, place.path, anchor="end")
    if not place.replaced:
        yield _text(left, y, f"as it was: {place.reason.partition(chr(10))[0]}", colour="#777777")
        return
    error, learnt = place.error, place.learning
    if learnt is not None:
        yield _bar(left, y, learnt.before * scale, COLOURS["mask"])
    if error is not None:
        yield _bar(left, y, error * scale, COLOURS["attention"])
    told = "not measured" if error is None else f"{error:.2g}"
    told += "" if learnt is None else f", {learnt.before:.2g} before {learnt.steps} steps"
    yield _text(left + _length(place) * scale + 6, y, told)


def _bar(x: float, y: float, length: float, colour: str) -> str:
    length = length if math.isfinite(length) else _SPAN
    return f'<rect x="{x:.1f}" y="{y - _BAR + 3:.1f}" width="{length:.1f}" height="{_BAR}" fill="{colour}" stroke="#8a8a8a"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#000000", bold: bool = False) -> str:
    shown = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    weight = ' font-weight="bold"' if bold else ""
    whole = f"<title>{escape(text)}</title>" if shown != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(shown)}{whole}</text>'
