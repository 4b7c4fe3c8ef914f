"""A state dict goes back to an original of itself, for every rewrite there is, or one sentence says which weight has none."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tautomer
import tautomer.passes
from tautomer.passes.cleanup.drop_unused_weights import DropUnusedWeights
from tautomer.passes.cleanup.name_weights import NameWeights
from tautomer.passes.recipes import CLEANUP, NORM
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.expressions import Apply, Leaf, evaluate
from tautomer.rewrite.inverse import NoInverseError, solve
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.rules import Rule
from tautomer.rewrite.trial import spellings
from tautomer.rewrite.weights import Weights

aten = torch.ops.aten
W, G, S = Leaf("W"), Leaf("g"), Leaf("s")
LEAVES = {name: torch.randn(n, dtype=torch.float64) for name, n in {"W": (4, 6), "g": (6,), "s": (4,), "V": (3, 6)}.items()}
EDIT = Apply(aten.mul.Tensor, (W, G))

EDITS: dict[str, Apply] = {
    "gain": Apply(aten.mul.Tensor, (W, G)),
    "gain first": Apply(aten.mul.Tensor, (G, W)),
    "gain 1 + g": Apply(aten.mul.Tensor, (W, Apply(aten.add.Tensor, (G, 1.0)))),
    "row scale": Apply(aten.mul.Tensor, (W, Apply(aten.unsqueeze.default, (S, -1)))),
    "number": Apply(aten.div.Tensor, (W, 3.0)),
    "divisor": Apply(aten.div.Tensor, (G, W)),
    "difference": Apply(aten.sub.Tensor, (G, W)),
    "sum with alpha": Apply(aten.add.Tensor, (G, W), (("alpha", 0.5),)),
    "transposed": Apply(aten.t.default, (Apply(aten.neg.default, (W,)),)),
    "permuted": Apply(aten.permute.default, (Apply(aten.reshape.default, (W, (2, 2, 6))), (2, 0, 1))),
    "cast": Apply(aten.to.dtype, (Apply(aten.transpose.int, (W, 0, 1)), torch.float32)),
    "joined": Apply(aten.cat.default, ((W, Leaf("V")),)),
    "product": Apply(aten.matmul.default, (W, Apply(aten.t.default, (Leaf("V"),)))),
    "column less": Apply(aten.slice.Tensor, (EDIT, 1, 0, 5)),
    "row less": Apply(aten.slice.Tensor, (Apply(aten.sub.Tensor, (W, Apply(aten.mean.dim, (W, (0,), True)))), 0, 0, 3)),
    "change of basis": Apply(
        aten.sub.Tensor, (Apply(aten.slice.Tensor, (EDIT, 1, 0, 5)), Apply(aten.slice.Tensor, (EDIT, 1, 5, 6)))
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_the_answer_gives_the_value_back(name: str) -> None:
    expression = EDITS[name]
    value = torch.randn_like(evaluate(expression, LEAVES.__getitem__))
    answer = solve(expression, value, frozenset({"W"}), LEAVES)
    assert set(answer) == {"W"}
    again = evaluate(expression, (LEAVES | answer).__getitem__)
    if name == "joined":
        again, value = again[:4], value[:4]
    torch.testing.assert_close(again, value, rtol=1e-12, atol=1e-12)


def test_the_answer_is_the_nearest_one() -> None:
    edit, value = EDITS["row less"], torch.randn(3, 6, dtype=torch.float64)
    answer = solve(edit, value, frozenset({"W"}), LEAVES)["W"]
    # what the edit forgets of a matrix, its mean over the rows, is what it was
    torch.testing.assert_close(answer.mean(0), LEAVES["W"].mean(0), rtol=1e-12, atol=1e-12)


def test_joined_pieces_are_found_at_once() -> None:
    value = torch.randn(7, 6, dtype=torch.float64)
    answer = solve(EDITS["joined"], value, frozenset({"W", "V"}), LEAVES)
    assert torch.equal(torch.cat([answer["W"], answer["V"]]), value)


def test_beside_a_zero_the_leaf_keeps_what_it_had() -> None:
    old = {**LEAVES, "g": LEAVES["g"].clone().index_fill_(0, torch.tensor([2]), 0.0)}
    answer = solve(EDITS["gain"], evaluate(EDITS["gain"], old.__getitem__), frozenset({"W"}), old)["W"]
    torch.testing.assert_close(answer, old["W"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        (Apply(aten.matmul.default, (W, Apply(aten.t.default, (W,)))), {"W"}),
        (EDITS["gain"], {"W", "g"}),
        (EDITS["gain"], {"g"}),
        (Apply(aten.add.Tensor, (W, Apply(aten.neg.default, (W,)))), {"W"}),
    ],
)
def test_what_cannot_be_solved_is_said(expression: Apply, wanted: set[str]) -> None:
    with pytest.raises(NoInverseError):
        solve(expression, evaluate(expression, LEAVES.__getitem__) + 1, frozenset(wanted), LEAVES)


# -- every rewrite ---------------------------------------------------------------------------------------------

for module in pkgutil.walk_packages(tautomer.passes.__path__, "tautomer.passes."):
    importlib.import_module(module.name)


def kinds(base: type[Rule]) -> Iterator[type[Rule]]:
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind):
            yield kind
        yield from kinds(kind)


RULES = sorted({rule for rule in kinds(Rule) if rule.__module__.startswith("tautomer.passes.")}, key=lambda r: r.name)
HAS_NO_INVERSE = {"fold-norm-shift": "W c alone is the bias of a layer that had none", "layer-norm-to-rms-norm": "a mean is lost"}


def returns(weights: Weights, state: dict[str, torch.Tensor]) -> None:
    """from_original(to_original(state)) is state."""
    again = weights.from_original(weights.to_original(state))
    assert set(again) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(again[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_state_dict_of_any_rewritten_program_has_an_original(rule: type[Rule]) -> None:
    for sample in rule().samples():
        program = next(spellings(rule(), sample))
        rule().run(program, Context())
        DropUnusedWeights().run(program, Context())
        NameWeights().run(program, Context())
        weights = program.weights
        state = dict(weights.from_original(weights.leaves))
        returns(weights, state)
        trained = {name: value + torch.randn_like(value) if value.is_floating_point() else value for name, value in state.items()}
        try:
            returns(weights, trained)
        except UsageError as error:
            assert rule().name in HAS_NO_INVERSE and "has no original any more" in str(error)


# -- whole models ----------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    """Two blocks with LayerNorm, LayerScale and a scaled residual, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.up, self.down = nn.ModuleList(nn.Linear(8, 12) for _ in range(2)), nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(8, 12, bias=False) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        for norm, up, gate, down in zip(self.norms, self.up, self.gates, self.down, strict=True):
            y = norm(x) / 2**0.5
            x = x + 0.5 * (down(up(y).tanh() * gate(y)) * self.scale)
        return self.head(x.tanh())


