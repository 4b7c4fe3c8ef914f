"""The text says what the data say: what learnt and what did not, what was left alone and why, how far the whole moved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tautomer.rewrite.attention_report import AttentionReport, Learning, Place, Selection
from tautomer.rewrite.divergence import Moved
from tautomer.rewrite.evidence import Difference, Evidence
from tautomer.rewrite.pass_base import Application, Log, Refusal
from tautomer.rewrite.report import Report, Size

PLACES = (
    Place("hybrid@h.0.attn/attention", True, "", 0.1, Learning(40, 0.5, 0.1)),
    Place("hybrid@h.1.attn/attention", True, "", 0.3, Learning(20, 0.7, 0.3, stopped=True)),
    Place("hybrid@h.2.cross/attention", False, "its queries and keys are not of one sequence"),
)
MOVED = Moved("KL of the logits", 0.0123, 0.02, 0.975, 8)


def text(attentions: AttentionReport) -> str:
    log, size = Log(attentions=[attentions]), Size(0, 0, {})
    log.applications += [Application(place.id.partition("@")[0], place.id) for place in attentions.replaced]
    log.refuse(Refusal("hybrid", PLACES[2].id, PLACES[2].reason))
    log.refuse(Refusal("other", "other@h.0/linear", "another reason"))
    evidence = Evidence(0.0, differences=(Difference("hybrid", attentions.claim, 0.2),))
    return str(Report("Model", "eager", log, (), size, size, evidence=evidence))


def test_every_attention_has_a_row_and_a_refusal_is_told_once() -> None:
    told = text(AttentionReport("hybrid", "architecture", PLACES, MOVED)).splitlines()
    rows = {line.split()[0]: line for line in told if " h." in f" {line.strip()}"}
    assert rows["h.0.attn"].split() == ["h.0.attn", "hybrid", "0.1", "0.5", "40"]
    assert rows["h.1.attn"].split() == ["h.1.attn", "hybrid", "0.3", "0.7", "20", "(stopped)"]
    assert rows["h.2.cross"].split(maxsplit=4)[1:4] == ["as", "it", "was"]
    whole = " ".join(" ".join(told).split())
    assert whole.count("its queries and keys are not of one sequence") == 1 and "another reason" in whole
    assert "hybrid: 2 of 3 attentions replaced" in whole
    assert "KL of the logits 1.23e-02 nats on 8 calls (the worst call: 2.00e-02)" in whole
    assert "the largest logit is the same in 97.5% of the rows" in whole


def test_what_was_calibrated_is_said_instead_of_what_is_to_be_trained() -> None:
    learnt = text(AttentionReport("hybrid", "architecture", PLACES, MOVED))
    assert "40 steps, loss 0.37 → 0.05 on calls held out" in " ".join(learnt.split()) and "1 stopped early" in learnt
    assert "train it before it is used" not in learnt
    untrained = AttentionReport("hybrid", "architecture", (replace(PLACES[0], learning=None), *PLACES[1:]), MOVED)
    assert not untrained.calibrated and "train it before it is used" in text(untrained)
    assert "train it" not in text(AttentionReport("hybrid", "approximate", (replace(PLACES[0], learning=None),)))


def test_a_budget_and_a_model_without_attentions_are_told() -> None:
    spent = AttentionReport(
        "window", "approximate", (replace(PLACES[2], alone=0.5),), None, Selection(0.1, 0.08, 0.07, "planned")
    )
    assert list(spent.lines())[1:] == ["budget 1.00e-01: each alone 8.00e-02 in sum, together 7.00e-02; as planned"]
    assert "5.0e-01" in text(spent)
    greedy = Selection(0.1, 0.08, 0.07, "greedy")
    assert str(greedy).endswith("one by one, for the plan did not hold")
    (line,) = AttentionReport("window", "approximate", ()).lines()
    assert "no attention was recognised" in line


@pytest.mark.parametrize(("entry", "path"), [("hybrid@h.0.attn/sdpa", "h.0.attn"), ("hybrid@sdpa_1", "sdpa_1")])
def test_a_place_is_named_by_its_module(entry: str, path: str) -> None:
    assert Place(entry, False).path == path
