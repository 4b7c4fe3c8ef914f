"""What treats heads and positions alike is done before they are exchanged, on the way to an attention and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.rewrite.library import tautomer as ops

aten = torch.ops.aten
X = torch.randn(2, 5, 4, 8)


def exchanged(f: Callable[[Tensor], Tensor], attends: bool = True) -> tuple[list[str], int, str]:
    """The calls of f(transpose(x)) on the way to an attention, how often it fired, and what was refused."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = f(x.transpose(1, 2))
            return F.scaled_dot_product_attention(y, y, y).transpose(-3, -2) if attends else y.exp()

    model = Model().eval()
    fast = tautomer.optimize(model, (X,), passes=["move-transpose"])
    tautomer.verify(model, fast, (X,))
    calls = [str(node.target).split(".")[1] for node in fast.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    reasons = "\n".join(refusal.reason for refusal in fast.report.log.refusals)
    return [call for call in calls if call != "sym_size"], fast.report.fired("move-transpose"), reasons


def angles(shape: tuple[int, ...]) -> Tensor:
    return torch.linspace(0, 1, int(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (1, 5, 8), (2, 1, 5, 8), (4, 1, 8), (4, 5, 8)])
def test_a_rotary_embedding_turns_what_it_turned(shape: tuple[int, ...]) -> None:
    x, angle = torch.randn(2, 5, 4, 8, dtype=torch.float64), angles(shape).double()

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = ops.rotary.v1(x.transpose(1, 2), angle.cos(), angle.sin())
            return F.scaled_dot_product_attention(y, y, x.transpose(1, 2)).transpose(1, 2)

    fast = tautomer.optimize(Model().eval(), (x,), passes=["move-transpose"], dynamic_shapes="static")
    assert fast.report.fired("move-transpose") == 1
    (turned,) = fast.graph.find_nodes(op="call_function", target=ops.rotary.v1)
    assert turned.args[0].op == "placeholder"
    torch.testing.assert_close(fast(x), Model()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda y: F.rms_norm(y, [8]), "rms_norm"),
        (lambda y: F.layer_norm(y, [8], torch.arange(8.0), torch.ones(8)), "layer_norm"),
        (lambda y: ops.normalize.v1(y), "normalize"),
        (lambda y: y.double(), "to"),
    ],
)
def test_a_norm_of_each_head_and_a_cast(f: Callable[[Tensor], Tensor], name: str) -> None:
    calls, fired, _ = exchanged(f)
    assert fired == 1 and calls.index(name) < calls.index("transpose")


def test_several_in_a_row() -> None:
    calls, fired, _ = exchanged(lambda y: F.rms_norm(ops.normalize.v1(y), [8]))
    assert fired == 2 and calls[:3] == ["normalize", "rms_norm", "transpose"]


def test_a_norm_over_positions_too_is_refused() -> None:
    calls, fired, refused = exchanged(lambda y: F.layer_norm(y, [5, 8]))
    assert fired == 0 and "the norm is over heads or positions too" in refused and calls[0] == "transpose"


def test_without_an_attention_nothing_moves() -> None:
    assert exchanged(lambda y: F.rms_norm(y, [8]), attends=False)[1] == 0


def test_a_batch_that_is_added_and_taken_away() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(0, 1).unsqueeze(0)
            return F.scaled_dot_product_attention(y, y, y).squeeze(0).transpose(0, 1).flatten(1)

    model = Model().eval()
    fast = tautomer.optimize(model, (X[0],), passes=["move-transpose", "pack-attention", "merge-views"], dynamic_shapes="static")
    assert fast.report.fired("pack-attention") == 1
    assert not fast.graph.find_nodes(op="call_function", target=aten.transpose.int)
    torch.testing.assert_close(fast(X[0]), model(X[0]), rtol=1e-5, atol=1e-6)


def test_an_axis_added_elsewhere_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(0, 1).unsqueeze(1)
            return F.scaled_dot_product_attention(y, y, y)

    fast = tautomer.optimize(Model().eval(), (X[0],), passes=["move-transpose"])
    assert any("the new axis is not the first" in refusal.reason for refusal in fast.report.log.refusals)
