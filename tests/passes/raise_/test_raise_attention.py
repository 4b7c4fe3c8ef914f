"""Attention as people write it in plain modules: every spelling is raised, every near miss is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.backends.to_torch import to_torch

X = torch.randn(2, 6, 32)


class NanoGPT(nn.Module):
    """The attention of nanoGPT without its fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(32, dim=2)
        k, q, v = (y.view(B, T, 4, C // 4).transpose(1, 2) for y in (k, q, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = self.dropout(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class ViT(nn.Module):
    """As in the first PyTorch ViT: q is scaled, qkv is one permuted tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4).unbind(0)
        attn = ((q * (C // 4) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class Llama(nn.Module):
    """Two key heads for four query heads, repeated; a mask from triu; a float32 softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, 8) for w in (self.wq, self.wk, self.wv))
        k, v = (y[:, :, :, None, :].expand(B, T, 2, 2, 8).reshape(B, T, 4, 8) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        mask = torch.triu(torch.full((T, T), float("-inf"), device=x.device), diagonal=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(8) + mask
        out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
        return self.wo(out.transpose(1, 2).contiguous().view(B, T, -1))


class T5(nn.Module):
    """No scale; a trained bias per distance and head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.bias = nn.Embedding(31, 4)

    def forward(self, x):
        T = x.shape[1]
        q, k, v = (w(x).view(x.shape[0], -1, 4, 8).transpose(1, 2) for w in (self.q, self.k, self.v))
        distance = torch.arange(T)[None, :] - torch.arange(T)[:, None] + 15
        scores = torch.matmul(q, k.transpose(3, 2)) + self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        return torch.matmul(F.softmax(scores, dim=-1), v)


@pytest.mark.parametrize(
    ("model", "causal", "scale"), [(NanoGPT, True, 8**-0.5), (ViT, False, 8**-0.5), (Llama, True, 8**-0.5), (T5, False, 1.0)]
)
def test_models_written_by_hand(raised, model, causal, scale):
    done = raised(model(), X)
    ((mask, is_causal, factor),) = done.attentions
    assert is_causal is causal and factor == pytest.approx(scale, rel=1e-15)
    assert (mask is not None) is (model is T5)
    assert done.count("softmax") == 0


def mix(weights, v):
    return weights.softmax(-1) @ v


SPELLINGS = {
    "scores divided": lambda q, k, v, b: mix(q @ k.transpose(-1, -2) / 3.0, v),
    "scores times a number": lambda q, k, v, b: mix(0.4 * (q @ k.mT), v),
    "no scale": lambda q, k, v, b: mix(q @ k.transpose(2, 3), v),
    "q scaled": lambda q, k, v, b: mix((q * 0.4) @ k.transpose(-1, -2), v),
    "k divided": lambda q, k, v, b: mix(q @ (k / 2.0).transpose(-1, -2), v),
    "a number as a tensor": lambda q, k, v, b: mix(q @ k.transpose(-1, -2) / torch.full([], 3.0), v),
    "a scale per head": lambda q, k, v, b: mix(q @ k.transpose(-1, -2) * b[0, 0, :4, None, None].exp(), v),
    "k permuted": lambda q, k, v, b: mix(q @ k.permute(0, 1, 3, 2), v),
    "k permuted from token-first": lambda q, k, v, b: mix(q @ k.transpose(1, 2).contiguous().permute(0, 2, 3, 1), v),
    "einsum": lambda q, k, v, b: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "bias": lambda q, k, v, b: mix(q @ k.transpose(-1, -2) * 0.4 + b[:, None, :, :1].mT, v),
    "bias first": lambda q, k, v, b: mix(b[:, None, :, :1].mT + q @ k.transpose(-1, -2) / 2, v),
    "two biases": lambda q, k, v, b: mix(q @ k.transpose(-1, -2) / 2 + b[:, None, :, :1].mT + b[:, None, :, :1], v),
    "scaled after the bias": lambda q, k, v, b: mix((q @ k.transpose(-1, -2) + b[:, None, :, :1].mT) / 2.0, v),
    "softmax of a dtype": lambda q, k, v, b: torch.softmax(q @ k.transpose(-1, -2), -1, dtype=torch.float32) @ v,
    "heads in the batch": lambda q, k, v, b: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).unflatten(0, (-1, 4)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_one_attention(raised, body, spelling):
    done = raised(body(lambda m, x: spelling(*m.heads(x), x)), X)
    assert len(done.attentions) == 1, done.program
    assert done.count("softmax") == 0


NEAR_MISSES = {
    "softmax over the queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "a sink": lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
    "softcap": lambda q, k, v: (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v,
    "weights returned": lambda q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v, w),
    "scores returned": lambda q, k, v: ((s := q @ k.mT).softmax(-1) @ v, s),
    "weights scaled": lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v,
    "sigmoid": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "a negative scale": lambda q, k, v: (q @ k.mT * -0.5).softmax(-1) @ v,
    "a scale along the keys": lambda q, k, v: (q @ k.mT * k[..., :1].mT).softmax(-1) @ v,
    "weights transposed": lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v,
    "shared key head, own values": lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v,
    "queries of one head, keys of many": lambda q, k, v: (q[:, :1] @ k.mT).softmax(-1) @ v,
    "one head, no batch": lambda q, k, v: (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0],
}


@pytest.mark.parametrize("spelling", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(raised, body, spelling):
    done = raised(body(lambda m, x: spelling(*m.heads(x))), X)
    assert not done.attentions


@pytest.mark.parametrize(
    "spelling", ["weights returned", "a negative scale", "shared key head, own values", "one head, no batch"]
)
def test_says_why(raised, body, spelling):
    done = raised(body(lambda m, x: NEAR_MISSES[spelling](*m.heads(x))), X)
    words = {
        "weights returned": "is also read by",
        "a negative scale": "not positive",
        "shared key head, own values": "other leading axes",
        "one head, no batch": "not 3 or 4",
    }
    assert any(words[spelling] in reason for reason in done.reasons), done.reasons


def test_one_key_head_for_all(raised, body):
    done = raised(body(lambda m, x: (lambda q, k, v: mix(q @ k[:, :1].mT / 3, v[:, 1:2]))(*m.heads(x))), X)
    ((mask, causal, scale),) = done.attentions
    assert mask is None and not causal and scale == 1 / 3
    assert done.shared_heads == [1]


def test_two_lengths(raised, body):
    done = raised(body(lambda m, x: (lambda q, k, v: mix(q[:, :, :1] @ k.mT, v))(*m.heads(x))), X)
    assert len(done.attentions) == 1


def test_half_precision(raised, body):
    def forward(m, x):
        q, k, v = m.heads(x)
        return (q @ k.mT / 8**0.5).float().softmax(-1).to(q.dtype) @ v

    done = raised(body(forward).bfloat16(), X.bfloat16())
    assert len(done.attentions) == 1
    assert done.count("to") == 0


def test_after_compiling(raised):
    done = raised(NanoGPT(), X)
    compiled = torch.compile(to_torch(done.program), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), done.model(X), rtol=1e-5, atol=1e-5)
