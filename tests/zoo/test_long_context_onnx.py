"""Every form of attention in real architectures: it fires, runs at other sizes, and is one ONNX file for all lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import tautomer
from tautomer.passes.attention.transfer import Transfer

from zoo.models import ZOO, ids, pixels  # isort: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 3, "sinks": 1},
    "window-mask": {"window": 3, "sinks": 1},
    "loki": {"keys": 3, "rank": 2},
    "hyper": {"block": 2, "samples": 3, "leaf": 4, "longest": 32},
    "nystrom": {"landmarks": 3},
    "linformer": {"slots": 4, "longest": 32},
    "kernel": {"chunk": 4, "transfer": Transfer(steps=2)},
    "hybrid": {"window": 3, "transfer": Transfer(steps=2)},
    "gated": {"window": 3, "chunk": 4, "architecture": True},
}
CAUSAL, OPEN = ["gpt2", "llama"], ["bert", "vit"]
ONLY = {"hybrid": CAUSAL, "gated": CAUSAL, "nystrom": OPEN, "linformer": OPEN}
"""The families that a method can represent; all of them, if it is not here."""
EVERY = [(method, family) for method in OPTIONS for family in ONLY.get(method, CAUSAL + OPEN)]


def call(family: str, batch: int = 2, length: int = 7, size: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": pixels(16, batch)} if family == "vit" else {"input_ids": ids(batch, length)}


@pytest.mark.zoo
@pytest.mark.parametrize(("method", "family"), EVERY)
def test_it_is_one_onnx_file_for_every_length(method: str, family: str, tmp_path: Path) -> None:
    model, example = ZOO[family]()
    data = None if "architecture" in OPTIONS[method] else [call(family), call(family, 3)]
    recipe = tautomer.LongContext(method, **OPTIONS[method])
    fast = tautomer.optimize(model, (), example, recipe=recipe, data=data)
    assert fast.report.fired(recipe.substitute.name) == 2, str(fast.report)
    tautomer.export_onnx(fast, tmp_path / "model.onnx", (), example, check=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    for batch, length in ((2, 7), (1, 12), (3, 25)):
        given = call(family, batch, length)
        found, wanted = session.run(None, {name: next(iter(given.values())).numpy()})[0], fast(**given)[0]
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
