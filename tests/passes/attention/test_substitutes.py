"""What holds for every form that stands for softmax attention; a new method adds a line to METHODS and to CASES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.substitutes import METHODS
from tautomer.passes.recipes import LongContext
from tautomer.rewrite.attentions import Masking

CASES: dict[str, dict[str, Any]] = {
    "window": {"window": 3, "sinks": 1},
    "window-mask": {"window": 3, "sinks": 1},
    "loki": {"keys": 3, "rank": 2},
    "hyper": {"block": 2, "samples": 3, "leaf": 2, "longest": 32},
    "nystrom": {"landmarks": 4},
    "linformer": {"slots": 4, "longest": 24},
}
"""Options with which a sequence of 13 is long, and blocks, segments and leaves do not divide it."""
CAUSAL = [name for name in CASES if Masking.CAUSAL in METHODS[name].represents]
LENGTH = 13


class Attention(nn.Module):
    """Two layers of grouped heads, four of q and two of k and v, over padded tokens."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(16, 32), "out": nn.Linear(16, 16)}) for _ in range(2))
        self.causal = causal

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, at = self.table(tokens), torch.arange(tokens.shape[1])
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        if self.causal:
            below = at <= at[:, None]
            mask = below if mask is None else mask & below
        for layer in self.layers:
            q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in layer["qkv"](x).split([16, 8, 8], -1))
            y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            x = x + layer["out"](y.transpose(1, 2).flatten(2))
        return x


def call(batch: int = 2, length: int = LENGTH, padded: bool = True, left: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(11, (batch, length))
    if not padded:
        return {"tokens": tokens}
    mask = torch.ones_like(tokens)
    mask[0, : length // 3] = 0
    return {"tokens": tokens, "attention_mask": mask if left else mask.flip(1)}


def substituted(name: str, padded: bool = True, dtype: torch.dtype = torch.float64, train: bool = False) -> Any:
    torch.manual_seed(3)
    model, data = Attention(name in CAUSAL).to(dtype).train(train), [call(padded=padded) for _ in range(2)]
    fast = tautomer.optimize(model, (), data[0], recipe=LongContext(name, **CASES[name]), data=data)
    assert fast.report.fired(METHODS[name].name) == 2, str(fast.report)
    return fast


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing_and_a_sample_knows_nothing_of_its_batch(name: str) -> None:
    fast = substituted(name)
    for left in (False, True):
        given = call(left=left)
        keep = given["attention_mask"].bool()
        wanted = fast(**given)
        other = {**given, "tokens": torch.where(keep, given["tokens"], (given["tokens"] + 3) % 11)}
        torch.testing.assert_close(fast(**other)[keep], wanted[keep], rtol=1e-10, atol=1e-10)
        swapped = fast(**{key: value.flip(0) for key, value in given.items()})
        torch.testing.assert_close(swapped.flip(0)[keep], wanted[keep], rtol=1e-10, atol=1e-10)
        assert wanted.isfinite().all()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_changes_nothing(name: str) -> None:
    fast, given = substituted(name, padded=False), call(padded=False)
    wanted = fast(**given)
    for position in (LENGTH - 1, 5, 2):
        tokens = given["tokens"].clone()
        tokens[:, position] = (tokens[:, position] + 1) % 11
        moved = (fast(tokens) - wanted).abs().amax((0, 2))
        assert moved[position] > 1e-3
        assert bool((moved[:position] < 1e-10).all())


@pytest.mark.parametrize("name", CASES)
def test_lengths_and_gradients_are_free(name: str) -> None:
    fast = substituted(name, train=True)
    for batch, length in ((1, 1), (3, 7), (1, 16), (2, 24)):
        given = call(batch, length)
        y = fast(**given)
        y[given["attention_mask"].bool()].square().sum().backward()
    gradients = [parameter.grad for parameter in fast.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_no_worse_than_a_few_roundings(name: str, dtype: torch.dtype) -> None:
    # What is rounded may hash to another block, and other keys be the best: here all are seen, and few are left to hashes.
    options = {**CASES[name], **{"hyper": {"block": 64}, "loki": {"keys": 64}}.get(name, {})}
    torch.manual_seed(3)
    model, given = Attention(name in CAUSAL).to(dtype).eval(), call()
    fast = tautomer.optimize(model, (), given, recipe=LongContext(name, **options), data=[given])
    wide = tautomer.optimize(model.double(), (), given, recipe=LongContext(name, **options), data=[given])
    y, wanted, keep = fast(**given), wide(**given), given["attention_mask"].bool()
    assert y.dtype == dtype
    error = (y.double() - wanted)[keep].norm() / wanted[keep].norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_onnx_runtime_at_other_sizes(name: str, tmp_path: Any) -> None:
    fast = substituted(name, dtype=torch.float32)
    path = tmp_path / "model.onnx"
    tautomer.export_onnx(fast, path, (), call())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 4), (3, 9), (2, 24)):
        given = call(batch, length)
        keep = given["attention_mask"].bool()
        names = [entry.name for entry in session.get_inputs()]
        (found, *_) = session.run(None, dict(zip(names, (x.numpy() for x in given.values()), strict=True)))
        torch.testing.assert_close(torch.from_numpy(found)[keep], fast(**given)[keep], rtol=1e-4, atol=1e-4)


EXACT: dict[str, Callable[[int], dict[str, Any]]] = {
    "window": lambda n: {"window": n, "sinks": 2},
    "window-mask": lambda n: {"window": n, "sinks": 0},
    "loki": lambda n: {"keys": n, "rank": 1},
    "hyper": lambda n: {"block": n, "leaf": 2},
    "nystrom": lambda n: {"landmarks": n},
}
"""Options with which n positions attend exactly."""


@pytest.mark.parametrize("name", EXACT)
def test_it_is_attention_in_its_limit(name: str) -> None:
    model, given = Attention(name in CAUSAL).double().eval(), call()
    fast = tautomer.optimize(model, (), given, recipe=LongContext(name, **EXACT[name](LENGTH)), data=[given])
    assert fast.report.fired(METHODS[name].name) == 2
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(fast(**given)[keep], model(**given)[keep], rtol=1e-11, atol=1e-11)
    assert any("off by" in application.note for application in fast.report.applications)
