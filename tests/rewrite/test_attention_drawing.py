"""A bar is as long as its attention is off, nothing runs out of the picture, and a long sentence is there in whole."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

import tautomer
from tautomer.rewrite.attention_drawing import draw_attentions
from tautomer.rewrite.attention_report import AttentionReport, Learning, Place
from tautomer.rewrite.divergence import Moved
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.pass_base import Application, Log
from tautomer.rewrite.report import Report, Size

REASON = "its mask is <nothing> that it can represent: " + "a long story " * 20
PLACES = (
    Place("hybrid@h.0.attn/attention", True, "", 0.1, Learning(40, 0.8, 0.1)),
    Place("hybrid@h.1.attn/attention", True, "", 0.4, Learning(40, 0.6, 0.4)),
    Place("hybrid@h.2.attn/attention", True, "", float("nan")),
    Place("hybrid@h.3.attn/attention", False, REASON, 0.9),
)
REPORT = AttentionReport("hybrid", "architecture", PLACES, Moved("KL of the logits", 0.0123, 0.02, 0.975, 8))
SVG = "{http://www.w3.org/2000/svg}"


def drawn(*reports: AttentionReport) -> ElementTree.Element:
    return ElementTree.fromstring(draw_attentions(reports))


def test_bars_are_as_long_as_errors() -> None:
    bars = [float(bar.attrib["width"]) for bar in drawn(REPORT).findall(f"{SVG}rect")[1:]]
    before, now, was, then, unknown = bars
    assert now / before == pytest.approx(0.1 / 0.8, rel=1e-2) and then / was == pytest.approx(0.4 / 0.6, rel=1e-2)
    assert was / before == pytest.approx(0.6 / 0.8, rel=1e-2) and unknown == before


def test_nothing_runs_out_of_the_picture_or_into_another_row() -> None:
    picture = drawn(REPORT, AttentionReport("window", "approximate", ()))
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    rows = [(float(t.attrib["x"]), float(t.attrib["y"]), t) for t in picture.findall(f"{SVG}text")]
    for x, y, text in rows:
        length = len(text.text or "") * 7.3
        start = x - length if text.attrib["text-anchor"] == "end" else x
        assert start >= 0 and start + length <= width and 0 < y < height
    heights = sorted({y for _, y, _ in rows})
    assert all(b - a >= 16 for a, b in pairwise(heights))


def test_a_long_sentence_is_there_in_whole() -> None:
    titles = [title.text for title in drawn(REPORT).iter(f"{SVG}title")]
    assert f"as it was: {REASON}" in titles


def test_a_report_is_drawn_by_the_front_door(tmp_path: Path) -> None:
    made = [Application("hybrid", place.id) for place in REPORT.replaced]
    report = Report("Model", "eager", Log(made, attentions=[REPORT]), (), Size(0, 0, {}), Size(0, 0, {}))
    assert tautomer.draw(report, tmp_path / "attentions.svg").read_text() == draw_attentions([REPORT])
    with pytest.raises(UsageError, match="says nothing of attentions"):
        tautomer.draw(Report("Model", "eager", Log(), (), Size(0, 0, {}), Size(0, 0, {})), tmp_path / "none.svg")
