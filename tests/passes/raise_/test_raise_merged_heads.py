"""Heads merged with the batch for the products and apart for the mask."""

from __future__ import annotations

import pytest
import torch

X = torch.randn(2, 6, 32)


def alibi(n, heads=4):
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    return slopes[:, None, None] * torch.arange(n)[None, None, :]


def merged(m, x):
    b, n, _ = x.shape
    return b, n, *(y.reshape(b * 4, n, 8) for y in m.heads(x))


def causal(n):
    return torch.where(torch.arange(n)[None, :] <= torch.arange(n)[:, None], 0.0, torch.finfo(torch.float32).min)[None, None]


def with_alibi(m, x):
    b, n, q, k, v = merged(m, x)
    scores = torch.baddbmm(alibi(n).repeat(b, 1, 1), q, k.transpose(-1, -2), beta=0.5, alpha=8**-0.5)
    weights = torch.softmax(scores.view(b, 4, n, -1) + causal(n), dim=-1, dtype=torch.float32)
    return torch.bmm(weights.view(b * 4, n, -1), v).view(b, 4, n, 8)


def masked_apart(m, x):
    b, n, q, k, v = merged(m, x)
    weights = torch.bmm(q * 8**-0.5, k.transpose(1, 2)).view(b, 4, n, n) + causal(n)
    return torch.bmm(weights.view(b * 4, n, n).softmax(-1), v)


@pytest.mark.parametrize(("forward", "biased"), [(with_alibi, True), (masked_apart, False)])
def test_becomes_one_attention(raised, body, forward, biased):
    done = raised(body(forward), X)
    ((mask, is_causal, _),) = done.attentions
    assert (mask is not None) is biased and is_causal is not biased
    assert done.fired("raise-merged-heads") == 1
    assert done.count("baddbmm") == done.count("softmax") == 0


def test_a_view_that_mixes_tokens_stays(raised, body):
    def forward(m, x):
        b, n, q, k, v = merged(m, x)
        weights = torch.bmm(q, k.transpose(1, 2)).view(b, 2, 2 * n, n) + causal(2 * n)[..., :n]
        return torch.bmm(weights.view(b * 4, n, n).softmax(-1), v)

    done = raised(body(forward), X)
    assert not done.attentions
    assert any("more than the heads" in reason for reason in done.reasons)
