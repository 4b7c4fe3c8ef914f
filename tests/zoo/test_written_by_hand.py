"""Attention and norms as people write them in modules of their own: raised and equal, or left alone with a sentence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo.raised import Body, Raised

import tautomer
from tautomer.backends.to_torch import to_torch
from tautomer.passes.recipes import RAISE
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes

X = torch.randn(2, 6, 32)
SCALE = 8**-0.5


class Heads(nn.Module):
    """Four heads of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(32, 32) for _ in range(4))
        self.qkv = nn.Linear(32, 96)

    def split(self, x, y=None):
        y = x if y is None else y
        return (w(z).view(z.shape[0], z.shape[1], 4, 8).transpose(1, 2) for w, z in ((self.q, x), (self.k, y), (self.v, y)))

    def merge(self, x):
        return self.proj(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 32))


class MinGPT(Heads):
    """Separate projections, a table of ones and zeros, dropout modules."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
        self.attn_drop, self.resid_drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.split(x)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = self.attn_drop(F.softmax(att, dim=-1)) @ v
        return self.resid_drop(self.proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class Timm(Heads):
    """One projection, permuted and unbound; norms of the queries and keys; the queries are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm, self.attn_drop = nn.LayerNorm(8), nn.LayerNorm(8), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attn = (q * SCALE) @ k.transpose(-2, -1)
        x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Einsum(Heads):
    """Einsums with spaces; a triangle of booleans and the lowest number; rows come last."""

    def forward(self, x):
        n = x.shape[1]
        q, k, v = (t.unflatten(-1, (4, 8)).permute(0, 2, 1, 3) for t in self.qkv(x).chunk(3, dim=-1))
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
        dots = dots.masked_fill(torch.ones((n, n), dtype=torch.bool).triu(1), -torch.finfo(dots.dtype).max)
        out = torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)
        return self.merge(out)


class TokenFirstEinsum(Heads):
    """The heads stay behind the positions, as in JAX."""

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (4, 8)) for w in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q / math.sqrt(8), k), -1)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class Fairseq(Heads):
    """Positions first, heads in the batch, bmm; an upper triangle of -inf is added."""

    def forward(self, x):
        x = x.transpose(0, 1)
        T, B, C = x.size()
        q, k, v = (w(x).contiguous().view(T, B * 4, 8).transpose(0, 1) for w in (self.q, self.k, self.v))
        weights = torch.bmm(q * SCALE, k.transpose(1, 2))
        weights = weights + torch.triu(torch.full((T, T), float("-inf")), 1)
        attn = torch.bmm(F.softmax(weights, dim=-1), v)
        return self.proj(attn.transpose(0, 1).contiguous().view(T, B, C)).transpose(0, 1)


class Baddbmm(Heads):
    """Scale and bias by baddbmm, heads in the batch."""

    def forward(self, x):
        q, k, v = (y.flatten(0, 1) for y in self.split(x))
        bias = x[:, :, :1].mT.repeat_interleave(4, 0)
        weights = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1, alpha=SCALE).softmax(-1)
        return torch.bmm(weights, v)


class EmptyBaddbmm(Heads):
    """Megatron: baddbmm over uninitialised memory, which beta = 0 leaves out."""

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (y.flatten(0, 1) for y in self.split(x))
        scores = torch.baddbmm(torch.zeros(4 * B, T, T), q, k.transpose(1, 2), beta=0.0, alpha=SCALE)
        return torch.bmm(scores.softmax(-1), v)


class BothScaled(Heads):
    """Whisper: the fourth root of the width on queries and keys; keys arrive transposed."""

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, 4, 8).permute(0, 2, 1, 3) * 8**-0.25
        k = self.k(x).view(B, T, 4, 8).permute(0, 2, 3, 1) * 8**-0.25
        v = self.v(x).view(B, T, 4, 8).permute(0, 2, 1, 3)
        return (F.softmax((q @ k).float(), dim=-1).to(q.dtype) @ v).permute(0, 2, 1, 3).flatten(start_dim=2)


class KeysScaled(Heads):
    """The root of the width divides the keys."""

    def forward(self, x):
        q, k, v = self.split(x)
        return self.merge(torch.matmul(torch.matmul(q, (k / math.sqrt(8)).transpose(2, 3)).softmax(3), v))


