"""Norms without gain and shift in real architectures: as many as can be, exact, trained further, exported, and carried back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.models import _ENCODER, ZOO, _text

import tautomer
from tautomer.passes.norm.fold_norm_gain import NORMS, FoldNormGain, affine
from tautomer.passes.recipes import CLEANUP, NORM, RAISE
from tautomer.rewrite.evidence import relative_error
from tautomer.rewrite.pass_base import Pass

PASSES: list[type[Pass]] = [*RAISE, *(kind for kind in NORM if kind.name != "layer-norm-to-rms-norm"), FoldNormGain, *CLEANUP]
MODELS = {
    **{name: ZOO[name] for name in ("llama", "gemma", "gpt2", "t5", "vit")},
    "olmo": _text("OlmoForCausalLM", "OlmoConfig", **_ENCODER),
    "olmo2": _text("Olmo2ForCausalLM", "Olmo2Config", **_ENCODER),
}

EXPECTED = {"llama": (5, 0), "gemma": (4, 1), "gpt2": (4, 1), "t5": (10, 2), "vit": (4, 1), "olmo": (0, 0), "olmo2": (1, 8)}
"""Norms that are folded, and those that keep gain or shift: a tied head, an output, a norm whose result goes on the stream."""


def first(output: Any) -> torch.Tensor:
    return next(x for x in output.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", MODELS)
def test_folded_trained_and_carried_back(name: str, tmp_path: Path) -> None:
    model, example = MODELS[name]()
    fast = tautomer.optimize(model, (), example, passes=[kind() for kind in PASSES])
    left = [n for n in fast.graph.nodes if n.target in NORMS and affine(n) != (None, None)]
    assert (fast.report.fired("fold-norm-gain"), len(left)) == EXPECTED[name]
    evidence = fast.report.evidence
    assert evidence is None or (evidence.forward <= 1e-12 and evidence.gradient is not None and evidence.gradient <= 1e-10)
    if name in ("gemma", "vit"):
        tautomer.export_onnx(fast, tmp_path / "folded.onnx", (), example)

    fast = copy.deepcopy(fast)
    optimizer, losses = torch.optim.AdamW(fast.parameters(), lr=1e-3), []
    for _ in range(4):
        loss = first(fast(**example)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.load_state_dict(fast.weights.to_original(fast.state_dict()))
    assert relative_error(first(model(**example)), first(fast(**example))) <= 64 * torch.finfo(torch.float32).eps
