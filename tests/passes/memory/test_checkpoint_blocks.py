"""A block that is run again keeps what it reads and nothing else, and not a bit of a gradient changes."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends.rewritten import Rewritten
from tautomer.passes.memory.checkpoint_blocks import CheckpointBlocks
from tautomer.passes.memory.recompute_inputs import RecomputeInputs
from tautomer.rewrite import checkpoints
from tautomer.rewrite.program import Program

D, H = 8, 12
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    def __init__(self, p: float = 0.3, norm: Any = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = norm(D), nn.Linear(D, H), nn.Linear(H, D), nn.Dropout(p)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return x + scale * self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Blocks with dropout between two layers; every block also reads one scale that is made outside of them."""

    def __init__(self, blocks: int = 3, norm: Any = nn.LayerNorm) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(D, D), nn.ModuleList(Mlp(norm=norm) for _ in range(blocks))
        self.leave = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        scale = x.mean((-1, -2), keepdim=True).exp()
        for block in self.blocks:
            x = block(x, scale)
        return self.leave(x)


def gradients(model: Any, x: Tensor = X) -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(model: Any, other: Any, x: Tensor = X) -> bool:
    return all(torch.equal(a, b) for a, b in zip(gradients(model, x), gradients(other, x), strict=True))


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Net().train()
    return model, tautomer.capture(copy.deepcopy(model), (X,), mode="both")


@pytest.fixture(scope="module")
def pair(captured: Any) -> tuple[nn.Module, Rewritten]:
    model, program = captured
    return model, tautomer.optimize(program, passes=[CheckpointBlocks()])


def test_only_what_the_blocks_read_is_kept_and_not_a_bit_changes(pair: Any, observed: Any) -> None:
    model, fast = copy.deepcopy(pair)
    assert fast.report.fired("checkpoint-blocks") == 3 and fast.report.evidence.gradient == 0.0
    inputs = 15 * D * 4
    assert observed(fast, X) == inputs + 3 * 4 + 4 * inputs, "x, the scale, and what the blocks and the last layer read"
    saved = tautomer.saved_tensors(fast)
    assert saved.bytes == observed(fast, X) < observed(model, X) / 3
    assert saved.recomputed > 3 * 15 * 4 * D * H and "are computed again" in str(saved)
    assert same(fast, model) and same(fast, model, X[:2])
    assert torch.equal(fast.eval()(X), model.eval()(X)) and same(fast, model)
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_it_is_copied_pickled_saved_and_loaded_with_its_checkpoints(pair: Any, observed: Any, tmp_path: Path) -> None:
    model, fast = copy.deepcopy(pair)
    tautomer.save(fast, tmp_path / "fast")
    forms = (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), tautomer.load(tmp_path / "fast"))
    for form in forms:
        assert observed(form.train(), X) == observed(fast, X) and same(form, model)
        assert torch.equal(form.eval()(X), model.eval()(X))
        model.train()


def test_without_a_gradient_nothing_is_run_twice(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair
    monkeypatch.setattr(checkpoints, "checkpoint", None)
    with torch.no_grad():
        fast(X)
    with pytest.raises(TypeError, match="not callable"):
        fast(X)


def test_compiled_the_checkpoints_are_kept(pair: Any, observed: Any) -> None:
    model, fast = copy.deepcopy(pair)
    for m in (model, fast):
        m.eval()  # compiled code draws other numbers
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager_decomp_partition")
    for a, b in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(a, b)
    assert observed(compiled, X) < 0.5 * observed(model, X)


def test_under_autocast_the_table_is_right_and_gradients_are_the_originals(pair: Any, observed: Any) -> None:
    model, fast = copy.deepcopy(pair)
    assert tautomer.saved_tensors(fast, autocast=torch.bfloat16).bytes == observed(fast, X, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(fast, model)


def test_exported_the_graph_is_flat(pair: Any) -> None:
    model, fast = copy.deepcopy(pair)
    flat = torch.export.export(fast.eval(), (X,))
    assert "checkpoint" not in str(flat.graph)
    assert torch.equal(flat.module()(X), model.eval()(X))


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.zoo)])
def test_what_is_inside_would_free_nothing(late: bool, captured: Any, pair: Any, observed: Any) -> None:
    """Below a checkpoint an input that is computed again is no less: the boundary alone is kept."""
    model, once = copy.deepcopy(pair)
    first, then = CheckpointBlocks(), RecomputeInputs()
    fast = tautomer.optimize(captured[1], passes=[then, first] if late else [first, then])
    assert observed(fast, X) == observed(once, X) == tautomer.saved_tensors(fast).bytes
    assert bool(fast.report.fired("recompute-inputs")) is late
    for a, b in zip(gradients(fast), gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Normed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_what_writes_memory_is_not_run_twice() -> None:
    program = tautomer.capture(Net(2, Normed).train(), (X,), mode="train", dynamic_shapes="static")
    fast = tautomer.optimize(program, passes=[CheckpointBlocks()], check=False)
    assert not fast.report.fired("checkpoint-blocks")
    assert {"writes memory" in r.reason for r in fast.report.refusals} == {True}


def test_frozen_blocks_and_those_that_a_user_skips_stay(observed: Any) -> None:
    model = Net().train()
    model.enter.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    program = tautomer.capture(model, (X,), mode="train", dynamic_shapes="static")
    fast = tautomer.optimize(program, passes=[CheckpointBlocks()], skip=["blocks.1"])
    assert [a.note for a in fast.report.applications] == ["blocks.2 is run again"]
    (refusal,) = fast.report.refusals
    assert refusal.reason == "nothing in it or before it trains: it keeps nothing of its own"
    assert tautomer.saved_tensors(fast).bytes == observed(fast, X) and same(fast, model)


def test_a_model_without_repeated_blocks_has_its_first_modules(observed: Any) -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(D, D), b=nn.Sequential(nn.Linear(D, H), nn.GELU()), c=nn.Linear(H, D), d=Mlp()))
    model.train()
    program = tautomer.capture(copy.deepcopy(model), (X,), mode="train", dynamic_shapes="static")
    fast = tautomer.optimize(program, passes=[CheckpointBlocks()])
    assert [a.note for a in fast.report.applications] == ["b is run again", "d is run again"]
    assert tautomer.saved_tensors(fast).bytes == observed(fast, X) == 15 * (3 * D + H) * 4 and same(fast, model)
