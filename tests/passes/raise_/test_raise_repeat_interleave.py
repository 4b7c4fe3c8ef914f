"""Entries repeated in place are one op; whole rounds are not, and neither is a repetition merged with the axis behind it."""

from __future__ import annotations

import pytest
import torch

from tautomer.passes.raise_.raise_repeat_interleave import RaiseRepeatInterleave

X = torch.randn(2, 6, 32)

SPELLINGS = {
    "expand and reshape": lambda k, b, n: k[:, :, None].expand(b, 4, 3, n, 8).reshape(b, 12, n, 8),
    "expand by -1 and flatten": lambda k, b, n: k.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2),
    "repeat": lambda k, b, n: k.unsqueeze(2).repeat(1, 1, 3, 1, 1).view(b, 12, n, 8),
    "reshaped to an axis of one": lambda k, b, n: k.contiguous().view(b, 4, 1, n, 8).expand(b, 4, 3, n, 8).reshape(b, 12, n, 8),
    "positions first": lambda k, b, n: k.transpose(1, 2)[:, :, :, None].expand(b, n, 4, 3, 8).reshape(b, n, 12, 8),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling(raised, body, spelling):
    done = raised(body(lambda m, x: spelling(list(m.heads(x))[1], *x.shape[:2]) * 2), X, passes=(RaiseRepeatInterleave,))
    assert done.count("repeat_interleave") == 1 and done.count("expand") == done.count("repeat") == 0
    assert done.outcome.evidence.forward == 0


NEAR_MISSES = {
    "whole rounds": lambda k, b, n: k.repeat(1, 3, 1, 1).reshape(b, 3, 4, n, 8).flatten(1, 2),
    "whole rounds by expand": lambda k, b, n: k[:, None].expand(b, 3, 4, n, 8).reshape(b, 12, n, 8),
    "merged with the axis behind": lambda k, b, n: k[:, :, None].expand(b, 4, 3, n, 8).reshape(b, 4, 3 * n, 8),
    "merged as well": lambda k, b, n: k[:, :, None].expand(b, 4, 3, n, 8).reshape(b, 12 * n, 8),
    "two axes stretched": lambda k, b, n: k[:, :1, None].expand(b, 2, 3, n, 8).reshape(b, 6, n, 8),
    "as often as it is long": lambda k, b, n: k[:, :, None].expand(b, 4, n, n, 8).reshape(b, 4 * n, n, 8),
    "another merge of the same number": lambda k, b, n: k[:, :, None]
    .expand(b, 4, 3, n, 8)
    .reshape(b, 3, 4, n, 8)
    .reshape(b, 12, n, 8)
    + k[:, :, None].expand(b, 4, 3, n, 8).transpose(1, 2).reshape(b, 12, n, 8),
}  # fmt: skip


@pytest.mark.parametrize("spelling", list(NEAR_MISSES.values())[:-1], ids=list(NEAR_MISSES)[:-1])
def test_near_misses_stay(raised, body, spelling):
    done = raised(body(lambda m, x: spelling(list(m.heads(x))[1], *x.shape[:2]) * 2), X, passes=(RaiseRepeatInterleave,))
    assert not done.log.applications


def test_only_the_merge_in_order(raised, body):
    """The same copies, merged in two orders: a reshape that regroups is the first, a transposition before it is not."""
    spelling = NEAR_MISSES["another merge of the same number"]
    done = raised(body(lambda m, x: spelling(list(m.heads(x))[1], *x.shape[:2]) * 2), X, passes=(RaiseRepeatInterleave,))
    assert len(done.log.applications) == 1
