"""Our own ops: what they compute, that they survive export and compilation, and that a body changes only with its version."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama

from tautomer.rewrite._torch import short_bodies
from tautomer.rewrite.library import SEMANTIC, tautomer

BODIES = {
    "crms_norm.v1": "bbcf8e02bfc4",
    "add_layer_norm.v1": "dd94e88a6505",
    "add_rms_norm.v1": "e5987813643f",
    "quick_gelu.v1": "ee4d4ea9a61e",
    "glu.v1": "172b445a405d",
    "rotary.v1": "a0afd8bf4095",
    "normalize.v1": "e21d0718fe1b",
    "packed_attention.v1": "153214808a60",
    "cached_attention.v1": "0ae929cbd774",
    "block_linear.v1": "3fde3f379185",
    "kernel_attention.v1": "21d0cde54a7e",
    "kernel_attention_step.v1": "70caf5aa3190",
    "hybrid_attention.v1": "75975b819e2e",
    "hybrid_attention_step.v1": "3025f17e2141",
    "kernel_attention_state.v1": "681a8a75f7e1",
    "hybrid_attention_state.v1": "7cfac5ce6e1c",
    "window_attention_state.v1": "834e983a049d",
    "window_attention_step.v1": "44f555093f54",
    "block_attention.v1": "011795f0a924",
    "window_attention.v1": "b43df3cff065",
    "top_attention.v1": "7ed06fe4d711",
    "hyper_attention.v3": "6ac8d9d84123",
    "nystrom_attention.v1": "065fcc6955d7",
    "linformer_attention.v1": "25c016f1c07b",
    "ponet_attention.v1": "11a1ea1c72c1",
    "poolformer_attention.v1": "b9e8bd5247fc",
}
"""torch.compile's disk cache knows an op by its name: if a hash here is wrong, give the op the next version."""


@pytest.mark.parametrize("op", SEMANTIC, ids=lambda op: op.name)
def test_a_body_changes_only_with_its_version(op: Any) -> None:
    assert BODIES.get(op.name) == sha256("".join(op.sources).encode()).hexdigest()[:12]


def test_every_op_is_listed() -> None:
    assert set(BODIES) == {op.name for op in SEMANTIC}


def test_crms_norm_is_the_rms_norm_of_the_whole_vector() -> None:
    x, g = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    wanted = F.rms_norm(whole, [8], eps=1e-2)[..., :-1] * g
    torch.testing.assert_close(tautomer.crms_norm.v1(x, g, 1e-2), wanted, rtol=1e-14, atol=1e-14)


def test_crms_norm_sums_half_precision_in_single() -> None:
    x = torch.full((1, 511), 300.0, dtype=torch.float16)
    assert torch.isfinite(tautomer.crms_norm.v1(x)).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_sum_returns_the_norm_and_the_sum(bias: bool) -> None:
    x, r, g, b = (torch.randn(n, dtype=torch.float64) for n in ((2, 8), (2, 8), (8,), (8,)))
    normed, total = tautomer.add_layer_norm.v1(x, r, [8], g, b if bias else None, 1e-3)
    assert torch.equal(total, x + r)
    assert torch.equal(normed, F.layer_norm(x + r, [8], g, b if bias else None, 1e-3))
    normed, total = tautomer.add_rms_norm.v1(x, r, [8], g, 1e-3)
    assert torch.equal(total, x + r)
    assert torch.equal(normed, F.rms_norm(x + r, [8], g, 1e-3))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": tautomer.quick_gelu.v1,
}


@pytest.mark.parametrize(("name", "activation"), ACTIVATIONS.items(), ids=ACTIVATIONS)
def test_a_gated_unit_is_an_activation_times_a_tensor(name: str, activation: Callable[[Tensor], Tensor]) -> None:
    gate, up = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(tautomer.glu.v1(gate, up, name), activation(gate) * up)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="no activation 'swish'"):
        tautomer.glu.v1(torch.ones(2), torch.ones(2), "swish")


def test_quick_gelu_is_that_of_transformers() -> None:
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(tautomer.quick_gelu.v1(x), ACT2FN["quick_gelu"](x))


def test_normalize_is_that_of_torch() -> None:
    x = torch.cat([torch.randn(3, 5), torch.zeros(1, 5)])
    assert torch.equal(tautomer.normalize.v1(x), F.normalize(x, dim=-1))
    assert torch.equal(tautomer.normalize.v1(x, 10.0), x / 10)