class Where(Heads):
    """GPT-2: a table of booleans, where, and a number that is a tensor of no axes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(16, 16, dtype=torch.bool)).view(1, 1, 16, 16), persistent=False)

    def forward(self, x):
        q, k, v = self.split(x)
        weights = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], 8**0.5)
        n, m = q.size(-2), k.size(-2)
        low = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(self.bias[:, :, m - n : m, :m], weights, low)
        return self.merge(torch.matmul(F.softmax(weights, dim=-1), v))


class LiftedNumber(Where):
    """GPT-Neo: the number is ``torch.tensor``, which export makes a constant."""

    def forward(self, x):
        q, k, v = self.split(x)
        weights = torch.matmul(q, k.transpose(-1, -2))
        n = x.shape[1]
        low = torch.tensor(torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(self.bias[:, :, :n, :n], weights, low)
        weights = weights + torch.full((n, n), torch.finfo(weights.dtype).min).triu(1)
        return self.merge(torch.matmul(F.softmax(weights, dim=-1), v))


class Floor(Heads):
    """OPT once: two masks must not overflow, so the sum gets a floor; heads in the batch around it."""

    def forward(self, x):
        B, T, _ = x.shape
        low = torch.finfo(x.dtype).min
        q, k, v = (y.reshape(B * 4, T, 8) for y in self.split(x))
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, 4, T, T) + torch.full((T, T), low).triu(1)
        scores = torch.max(scores, torch.tensor(low)).view(B * 4, T, T)
        return self.merge(torch.bmm(F.softmax(scores, dim=-1), v).view(B, 4, T, 8))


class Cosine(Heads):
    """Swin v2: normalised queries and keys, a trained and bounded scale per head."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(4, 1, 1)))

    def forward(self, x):
        q, k, v = self.split(x)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        return self.merge(attn.softmax(dim=-1) @ v)


class ThreeBiases(Heads):
    """Content, position and segment, then a mask is taken away, all scaled at the end."""

    def forward(self, x):
        q, k, v = self.split(x)
        n = x.shape[1]
        scores = q @ k.mT + x[:, None, :, :1] + 0
        scores = scores + x[:, None, None, :, 1]
        scores = scores - 1e30 * torch.ones(n, n).triu(1)
        return self.merge(scores.softmax(-1) @ v)


class SlidingWindow(Heads):
    """Each position sees itself and two before."""

    def forward(self, x):
        q, k, v = self.split(x)
        i = torch.arange(x.shape[1])
        keep = (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < 3)
        scores = (q @ k.mT * SCALE).masked_fill(~keep, torch.finfo(x.dtype).min)
        return self.merge(scores.softmax(-1) @ v)


class OneKeyHead(Heads):
    """Multi-query attention by broadcasting."""

    def forward(self, x):
        q, k, v = self.split(x)
        return self.merge((q @ k[:, :1].transpose(2, 3) * SCALE).softmax(-1) @ v[:, :1])


class Qwen(Heads):
    """Grouped keys, RMSNorms of queries and keys, a float32 softmax, a causal mask from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(8))

    def norm(self, x):
        return self.g * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)

    def mask(self, length, dtype):
        return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.split(x)
        k, v = (y[:, :2, None].expand(B, 2, 2, T, 8).reshape(B, 4, T, 8) for y in (self.norm(k), v))
        weights = self.norm(q) @ k.transpose(2, 3) * SCALE + self.mask(T, x.dtype)
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.merge(weights @ v)


# model: what the mask becomes, the scale (None: it depends on weights), norms
RAISED: dict[type[nn.Module], tuple[str, float | None, int]] = {
    MinGPT: ("causal", SCALE, 0),
    Timm: ("none", SCALE, 2),
    Einsum: ("causal", SCALE, 0),
    TokenFirstEinsum: ("none", SCALE, 0),
    Fairseq: ("causal", SCALE, 0),
    Baddbmm: ("mask", SCALE, 0),
    EmptyBaddbmm: ("none", SCALE, 0),
    BothScaled: ("none", SCALE, 0),
    KeysScaled: ("none", SCALE, 0),
    Where: ("causal", None, 0),
    LiftedNumber: ("causal", 1.0, 0),
    Floor: ("causal", 1.0, 0),
    Cosine: ("none", 1.0, 0),
    ThreeBiases: ("mask", 1.0, 0),
    SlidingWindow: ("mask", SCALE, 0),
    OneKeyHead: ("none", SCALE, 0),
    Qwen: ("causal", SCALE, 2),
}


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
def test_raised_and_equal(kind):
    form, scale, norms = RAISED[kind]
    done = Raised(kind(), X, passes=RAISE)
    ((mask, causal, factor),) = done.attentions
    assert ("causal" if causal else "none" if mask is None else "mask") == form
    assert scale is None or factor == pytest.approx(scale, rel=1e-7)
    assert done.count("softmax") == done.count("einsum") == done.count("baddbmm") == 0
    assert done.count("layer_norm") + done.count("rms_norm") == norms
    evidence = done.outcome.evidence
    assert evidence.forward <= 1e-12
    assert kind is Floor if evidence.gradient is None else evidence.gradient <= 1e-10
    compiled = torch.compile(to_torch(done.program), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), done.model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [BothScaled, Qwen], ids=lambda kind: kind.__name__)
def test_equal_in_inductor(kind):
    done = Raised(kind(), X, passes=RAISE)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(to_torch(done.program))(X), done.model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [BothScaled, Qwen, Timm], ids=lambda kind: kind.__name__)
def test_half_precision(kind, half):
    """Float32 softmax and norms with casts back: the casts are the kernels' own."""
    done = Raised(kind().to(half), X.to(half), passes=RAISE)
    assert len(done.attentions) == 1 and done.count("to") == 0 and done.count("softmax") == 0


