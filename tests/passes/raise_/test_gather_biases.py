"""Whatever is added to scores, part after part, becomes one bias of one attention."""

from __future__ import annotations

import pytest
import torch

X = torch.randn(2, 6, 32)


def parts(x):
    """One bias per key and one per query."""
    return x[:, None, None, :, 0], x[:, None, :, :1]


SUMS = {
    "two": lambda s, a, b: s + a + b,
    "from the left": lambda s, a, b: b + (a + s),
    "four": lambda s, a, b: s + a + b + a + b,
    "less one": lambda s, a, b: s - a,
    "plus and less": lambda s, a, b: s + b - a,
    "scaled first": lambda s, a, b: s * 0.3 + a - b,
    "scaled last": lambda s, a, b: (s + a + b) * 0.3,
    "divided last": lambda s, a, b: (s + a + b) / 3,
}


@pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)
def test_every_sum_becomes_one_bias(raised, body, total):
    def forward(m, x):
        q, k, v = m.heads(x)
        return total(q @ k.mT, *parts(x)).softmax(-1) @ v

    done = raised(body(forward), X)
    ((mask, causal, _),) = done.attentions
    assert mask is not None and not causal and done.count("softmax") == 0


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 1), (1, 0.25), (2, 3)])
def test_baddbmm_under_a_softmax(raised, body, beta, alpha):
    def forward(m, x):
        q, k, v = (y.flatten(0, 1) for y in m.heads(x))
        return torch.baddbmm(x[:1, :, :1].mT, q, k.mT, beta=beta, alpha=alpha).softmax(-1) @ v

    done = raised(body(forward), X)
    ((mask, _, scale),) = done.attentions
    assert mask is not None and scale == alpha and done.count("baddbmm") == 0


OTHERS = {
    "scores less by more than a bias": lambda s, a, b: (a - s).softmax(-1),
    "a sum that is read twice": lambda s, a, b: (t := s + a) * 0 + (t + b).softmax(-1),
}


@pytest.mark.parametrize("total", OTHERS.values(), ids=OTHERS)
def test_others_stay(raised, body, total):
    def forward(m, x):
        q, k, v = m.heads(x)
        return total(q @ k.mT, *parts(x)) @ v

    assert not raised(body(forward), X).attentions


def test_a_table_that_is_cut_to_a_length_may_be_too_short(raised, body):
    """The table has sixteen columns: at seventeen positions the sum would fail, and export cannot say that there are fewer."""

    def forward(m, x):
        q, k, v = m.heads(x)
        n = x.shape[1]
        table = m.tril[0, :, -1:, -n:] * 1.5
        return (q @ k.mT * 0.3 + table + x[:, None, None, :, 0]).softmax(-1) @ v

    done = raised(body(forward), X)
    assert done.attentions or any("may not fit the scores at every length" in reason for reason in done.reasons)
