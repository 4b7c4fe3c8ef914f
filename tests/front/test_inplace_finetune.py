"""What keeps less and stays inside one module is written back into it: the user's object, its keys, its seeded run."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tautomer
from tautomer.rewrite.errors import UsageError

X = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.RMSNorm(16), nn.GELU()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.inner, self.outer = nn.Dropout(0.1), nn.Dropout(0.2)
        self.down.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.outer(self.down(self.inner(self.act(self.up(self.norm(x))))))
        return result


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    model(X).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_dropouts_and_norms_keep_less_in_place(observed: Any) -> None:
    original = nn.Sequential(Layer(), Layer()).train()
    model = copy.deepcopy(original)
    done = tautomer.optimize_(model, (X,), recipe="finetune", skip=["recompute-inputs"])
    assert set(done.modules) == {f"{i}.{name}" for i in range(2) for name in ("norm", "inner", "outer")}
    assert done.report.fired("pack-dropout-masks") == 4 and done.report.fired("lean-rms-norm") == 2
    assert isinstance(model[0].norm, nn.RMSNorm) and isinstance(model[0].inner, nn.Dropout)
    dropouts, second_norm = 2 * (4 * 64 - 8 + 4 * 16 - 2), 4 * 16
    statistic_of_the_first = 4  # its input needs no gradient: there it keeps one number per row more
    assert observed(original, X) - observed(model, X) == 10 * (dropouts + second_norm - statistic_of_the_first)
    _require_the_same(model, original)


def test_what_spans_modules_becomes_code_of_their_block(observed: Any) -> None:
    original = nn.Sequential(Layer(), Layer()).train()
    model, leaves = copy.deepcopy(original), copy.deepcopy(original)
    tautomer.optimize_(leaves, (X,), recipe="finetune", skip=["recompute-inputs"])
    done = tautomer.optimize_(model, (X,), recipe="finetune")
    assert done.report.fired("recompute-inputs") and {"0", "1"} <= set(done.modules) and isinstance(model[0], Layer)
    assert observed(model, X) < observed(leaves, X) < observed(original, X)
    _require_the_same(model, original)


def _require_the_same(model: nn.Module, original: nn.Module) -> None:
    assert model.state_dict().keys() == original.state_dict().keys()
    for candidate in (model, copy.deepcopy(model)):
        for a, b in zip(gradients(candidate), gradients(original), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(X), original.eval()(X))


@pytest.mark.parametrize("exact", [True, False])
def test_two_bits_are_written_back_on_request_alone(exact: bool, observed: Any) -> None:
    original = nn.Sequential(Layer()).train()
    model = copy.deepcopy(original)
    done = tautomer.optimize_(model, (X,), recipe=tautomer.Finetune(exact=exact))
    assert done.report.fired("approximate-activations") == (not exact)
    assert type(model[0].act) is (nn.GELU if exact else type(model[0].act)) and isinstance(model[0].act, nn.GELU)
    assert (observed(model, X) < 0.4 * observed(original, X)) is (not exact)


def test_a_block_is_run_again_by_its_own_class(observed: Any, tmp_path: Path) -> None:
    original = nn.Sequential(Layer(), Layer(), nn.Linear(16, 4)).train()
    model = copy.deepcopy(original)
    done = tautomer.optimize_(model, (X,), recipe="finetune", passes=["checkpoint-blocks"])
    assert done.modules == ("0", "1") and type(model[0]).__name__ == "RewrittenLayer" and isinstance(model[0], Layer)
    assert observed(model, X) == 3 * X.numel() * 4 and model.state_dict().keys() == original.state_dict().keys()
    tautomer.save_form(model, tmp_path)
    loaded = copy.deepcopy(original)
    tautomer.load_form(loaded, tmp_path)
    for form in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert all(torch.equal(a, b) for a, b in zip(gradients(form), gradients(original), strict=True))
        assert observed(form, X) == observed(model, X)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager_decomp_partition")
    torch.testing.assert_close(compiled(X), original.eval()(X))


class Cached(nn.Module):
    """A block that may be given a store to append to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, *, store: Any = None) -> Tensor:
        if store is not None:
            store.append(x)
        result: Tensor = x + self.down(self.up(x).tanh())
        return result


def test_a_call_with_a_cache_is_not_run_again() -> None:
    class Store:
        def __init__(self) -> None:
            self.held: list[Tensor] = []

        def append(self, x: Tensor) -> None:
            self.held.append(x)

    model, store = nn.Sequential(Cached(), Cached()), Store()
    done = tautomer.optimize_(model, (X,), recipe="finetune", passes=["checkpoint-blocks"])
    assert done.modules == ("0", "1")
    model[0](X, store=store).sum().backward()
    assert len(store.held) == 1


def test_what_is_no_module_is_refused_and_said() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([Layer()])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.layer[0](x)
            return x

    model = Twice().train()
    done = tautomer.optimize_(model, (X,), recipe="finetune", passes=["checkpoint-blocks"])
    assert not done.modules and type(model.layer[0]) is Layer
    assert {r.reason for r in done.report.refusals} == {"it cannot be written back: 'layer.0' is called more than once"}


def test_a_budget_is_met_in_place(observed: Any) -> None:
    original = nn.Sequential(Layer(), Layer(), nn.Linear(16, 4)).train()
    model = copy.deepcopy(original)
    done = tautomer.optimize_(model, (X,), recipe=tautomer.Finetune(budget=0.5))
    plan = done.report.plan
    assert {block.choice for block in plan.blocks} >= {"checkpoint"}
    assert observed(model, X) == plan.after <= plan.budget == observed(original, X) // 2
    _require_the_same(model, original)
    free = tautomer.optimize(copy.deepcopy(original), (X,), recipe=tautomer.Finetune(budget=0.5), check=False).report.plan
    (note,) = [note.text for note in done.report.notes if "the plan computes" in note.text]
    ours, theirs = (f"computes {x.flops:,} FLOPs again and keeps {x.after:,} bytes" for x in (plan, free))
    assert free.flops < plan.flops
    assert note == f"the plan {ours}; with what no module can do by itself, as in optimize(…), it {theirs}"


def test_a_budget_out_of_reach_of_modules_that_are_called_again_says_what_was_given_up() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(self.layer(x)))  # type: ignore[no-any-return]

    model = Looped().train()
    form = dict(vars(model.layer))
    with pytest.raises(UsageError, match=r"without what was chosen and given up \([\w, -]*pack-dropout-masks") as refused:
        tautomer.optimize_(model, (X,), recipe=tautomer.Finetune(budget=0.3))
    assert "called 3 times" in str(refused.value) and "tautomer.optimize(…)" in str(refused.value)
    assert vars(model.layer) == form and type(model.layer) is Layer
    assert tautomer.optimize(model, (X,), recipe=tautomer.Finetune(budget=0.3)).report.plan is not None