def angles(length: int, width: int) -> Tensor:
    return torch.arange(length)[:, None] * 0.3 ** torch.arange(width // 2, dtype=torch.float64)


@pytest.mark.parametrize("heads_first", [True, False])
def test_rotary_is_that_of_llama_with_heads_before_or_after_positions(heads_first: bool) -> None:
    cos, sin = (torch.cat([f(angles(5, 8))] * 2, -1)[None] for f in (torch.cos, torch.sin))
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64) if heads_first else torch.randn(2, 5, 3, 8, dtype=torch.float64)
    axis = 1 if heads_first else 2
    wanted, _ = llama.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=axis)
    assert torch.equal(tautomer.rotary.v1(q, cos.unsqueeze(axis), sin.unsqueeze(axis)), wanted)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [6, 10])
def test_rotary_turns_pairs_of_the_first_channels_in_the_plane(interleaved: bool, width: int) -> None:
    x, turn = torch.randn(2, 3, 5, width, dtype=torch.float64), angles(5, 6)
    both = turn.repeat_interleave(2, -1) if interleaved else torch.cat([turn, turn], -1)
    y = tautomer.rotary.v1(x, both.cos(), both.sin(), interleaved)
    a, b = ((0, 2, 4), (1, 3, 5)) if interleaved else ((0, 1, 2), (3, 4, 5))
    wanted = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(5, 3, dtype=torch.float64), turn)
    torch.testing.assert_close(torch.complex(y[..., a], y[..., b]), wanted, rtol=1e-14, atol=1e-14)
    assert torch.equal(y[..., 6:], x[..., 6:])


