"""The report as text says what its data say."""

from __future__ import annotations

from tautomer.rewrite.pass_base import Log, Refusal
from tautomer.rewrite.report import Report, Size


def test_a_shape_in_a_reason_is_no_markup() -> None:
    log = Log()
    log.refuse(Refusal("fold", "fold@cat", "cat([a, b], 1) is [s28, 4]"))
    size = Size(0, 0, {})
    assert "cat([a, b], 1) is [s28, 4]" in str(Report("Model", "eager", log, (), size, size))