class Cross(Heads):
    """Queries from one input, keys from another whose padding is masked."""

    def __init__(self, low: float | None = None) -> None:
        super().__init__()
        self.low = low

    def forward(self, x, y, keep):
        q, k, v = self.split(x, y)
        scores = q @ k.transpose(-1, -2) * SCALE
        if self.low is None:
            scores = scores + (1.0 - keep[:, None, None, :].to(x.dtype)) * -10000.0
        else:
            scores = scores.masked_fill(~keep[:, None, None, :], self.low)
        return self.merge(scores.softmax(-1) @ v)


@pytest.mark.parametrize("low", [None, torch.finfo(torch.float32).min, -float("inf")])
def test_padding_in_cross_attention(low):
    keep = torch.arange(6)[None, :] < torch.tensor([4, 6])[:, None]
    done = Raised(Cross(low), X, torch.randn(2, 6, 32), keep)
    ((mask, causal, scale),) = done.attentions
    assert mask is not None and not causal and scale == SCALE
    assert done.count("softmax") == 0


def sink(q, k, v):
    scores = q @ k.mT * SCALE
    return torch.cat([scores, q[..., :1]], -1).softmax(-1)[..., :-1] @ v


LEFT_ALONE = {
    "softcap": (lambda q, k, v: (torch.tanh(q @ k.mT * SCALE / 5) * 5).softmax(-1) @ v, "capped by a tanh"),
    "softcap and mask": (
        lambda q, k, v: (torch.tanh(q @ k.mT / 5) * 5 + torch.full((q.shape[2],) * 2, -1e30).triu(1)).softmax(-1) @ v,
        "capped by a tanh",
    ),
    "sinks": (sink, "attention sinks"),
    "a mask that multiplies": (
        lambda q, k, v: ((q @ k.mT) * (b := torch.ones(q.shape[2], q.shape[2]).tril()) - 1e4 * (1 - b)).softmax(-1) @ v,
        "multiplied by what varies along the keys",
    ),
    "talking heads": (lambda q, k, v: torch.einsum("bhij,hg->bgij", q @ k.mT, v[0, :, 0, :4]).softmax(-1) @ v, ""),
    "softmax of rows": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, ""),
    "a mask that is not low": (lambda q, k, v: (q @ k.mT).masked_fill(k[..., :1].mT > 0, -100.0).softmax(-1) @ v, "-100.0"),
    "a floor that is seen": (lambda q, k, v: (q @ k.mT).clamp(min=-100.0).softmax(-1) @ v, "would be seen"),
    "a mask of another dtype": (
        lambda q, k, v: ((q @ k.mT).bfloat16() + torch.full((q.shape[2],) * 2, -1e30).triu(1)).softmax(-1).to(q.dtype) @ v,
        "float32 is added to scores of torch.bfloat16",
    ),
    "a bias of another dtype": (lambda q, k, v: ((q @ k.mT) + q.double()[..., :1]).float().softmax(-1) @ v, ""),
}  # fmt: skip


@pytest.mark.parametrize(("spelling", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_with_a_sentence(spelling, reason):
    done = Raised(Body(lambda m, x: spelling(*m.heads(x))), X, passes=RAISE)
    assert not done.attentions
    assert not reason or any(reason in r for r in done.reasons), done.reasons


def test_weights_that_are_dropped_out_while_training():
    """A kernel would draw other ones: left alone, with dropout on or to be switched on."""
    program, context = tautomer.capture(MinGPT().train(), (X,)), Context()
    run_passes([kind() for kind in RAISE], program, context)
    assert not any(application.rewrite == "raise-attention" for application in context.log.applications)
    assert any("dropped out" in refusal.reason for refusal in context.log.refusals), context.log.refusals
