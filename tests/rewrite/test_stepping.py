"""Position by position a program is the program: every token, in float64, past every window; what has no steps is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.models import ZOO

import tautomer
from tautomer.passes.attention.feature_maps import Elu, Relu
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.evidence import FORWARD, relative_error
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.stepping import Stepping, check_stepping, stepping

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("window", {"window": 5, "sinks": 2}),
    "kernel": ("kernel", {"chunk": 4, "architecture": True}),
    "kernel and blocks": ("kernel", {"feature_map": Elu(), "chunk": 4, "diagonal": 3, "architecture": True}),
    "hybrid": ("hybrid", {"window": 3, "feature_map": Relu(5), "architecture": True}),
    "gated": ("gated", {"window": 4, "chunk": 4, "architecture": True}),
    "one layer": ("window", {"window": 5, "sinks": 0, "layers": [1]}),
}
RECIPES: dict[str, Callable[[], Any]] = {
    name: partial(tautomer.LongContext, method, **options) for name, (method, options) in CASES.items()
}
LENGTH = 21


def every_token(form: Stepping, tokens: Tensor, known: int) -> float:
    """The worst error of any logits, in float64, and the last ones of which the first ``known`` positions were there at once."""
    with torch.no_grad():
        wanted = interpret(form.program, form.flat(tokens), dtype=torch.float64)[form.logits]
        found, *state = interpret(form.prefill, form.flat(tokens[:, :known]), dtype=torch.float64)
        rows = [found]
        for t in range(known, tokens.shape[1]):
            found, *state = interpret(form.step, (*form.flat(tokens[:, t : t + 1]), torch.tensor(t), *state), dtype=torch.float64)
            rows.append(found)
    return relative_error(torch.cat(rows, 1), wanted)


USUAL = {("gpt2", "window"), ("llama", "kernel and blocks"), ("llama", "hybrid"), ("gpt2", "one layer"), ("llama", "gated")}
EVERY = [(family, case) for family in ("gpt2", "llama") for case in RECIPES]
PAIRS = [pytest.param(*pair, marks=[] if pair in USUAL else [pytest.mark.zoo]) for pair in EVERY]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_every_token_is_that_of_the_whole(family: str, case: str) -> None:
    model, call = ZOO[family]()
    fast = tautomer.optimize(model, (), call, recipe=RECIPES[case](), check=False)
    assert fast.report.applications
    form, tokens = stepping(fast.program), torch.randint(3, 99, (3, LENGTH))
    for known in (1, 12):
        assert every_token(form, tokens, known) <= FORWARD
    assert len(form.grows) == (case == "one layer")


@pytest.mark.zoo
@pytest.mark.parametrize("family", ["opt", "neox", "gptj", "falcon", "phi", "starcoder2", "gemma"])
def test_other_families_are_stepped(family: str) -> None:
    model, call = ZOO[family]()
    for case in ("window", "hybrid"):
        fast = tautomer.optimize(model, (), call, recipe=RECIPES[case](), check=False)
        assert every_token(stepping(fast.program), torch.randint(3, 99, (2, LENGTH)), 4) <= FORWARD


class Model(nn.Module):
    """A layer of attention, and what a subclass makes of its positions and values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.head = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 11)
        self.register_buffer("waves", torch.randn(30, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.prepared(ids)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(x + y.transpose(1, 2).flatten(2))

    causal = True

    def prepared(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Sliced(Model):
    def prepared(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.waves[2 : ids.shape[1] + 2]


class Summed(Model):
    def prepared(self, ids: Tensor) -> Tensor:
        at = torch.ones_like(ids).cumsum(1) - 1
        turned = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * torch.arange(8)
        return self.table(ids) + self.waves[at] + turned.sin()


class Mean(Model):
    def prepared(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return x + x.cumsum(1)


class Counted(Model):
    def prepared(self, ids: Tensor) -> Tensor:
        return self.table(ids) / ids.shape[1]


class Open(Model):
    causal = False


class Last(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[:, -1]


class Headless(Model):
    """As a BERT without a head: two tensors, neither of them logits."""

    def forward(self, ids: Tensor) -> Any:
        y = super().forward(ids)
        return y, y[:, 0].tanh()


IDS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))


def window(model: nn.Module, **options: Any) -> Any:
    return tautomer.optimize(
        model.eval(), (IDS,), recipe=tautomer.LongContext("window", window=4, sinks=1), check=False, **options
    )


@pytest.mark.parametrize("kind", [Model, Sliced, Summed])
def test_positions_are_counted_on_however_they_are_counted(kind: type[Model]) -> None:
    form = stepping(window(kind()).program)
    assert every_token(form, torch.randint(11, (2, 25)), 3) <= FORWARD
    assert check_stepping(form) == ("1 + 2", "5 + 2", "7 + 2")


def test_what_a_position_takes_from_others_is_named() -> None:
    with pytest.raises(UsageError, match=r"aten\.cumsum at a position depends on others") as error:
        check_stepping(stepping(window(Mean()).program))
    assert "test_stepping.py" in str(error.value)
    with pytest.raises(UsageError, match="depends on how many there are"):
        check_stepping(stepping(window(Counted()).program))


def test_an_unmoved_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tautomer.rewrite.stepping._counted", lambda program, time: iter(()))
    with pytest.raises(UsageError, match="depends on others"):
        check_stepping(stepping(window(Sliced()).program))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "loki": (lambda: recipe(Model(), "loki", keys=3, rank=2, data=[IDS]), "none may be forgotten"),
    "hyper": (lambda: recipe(Model(), "hyper", block=2, samples=2, leaf=2), "depends on how all of them hash"),
    "nystrom": (lambda: recipe(Open(), "nystrom", landmarks=3), "it is not causal"),
    "not causal": (lambda: window(Open()), "it is not causal"),
    "terraced": (lambda: recipe(Model(), "hybrid", window=3, terraced=True, architecture=True), "terraced=False"),
    "fixed": (lambda: window(Model(), dynamic_shapes="static"), "it was captured for 9 positions"),
    "no row per position": (lambda: window(Last()), "has not one row per position.*\n.*no logits_to_keep"),
    "no logits": (lambda: window(Headless()), "returns 2 tensors, and none of them is called logits\n.*a model with a head"),
    "no attention": (lambda: tautomer.optimize(nn.Embedding(11, 4).eval(), (IDS,)), "it has no attention"),
}


def recipe(model: nn.Module, method: str, data: Any = None, **options: Any) -> Any:
    return tautomer.optimize(model.eval(), (IDS,), recipe=tautomer.LongContext(method, **options), data=data, check=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_state_is_refused_with_a_sentence(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(UsageError, match=sentence):
        stepping(make().program)


class Masked(Model):
    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(self.table(ids)).chunk(3, -1))
        at = torch.arange(ids.shape[1])
        y = F.scaled_dot_product_attention(q, k, v, (at <= at[:, None]) & keep[:, None, None])
        return self.head(y.transpose(1, 2).flatten(2))


class Twice(Model):
    def forward(self, ids: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids) + self.head(self.table(more))


SECOND = [
    (Masked, IDS > 2, "it reads a mask over all positions"),
    (Twice, IDS, "it reads ids and more, and a step has nothing but"),
]


@pytest.mark.parametrize(("kind", "other", "sentence"), SECOND)
def test_a_second_sequence_is_refused(kind: type[Model], other: Tensor, sentence: str) -> None:
    recipe = tautomer.LongContext("window", window=4)
    fast = tautomer.optimize(kind().eval(), (IDS, other), recipe=recipe, check=False)
    with pytest.raises(UsageError, match=sentence):
        stepping(fast.program)
