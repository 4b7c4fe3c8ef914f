"""A floor as low as a masked score is no part of an attention; one that scores can reach is."""

from __future__ import annotations

import pytest
import torch

X = torch.randn(2, 6, 32)
LOW = torch.finfo(torch.float32).min


def masked(m, x):
    q, k, v = m.heads(x)
    n = x.shape[1]
    return q @ k.mT * 0.3 + torch.full((n, n), LOW).triu(1), v


FLOORS = {
    "max with a tensor": lambda s: torch.max(s, torch.tensor(LOW)),
    "maximum with a full": lambda s: torch.maximum(s, torch.full([], LOW)),
    "clamp": lambda s: s.clamp(min=LOW),
}


@pytest.mark.parametrize("floor", FLOORS.values(), ids=FLOORS)
def test_it_goes(raised, body, floor):
    done = raised(body(lambda m, x: (lambda s, v: floor(s).softmax(-1) @ v)(*masked(m, x))), X)
    assert done.attentions == [(None, True, 0.3)]
    assert done.fired("drop-score-floor") == 1


OTHERS = {
    "seen": lambda s: s.clamp(min=-5.0),
    "a ceiling too": lambda s: s.clamp(LOW, 5.0),
    "of a row": lambda s: torch.maximum(s, s.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("floor", OTHERS.values(), ids=OTHERS)
def test_others_stay(raised, body, floor):
    done = raised(body(lambda m, x: (lambda s, v: floor(s).softmax(-1) @ v)(*masked(m, x))), X)
    assert not done.attentions and not done.fired("drop-score-floor")
