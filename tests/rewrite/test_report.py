"""The report as text says what its data say."""

from __future__ import annotations

from tautomer.rewrite.attention_report import AttentionReport, Place
from tautomer.rewrite.pass_base import Application, Estimate, Log, Refusal
from tautomer.rewrite.report import Report, Size
from tautomer.rewrite.target import Gain


def test_a_shape_in_a_reason_is_no_markup() -> None:
    log = Log()
    log.refuse(Refusal("fold", "fold@cat", "cat([a, b], 1) is [s28, 4]"))
    size = Size(0, 0, {})
    assert "cat([a, b], 1) is [s28, 4]" in str(Report("Model", "eager", log, (), size, size))


def test_a_gain_is_told_of_what_fired_alone() -> None:
    log, size = Log([Application("fuse", "fuse@h.0/add")]), Size(0, 0, {})
    gains = {name: Gain(True, 2.0, 1.0, f"the gain of {name}") for name in ("fuse", "pack")}
    text = str(Report("Model", "onnxruntime", log, (), size, size, gains))
    assert "the gain of fuse" in text and "the gain of pack" not in text


def test_predicted_and_measured_stand_beside_each_other() -> None:
    log, size = Log(estimates=[Estimate("factor", "factor@h.0.fc/linear", "relative error", 0.125, 0.25)]), Size(0, 0, {})
    report = Report("Model", "eager", log, (), size, size)
    assert "h.0.fc/linear   0.125      0.250" in str(report) and report.estimates[0].measured == 0.25
    assert report.as_dict()["log"]["estimates"][0] == {
        "rewrite": "factor", "id": "factor@h.0.fc/linear", "what": "relative error", "predicted": 0.125, "measured": 0.25,
        "source": None,
    }  # fmt: skip


def test_what_became_of_an_attention_is_what_was_applied_in_the_end() -> None:
    """Written in place, a block may take what the model as a whole gave up, and the other way round."""
    places = (Place("window@h.0/sdpa", False, "given up at first"), Place("window@h.1/sdpa", True, error=0.1))
    log = Log([Application("window", "window@h.0/sdpa")], attentions=[AttentionReport("window", "approximate", places)])
    log.refuse(Refusal("window", "window@h.1/sdpa", "it cannot be written back"))
    report = Report("Model", "eager", log, (), Size(0, 0, {}), Size(0, 0, {}))
    found = [(place.replaced, place.reason) for place in report.attentions[0].places]
    assert found == [(True, ""), (False, "it cannot be written back")]
    assert [place["replaced"] for place in report.as_dict()["log"]["attentions"][0]["places"]] == [True, False]
