"""A filled mask of sizes alone: any low number will do, because no row is masked everywhere."""

from __future__ import annotations

import pytest
import torch

X = torch.randn(2, 6, 32)


def attend(fill):
    def forward(m, x):
        q, k, v = m.heads(x)
        n = x.shape[1]
        return fill(q @ k.mT * 8**-0.5, m.tril[:, :, :n, :n]).softmax(-1) @ v

    return forward


FILLED = {
    "-1e9": lambda s, mask: s.masked_fill(mask == 0, -1e9),
    "-inf": lambda s, mask: s.masked_fill(mask == 0, float("-inf")),
    "where": lambda s, mask: torch.where(mask.bool(), s, torch.finfo(s.dtype).min),
    "where with a tensor": lambda s, mask: torch.where(mask.bool(), s, torch.full([], -1e9)),
    "masked_fill with a tensor": lambda s, mask: s.masked_fill(mask == 0, torch.full([], -1e9)),
}


@pytest.mark.parametrize("fill", FILLED.values(), ids=FILLED)
def test_becomes_causal_attention(raised, body, fill):
    done = raised(body(attend(fill)), X)
    assert done.fired("add-mask-of-sizes") == 1
    assert [(mask, causal) for mask, causal, _ in done.attentions] == [(None, True)]
    assert done.outcome.evidence.gradient is not None


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (lambda s, mask: s.masked_fill(mask == 0, -100.0), "softmax may still see them"),
        (lambda s, mask: s.masked_fill(mask == 1, -1e9), "a row is masked everywhere"),
        (lambda s, mask: s.masked_fill(mask == 0, s.amin()), "computed at run time"),
        (lambda s, mask: s.masked_fill(s < 0, -1e9), "depends on"),
    ],
)  # fmt: skip
def test_others_stay(raised, body, fill, reason):
    done = raised(body(attend(fill)), X)
    assert not done.fired("add-mask-of-sizes") and not done.attentions
    assert any(reason in r for r in done.reasons), done.reasons


def test_scores_that_others_read_stay(raised, body):
    done = raised(body(attend(lambda s, mask: s.masked_fill(mask == 0, -1e9).relu())), X)
    assert not done.fired("add-mask-of-sizes")