def apart(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def weighted(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attention written out, q and k per head, heads packed."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_is_attention_per_head(causal: bool) -> None:
    q, k, v = (torch.randn(2, 5, n, dtype=torch.float64) for n in (24, 12, 16))
    past = torch.randn(2, 2, 3, 6, dtype=torch.float64), torch.randn(2, 2, 3, 8, dtype=torch.float64)
    keep = torch.ones(5, 5, dtype=torch.bool).tril() if causal else torch.ones(5, 5, dtype=torch.bool)
    wanted = weighted(apart(q, 4), apart(k, 2), apart(v, 2), keep)
    found = tautomer.packed_attention.v1(q, k, v, None, 4, 2, causal, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    K, V = (torch.cat([old, apart(new, 2)], 2) for old, new in zip(past, (k, v), strict=True))
    keep = torch.cat([torch.ones(5, 3, dtype=torch.bool), keep], 1)
    found, *caches = tautomer.cached_attention.v1(q, k, v, *past, None, 4, 2, causal, 0.3)
    torch.testing.assert_close(found, weighted(apart(q, 4), K, V, keep), rtol=1e-13, atol=1e-13)
    assert torch.equal(caches[0], K) and torch.equal(caches[1], V)


def test_cached_attention_is_causal_or_takes_a_mask() -> None:
    q, past = torch.randn(1, 2, 8), torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="not both"):
        tautomer.cached_attention.v1(q, q, q, past, past, torch.ones(2, 5).bool(), 2, 2, True)


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[4, 8] → features of queries and keys, and values, of four heads, eight positions and one channel."""
    return x.exp().view(1, 4, 8, 1), x.cos().exp().view(1, 4, 8, 1), x.sin().view(1, 4, 8, 1)


def _step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(x)
    return q[:, :, :1], k[:, :, :1], v[:, :, :1]


@pytest.mark.parametrize("op", [op for op in SEMANTIC if op.fake], ids=lambda op: op.name)
def test_what_stands_for_a_body_has_its_shape_and_strides(op: Any) -> None:
    found = CALLS[op.name](torch.randn(4, 8, dtype=torch.float64))
    fake = op.fake(*heads(torch.randn(4, 8, dtype=torch.float64)))
    strides = ([stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in (found, fake))
    assert (found.shape, found.dtype, next(strides)) == (fake.shape, fake.dtype, next(strides))


def heads(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(y.view(1, 2, 8, 2) for y in (x, x.sin(), x.cos()))


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "crms_norm.v1": lambda x: tautomer.crms_norm.v1(x),
    "add_layer_norm.v1": lambda x: tautomer.add_layer_norm.v1(x, x.sin(), [8])[0],
    "add_rms_norm.v1": lambda x: tautomer.add_rms_norm.v1(x, x.sin(), [8])[1],
    "quick_gelu.v1": lambda x: tautomer.quick_gelu.v1(x),
    "glu.v1": lambda x: tautomer.glu.v1(x, x.sin(), "gelu_tanh"),
    "rotary.v1": lambda x: tautomer.rotary.v1(x, x[:1, :6].sin(), x[:1, :6].tanh(), True),
    "normalize.v1": lambda x: tautomer.normalize.v1(x),
    "packed_attention.v1": lambda x: tautomer.packed_attention.v1(x[None], x[None].sin(), x[None].cos(), None, 4, 4, True),
    "cached_attention.v1": lambda x: tautomer.cached_attention.v1(
        x[None], x[None].sin(), x[None].cos(), x.exp().view(1, 4, 4, 2), x.tanh().view(1, 4, 4, 2), None, 4, 4, True
    )[0],
    "block_linear.v1": lambda x: tautomer.block_linear.v1(x.view(4, 2, 4), x.tanh().view(2, 4, 4)),
    "kernel_attention.v1": lambda x: tautomer.kernel_attention.v1(
        *heads(x), -x.exp().view(1, 2, 8, 2), None, True, normalized=False, chunk=3
    ),
    "kernel_attention_step.v1": lambda x: tautomer.kernel_attention_step.v1(*_step(x), x[:, :2].reshape(1, 4, 1, 2))[0],
    "hybrid_attention.v1": lambda x: tautomer.hybrid_attention.v1(
        *heads(x), heads(x.square())[0], heads(x.exp())[0], x.sin()[:2, 0], 3
    ),
    "kernel_attention_state.v1": lambda x: tautomer.kernel_attention_state.v1(*heads(x), -x.exp().view(1, 2, 8, 2)),
    "hybrid_attention_state.v1": lambda x: tautomer.hybrid_attention_state.v1(*heads(x), heads(x.exp())[0], 3)[0],
    "window_attention_state.v1": lambda x: tautomer.window_attention_state.v1(*heads(x)[:2], 3, 1)[1],
    "window_attention_step.v1": lambda x: tautomer.window_attention_step.v1(*_step(x), *_heads(x)[:2], torch.tensor(9), 0.3, 1)[
        0
    ],
    "block_attention.v1": lambda x: tautomer.block_attention.v1(*heads(x), 3, True),
    "hybrid_attention_step.v1": lambda x: tautomer.hybrid_attention_step.v1(
        *_step(x), *_step(x)[:2], x.sin()[:, 0], x[:, :2].reshape(1, 4, 1, 2), *_heads(x), torch.tensor(9)
    )[0],
    "window_attention.v1": lambda x: tautomer.window_attention.v1(*heads(x), None, 0.3, 3, 1, True),
    "top_attention.v1": lambda x: tautomer.top_attention.v1(*heads(x), x[:1, :4].view(2, 2, 1), None, 0.3, 3, 0, True),
    "hyper_attention.v3": lambda x: tautomer.hyper_attention.v3(
        *heads(x), x[:2, :3], torch.arange(6).view(2, 3), None, 0.3, 2, 2, 16, True
    ),
    "nystrom_attention.v1": lambda x: tautomer.nystrom_attention.v1(*heads(x), None, 0.3, 3),
    "linformer_attention.v1": lambda x: tautomer.linformer_attention.v1(*heads(x), x.view(8, 4), x.sin().view(8, 4), None, 0.3),
    "ponet_attention.v1": lambda x: tautomer.ponet_attention.v1(*heads(x), heads(x.exp())[0], heads(x.tanh())[0], None, 3),
    "poolformer_attention.v1": lambda x: tautomer.poolformer_attention.v1(heads(x)[0], None),
}


def test_block_linear_is_the_product_with_a_block_diagonal_matrix() -> None:
    x, blocks = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    wanted = F.linear(x.flatten(-2), torch.block_diag(*blocks)).unflatten(-1, (3, 6))
    for layout in (x, x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        torch.testing.assert_close(tautomer.block_linear.v1(layout, blocks), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("op", SEMANTIC, ids=lambda op: op.name)
def test_an_op_survives_export_and_trains_exported_and_compiled(op: Any) -> None:
    module, x = Calls(CALLS[op.name]), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(module, (torch.randn(4, 8, dtype=torch.float64),))
    assert op.name in {str(node.target).removeprefix("tautomer.") for node in exported.graph.nodes}
    (wanted,) = torch.autograd.grad(module(x).square().sum(), x)
    for again in (exported.module(), torch.compile(module, fullgraph=True, backend="aot_eager")):
        (gradient,) = torch.autograd.grad(again(x).square().sum(), x)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_an_export_asks_for_shapes_and_the_body_is_not_run_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Window(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            y = tautomer.window_attention.v1(q, q, q, None, 0.5, 2)
            assert y.requires_grad == q.requires_grad
            return y * 2

    def run(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the body runs")

    monkeypatch.setattr(F, "scaled_dot_product_attention", run)
    for trains in (False, True):
        given, shapes = (torch.randn(2, 3, 7, 4, requires_grad=trains),), {"q": {0: Dim.AUTO, 2: Dim.AUTO}}
        with short_bodies():
            exported = torch.export.export(Window(), given, dynamic_shapes=shapes, strict=False)
        assert next(n.target for n in exported.graph.nodes if n.op == "call_function") is tautomer.window_attention.v1
    with pytest.raises(AssertionError, match="the body runs"):
        torch.export.export(Window(), given, dynamic_shapes=shapes, strict=False)
    with short_bodies(), pytest.raises(AssertionError, match="the body runs"):
        Window()(*given)
