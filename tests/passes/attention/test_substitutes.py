"""What holds for every form that stands for softmax attention; a new method adds a line to METHODS and to CASES."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.substitutes import METHODS
from tautomer.passes.attention.transfer import Transfer
from tautomer.rewrite.attentions import Masking

CASES: dict[str, dict[str, Any]] = {
    "window": {"window": 3, "sinks": 1},
    "window-mask": {"window": 3, "sinks": 1},
    "loki": {"keys": 3, "rank": 2},
    "hyper": {"block": 2, "samples": 3, "leaf": 4, "longest": 16},
    "nystrom": {"landmarks": 4},
    "linformer": {"slots": 4, "longest": 16, "transfer": Transfer(steps=1)},
    "kernel": {"chunk": 4, "diagonal": 5, "transfer": Transfer(steps=1)},
    "hybrid": {"window": 3, "transfer": Transfer(steps=1)},
    "gated": {"window": 3, "chunk": 4, "architecture": True},
    "ponet": {"segments": 5, "transfer": Transfer(steps=1)},
    "poolformer": {"grid": (), "architecture": True},
    "qknorm": {"transfer": Transfer(steps=1)},
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
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, : length // 3] = 0
    return {"tokens": tokens, "attention_mask": mask if left else mask.flip(1)}


@lru_cache
def substituted(name: str) -> Any:
    """The model in its new form, in float64."""
    torch.manual_seed(3)
    model, data = Attention(name in CAUSAL).double().eval(), [call() for _ in range(2)]
    fast = tautomer.optimize(model, (), data[0], passes=[METHODS[name](**CASES[name])], data=data)
    assert fast.report.fired(METHODS[name].name) == 2, str(fast.report)
    assert all("off by" in application.note for application in fast.report.applications)
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
    fast, given = substituted(name), call(padded=False)
    wanted = fast(**given)
    for position in (LENGTH - 1, 7, 5, 2):
        tokens = given["tokens"].clone()
        tokens[:, position] = (tokens[:, position] + 1) % 11
        moved = (fast(**{**given, "tokens": tokens}) - wanted).abs().amax((0, 2))
        assert moved[position] > 1e-3
        assert bool((moved[:position] < 1e-10).all())


@pytest.mark.parametrize("name", CASES)
def test_lengths_are_free_and_every_parameter_gets_a_gradient(name: str) -> None:
    fast = copy.deepcopy(substituted(name))
    for batch, length in ((1, 1), (3, 7), (1, 16)):
        given = call(batch, length)
        fast(**given)[given["attention_mask"].bool()].square().sum().backward()
    gradients = [parameter.grad for parameter in fast.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_has_the_errors_of_attention(name: str, dtype: torch.dtype) -> None:
    fast, given = substituted(name), call(length=4 if name in ("hyper", "loki") else LENGTH)
    # Of four positions hashes and the best keys decide little: what is rounded chooses others, which is no error of the form.
    wanted, y, keep = fast(**given), copy.deepcopy(fast).to(dtype)(**given), given["attention_mask"].bool()
    assert y.dtype == dtype
    assert (y.double() - wanted)[keep].norm() < 4 * torch.finfo(dtype).eps * wanted[keep].norm()


@pytest.mark.zoo  # an export takes seconds
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("window-mask", "qknorm")])
def test_it_runs_on_onnx_runtime_at_other_sizes(name: str, tmp_path: Path) -> None:
    fast, path = copy.deepcopy(substituted(name)).float(), tmp_path / "model.onnx"
    tautomer.export_onnx(fast, path, (), call(), check=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, length in ((1, 4), (3, 9), (2, 16)):
        given = call(batch, length)
        keep = given["attention_mask"].bool()
        fed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), given.values(), strict=True)}
        torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0])[keep], fast(**given)[keep], rtol=1e-4, atol=1e-4)
