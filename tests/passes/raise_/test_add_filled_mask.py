"""A filled mask that is data: added if that is the same for a row that is masked everywhere, left if not."""

from __future__ import annotations

import pytest
import torch

X, KEEP = torch.randn(2, 6, 32), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
LOWEST = torch.finfo(torch.float32).min


def scores(m, x):
    q, k, v = m.heads(x)
    return q @ k.mT * 8**-0.5, v


FILLED = {
    "where": lambda s, keep: torch.where(keep, s, LOWEST),
    "where with a tensor": lambda s, keep: torch.where(keep, s, torch.full([], LOWEST)),
    "masked_fill": lambda s, keep: s.masked_fill(~keep, LOWEST),
    "masked_fill with a tensor": lambda s, keep: s.masked_fill(~keep, torch.full([], LOWEST)),
    "added to": lambda s, keep: torch.where(keep, s, LOWEST) + torch.full([1, 1], 0.5),
}


@pytest.mark.parametrize("fill", FILLED.values(), ids=FILLED)
def test_becomes_a_mask_that_is_added(raised, body, fill):
    def forward(m, x, keep):
        s, v = scores(m, x)
        return fill(s, keep[:, None, None, :]).softmax(-1) @ v

    done = raised(body(forward), X, KEEP)
    assert done.fired("add-filled-mask") == 1
    ((mask, causal, _),) = done.attentions
    assert mask is not None and not causal
    done.agrees(X, torch.zeros_like(KEEP))  # every row masked everywhere: uniform weights


@pytest.mark.parametrize("low", [-1e9, -1e4, 0.0])
def test_a_number_that_is_not_low_enough_stays(raised, body, low):
    def forward(m, x, keep):
        s, v = scores(m, x)
        return s.masked_fill(~keep[:, None, None, :], low).softmax(-1) @ v

    done = raised(body(forward), X, KEEP)
    assert not done.attentions
    assert any("masked everywhere would change" in reason for reason in done.reasons)


def test_a_mask_that_is_added_already_is_left_alone(raised, body):
    def forward(m, x, keep):
        s, v = scores(m, x)
        mask = torch.zeros_like(keep, dtype=torch.float32).masked_fill(~keep, LOWEST)[:, None, None, :]
        return torch.tanh(s + mask).softmax(-1) @ v + (s + torch.where(keep[:, None, None], 0.0, LOWEST)).softmax(-1) @ v

    assert not raised(body(forward), X, KEEP).fired("add-filled-mask")
