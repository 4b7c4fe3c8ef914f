"""Masks that are computed from sizes alone: what is recognised goes, what is not stays and says why."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tautomer.passes.raise_.raise_mask import RaiseMask
from tautomer.rewrite.pass_base import Context

X = torch.randn(2, 6, 32)


def with_mask(mask):
    def forward(m, x):
        q, k, v = m.heads(x)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(m, x.shape[0], x.shape[1]))

    return forward


def index(n):
    return torch.arange(n)


CAUSAL = {
    "tril": lambda m, b, n: torch.ones(n, n).tril().bool(),
    "indices": lambda m, b, n: index(n)[None, :] <= index(n)[:, None],
    "added": lambda m, b, n: torch.full((n, n), -1e9).triu(1),
    "lowest number": lambda m, b, n: torch.where(index(n)[None, :] <= index(n)[:, None], 0.0, torch.finfo(torch.float32).min),
    "a table": lambda m, b, n: m.tril[:, :, :n, :n] > 0,
    "per batch": lambda m, b, n: (index(n)[None, :] <= index(n)[:, None]).expand(b, 1, n, n),
    "a wide window": lambda m, b, n: torch.ones(n, n).tril().bool() & (index(n)[:, None] - index(n)[None, :] < 10**9),
}  # fmt: skip


@pytest.mark.parametrize("mask", CAUSAL.values(), ids=CAUSAL)
def test_causal(raised, body, mask):
    done = raised(body(with_mask(mask)), X)
    assert [(m, causal) for m, causal, _ in done.attentions] == [(None, True)]
    assert done.fired("raise-mask") == 1
    assert done.count("arange") == 0 and done.count("tril") == 0


FULL = {
    "ones": lambda m, b, n: torch.ones(b, 1, n, n, dtype=torch.bool),
    "zeros": lambda m, b, n: torch.zeros(n, n),
    "per key": lambda m, b, n: (index(n) >= 0)[None, None, None, :].expand(b, 1, 1, n),
}


@pytest.mark.parametrize("mask", FULL.values(), ids=FULL)
def test_full(raised, body, mask):
    done = raised(body(with_mask(mask)), X)
    assert [(m, causal) for m, causal, _ in done.attentions] == [(None, False)]
    assert "checked at" in done.log.applications[0].note


def diagonal(m, b, n):
    return torch.ones(n, n).tril(-1).bool() | torch.eye(n).bool()


OTHERS = {
    "a window": (lambda m, b, n: torch.ones(n, n).tril().triu(-2).bool(), "a window of 3"),
    "a window longer than the example": (
        lambda m, b, n: (index(n)[None] <= index(n)[:, None]) & (index(n)[None] > index(n)[:, None] - 4096),
        "a window of 4096",
    ),
    "both sides": (lambda m, b, n: (index(n)[None] - index(n)[:, None]).abs() <= 2, "a band of 2 before and 2 after"),
    "anticausal": (lambda m, b, n: torch.ones(n, n).triu().bool(), "a band of 0 before and None after"),
    "no self": (lambda m, b, n: torch.ones(n, n).tril(1).bool(), "a band of None before and 1 after"),
    "every other": (lambda m, b, n: (index(n)[None] - index(n)[:, None]) % 2 == 0, "keeps no band"),
    "a bias": (lambda m, b, n: -(index(n)[None] - index(n)[:, None]).abs().float(), "the mask is a bias"),
    "beyond trying": (lambda m, b, n: index(n)[None] - index(n)[:, None] < 100_000, "compares with 100000"),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "reason"), OTHERS.values(), ids=OTHERS)
def test_others_stay(raised, body, mask, reason):
    done = raised(body(with_mask(mask)), X)
    ((kept, causal, _),) = done.attentions
    assert kept is not None and not causal
    assert any(reason in r for r in done.reasons), done.reasons


def test_a_mask_that_is_data_stays(raised, body):
    def forward(m, x, keep):
        q, k, v = m.heads(x)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])

    done = raised(body(forward), X, torch.ones(2, 6, dtype=torch.bool))
    assert "depends on the input" in done.reasons[0]


def test_causal_needs_as_many_keys_as_queries(raised, body):
    def forward(m, x, y):
        (q, _, _), (_, k, v) = m.heads(x), m.heads(y)
        mask = index(y.shape[1])[None, :] <= index(x.shape[1])[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    done = raised(body(forward), X, torch.randn(2, 6, 32), passes=())
    context = Context()
    RaiseMask().run(done.program, context)
    assert not context.log.applications
    assert "more keys than queries" in context.log.refusals[0].reason


def test_a_trained_bias_beside_a_full_mask(raised, body):
    def forward(m, x):
        q, k, v = m.heads(x)
        n = x.shape[1]
        bias = m.q.weight[0, :1] * (index(n)[None] - index(n)[:, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(n, n) + bias)

    done = raised(body(forward), X)
    ((mask, causal, _),) = done.attentions
    assert mask is not None and not causal
    assert done.count("zeros") == 0


def test_a_second_run_changes_nothing(raised, body):
    done = raised(body(with_mask(CAUSAL["tril"])), X)
    context = Context()
    RaiseMask().run(done.program, context)
    assert not context.log.applications and not context.log.refusals