IDS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))


def trained(module: nn.Module, steps: int = 5) -> nn.Module:
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(module(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return module


def test_a_model_trained_after_the_folds_goes_back_to_its_own_class() -> None:
    model = PreNorm().double().eval()
    fast = tautomer.optimize(model, (IDS,), passes=["fold-into-writer", "fold-norm-scale", "fold-residual-scale", *CLEANUP])
    assert fast.report.fired("fold-into-writer") and fast.report.fired("fold-norm-scale")
    trained(fast)
    twin = PreNorm().double().eval()
    twin.load_state_dict(fast.weights.to_original(fast.state_dict()))
    torch.testing.assert_close(twin(IDS), fast(IDS), rtol=1e-12, atol=1e-12)
    assert twin.head.weight is twin.table.weight


def test_gains_in_the_readers_go_back_where_they_are_not_zero() -> None:
    model = PreNorm().double().eval()
    for gate in model.gates:
        gate.bias = nn.Parameter(torch.randn(12, dtype=torch.float64))
    fast = tautomer.optimize(model, (IDS,), passes=["fold-norm-gain", *CLEANUP])
    assert fast.report.fired("fold-norm-gain") == 0, "the scale by a number is no obstacle to a gain, but to a shift"
    fast = tautomer.optimize(model, (IDS,), passes=["fold-norm-scale", "fold-norm-gain", *CLEANUP])
    assert fast.report.fired("fold-norm-gain") == 2
    trained(fast)
    state = fast.weights.to_original(fast.state_dict())
    torch.testing.assert_close(fast.weights.from_original(state), fast.state_dict(), rtol=1e-10, atol=1e-10)
    model.load_state_dict(state)
    torch.testing.assert_close(model(IDS), fast(IDS), rtol=1e-10, atol=1e-10)


def test_a_bias_that_the_original_has_not_is_named() -> None:
    fast = tautomer.optimize(PreNorm().double().eval(), (IDS,), passes=["fold-norm-scale", "fold-norm-gain", *CLEANUP])
    fast.weights.to_original(fast.state_dict())
    with pytest.raises(UsageError, match=r"'gates.\d.bias' has no original any more"):
        fast.weights.to_original(trained(fast).state_dict())


def test_a_zero_gain_is_an_origin_until_training_moves_its_column() -> None:
    model = PreNorm().double().eval()
    model.norms = nn.ModuleList(nn.RMSNorm(8).double() for _ in range(2))
    with torch.no_grad():
        model.norms[0].weight[3] = 0.0
    fast = tautomer.optimize(model, (IDS,), passes=["fold-norm-scale", "fold-norm-gain", *CLEANUP])
    back = fast.weights.to_original(fast.state_dict())
    torch.testing.assert_close(back["up.0.weight"], model.up[0].weight, rtol=1e-12, atol=1e-12)
    with pytest.raises(UsageError, match=r"'(up|gates).0.weight' has no original any more"):
        fast.weights.to_original(trained(fast).state_dict())


def test_a_centred_matrix_is_its_own_origin_until_training_moves_its_mean() -> None:
    class Stream(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.LayerNorm(8)

        def forward(self, ids: torch.Tensor) -> Any:
            x = self.table(ids)
            for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
                x = x + down(up(norm(x)).tanh())
            return self.up[0](self.last(x))

    model = Stream().double().eval()
    fast = tautomer.optimize(model, (IDS,), passes=["layer-norm-to-rms-norm", *CLEANUP])
    assert fast.report.fired("layer-norm-to-rms-norm") == 3
    before = fast(IDS)
    state = fast.weights.to_original(fast.state_dict())
    assert state["down.0.weight"].mean(0).abs().max() < 1e-15
    model.load_state_dict(state)
    torch.testing.assert_close(model(IDS), before, rtol=1e-12, atol=1e-12)
    with pytest.raises(UsageError, match="has no original any more"):
        fast.weights.to_original(trained(fast).state_dict())


def test_a_weight_that_is_missing_is_named() -> None:
    fast = tautomer.optimize(PreNorm().eval(), (IDS,), passes=["fold-into-writer", *CLEANUP])
    with pytest.raises(UsageError, match=r"the state dict has no 'up.0.weight'"):
        fast.weights.to_original({name: value for name, value in fast.state_dict().items() if name != "up.0.weight"})


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_returns_up_to_its_own_rounding(half: torch.dtype) -> None:
    fast = tautomer.optimize(PreNorm().to(half).eval(), (IDS,), passes=[kind() for kind in (*NORM, *CLEANUP)])
    again = fast.weights.from_original(fast.weights.to_original(fast.state_dict()))
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=4 * torch.finfo(half).eps, atol=4 * torch.finfo(half).eps)


class Streamed(nn.Module):
    """Two blocks whose stream has all its writers and readers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.last = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False), nn.LayerNorm(8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.up, self.down = nn.ModuleList(nn.Linear(8, 12) for _ in range(2)), nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(up(norm(x)).tanh())
        return self.head(self.last(x))


@pytest.mark.parametrize("name", ["layer-norm-to-crms-norm", "layer-norm-to-narrow-rms-norm"])
def test_a_narrow_stream_goes_back_to_the_nearest_wide_one(name: str) -> None:
    model = Streamed().double().eval()
    for module in (*model.norms, model.last):
        nn.init.zeros_(module.bias)  # the head has no bias to take it
        module.bias.requires_grad_(False)
    fast = tautomer.optimize(model, (IDS,), passes=[name, *CLEANUP])
    assert fast.report.fired(name) == 3
    generator = torch.Generator().manual_seed(1)
    state = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in fast.state_dict().items()}
    state = {key: fast.state_dict()[key] if key == "head.bias" else value for key, value in state.items()}
    returns(fast.weights, state)
    fast.load_state_dict(fast.own(state))
    model.load_state_dict(fast.weights.to_original(state))
    torch.testing.assert_close(model(IDS), fast(IDS), rtol=1e-10, atol=1e-10)


def conv(norm_first: bool = False) -> nn.Module:
    layers = [nn.Conv2d(4, 4, 3, groups=2, bias=norm_first), nn.BatchNorm2d(4)]
    return nn.Sequential(*(reversed(layers) if norm_first else layers))


STATISTICS = {
    "after a convolution": lambda: conv(),
    "before a convolution": lambda: conv(norm_first=True),
    "after a transposed convolution": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "after a linear layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 25, 6), nn.BatchNorm1d(6)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_folded_statistics_stay_and_the_layer_takes_what_was_learnt(name: str) -> None:
    model, x = STATISTICS[name]().double().eval(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.uniform_(0.2, 1.5)
    fast = tautomer.optimize(model, (x,))
    assert fast.report.after.ops.get("aten.batch_norm", 0) == fast.report.after.ops.get("aten._weight_norm", 0) == 0
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in fast.state_dict().items()}
    returns(fast.weights, state)
    fast.load_state_dict(fast.own(state))
    original = fast.weights.to_original(state)
    for key, value in model.state_dict().items():
        assert "running" not in key or torch.equal(original[key], value)
    model.load_state_dict(original)
    torch.testing.assert_close(model(x), fast(x), rtol=1e-10, atol=1e-10)


def test_a_spectral_norm_of_another_matrix_has_no_original() -> None:
    """W / (uᵀ W v) with the stored u and v is W' only where uᵀ W' v = 1."""
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)).double().eval()
    fast = tautomer.optimize(model, (torch.randn(3, 8, dtype=torch.float64),))
    state = fast.state_dict()
    returns(fast.weights, state)
    with pytest.raises(UsageError, match="has no original any more"):
        fast.weights.to_original({key: value + 0.1 for key, value in state.items()})
