"""Whatever stops ``optimize_``, ``fold_`` or ``load_form`` in whatever step, the model is what it was, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.models import ZOO

import tautomer
from tautomer import _blocks, _inplace
from tautomer.backends import form, hugging_face, to_module

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
PASSES = ["raise-gelu", "layer-norm-to-rms-norm"]


class Activated(nn.Module):
    """An activation that is written out behind a layer: code of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.up(x)
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), Activated(), Activated(), nn.Linear(8, 3)).double().eval()


def state_of(model: nn.Module) -> list[Any]:
    """Everything that may not change; tensors by their values."""
    found: list[Any] = [name for _, name in hugging_face.implementations(model)]
    for path, module in model.named_modules():
        held = {key: len(x) if isinstance(x, dict) else x for key, x in vars(module).items() if key != "config"}
        found += [path, type(module), str(held)]
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        found += [name, id(x), x.requires_grad, x.grad is None, x.detach().numpy().tobytes()]
    return [*found, torch.random.get_rng_state().tolist()]


STEPS = [
    *((_inplace, name, at) for name, at in (("capture", 1), ("watch", 1), ("plan", 2), ("report_of", 1))),
    *((to_module, name, at) for name, at in (("_overwrite", 2), ("exchange", 1), ("guard", 1))),
    *((_blocks, name, at) for name, at in (("record", 1), ("capture", 1), ("exchange", 2))),
    *((_inplace, name, at) for name, at in (("_compare", 1), ("report_of", 2), ("edits_of", 1))),
]


@pytest.mark.parametrize(("owner", "name", "at"), STEPS, ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2])
def test_optimize_in_place(owner: Any, name: str, at: int, failing: Any) -> None:
    model = net()
    before = state_of(model)
    failing(owner, name, at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tautomer.optimize_(model, (X,), passes=PASSES, dynamic_shapes="static", mode="eval")
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["check_equivalence", "written"])
def test_the_attention_of_a_hugging_face_model(name: str, failing: Any) -> None:
    model, call = ZOO["gpt2"]()
    model.set_attn_implementation("eager")
    before = state_of(model)
    failing(_inplace, name, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tautomer.optimize_(model, (), call, passes=["raise-attention"], mode="eval", dynamic_shapes="static")
    assert state_of(model) == before


def test_folding(failing: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).double()
    tautomer.optimize_(model, (X,), recipe="training", target="inductor")
    before = state_of(model)
    failing(_inplace, "_compare", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tautomer.fold_(model, (X,))
    assert state_of(model) == before


def test_loading_a_form(tmp_path: Path, failing: Any) -> None:
    rewritten, model = net(), net()
    assert len(tautomer.optimize_(rewritten, (X,), passes=PASSES, dynamic_shapes="static", mode="eval").modules) == 3
    tautomer.save_form(rewritten, tmp_path)
    model.load_state_dict(dict(rewritten.state_dict()))
    before = state_of(model)
    failing(form, "exchange", 3, KeyboardInterrupt())
    failing(form, "guard", 1, RuntimeError())
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            tautomer.load_form(model, tmp_path)
        assert state_of(model) == before
    tautomer.load_form(model, tmp_path)
    assert torch.equal(model(X), rewritten(X))
