"""Every model of the zoo as readable Python, captured and rewritten: the same bits, gradients included."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.models import ZOO

import tautomer

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("rewritten", [False, True], ids=["captured", "rewritten"])
def test_the_same_bits(name: str, rewritten: bool, tmp_path: Path) -> None:
    model, kwargs = ZOO[name]()
    subject = tautomer.optimize(model, kwargs=kwargs) if rewritten else model
    report = tautomer.to_python(subject, tmp_path / "made", kwargs=kwargs)
    assert len(report.sizes) == 2 and report.gradients == 0.0
    text = (tmp_path / "made" / "model.py").read_text()
    assert "import tautomer" not in text and max(map(len, text.splitlines())) <= 120
