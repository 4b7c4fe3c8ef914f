"""A ring of keys holds the last ones; a step over it is a row of the window, of blocks, of softmax with sinks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tautomer.rewrite.hybrid_attention import block_attention
from tautomer.rewrite.nearest_keys import latest, window_attention_state, window_attention_step
from tautomer.rewrite.subset_attention import window_attention

F64 = torch.float64


def test_a_ring_holds_the_last_rows_at_their_places() -> None:
    x = torch.arange(7.0)[:, None] + 1
    assert latest(x, 3).flatten().tolist() == [7, 5, 6]
    assert latest(x, 3, sinks=2).flatten().tolist() == [1, 2, 7, 5, 6]
    assert latest(x[:2], 4, sinks=3).flatten().tolist() == [1, 2, 0, 1, 2, 0, 0]


WINDOWS = [(1, 0, False), (4, 0, False), (4, 2, False), (3, 9, False), (30, 2, False), (5, 0, True), (1, 0, True)]


@pytest.mark.parametrize(("window", "sinks", "aligned"), WINDOWS)
@pytest.mark.parametrize("known", [1, 2, 11])
def test_steps_are_the_whole(window: int, sinks: int, aligned: bool, known: int) -> None:
    q, k, v = torch.randn(2, 4, 23, 6, dtype=F64), torch.randn(2, 2, 23, 6, dtype=F64), torch.randn(2, 2, 23, 5, dtype=F64)
    whole = block_attention(q, k, v, window, True, None, 0.3) if aligned else None
    wanted: Tensor = window_attention(q, k, v, None, 0.3, window, sinks, True) if whole is None else whole
    state = window_attention_state(k[:, :, :known], v[:, :, :known], window, sinks)
    for t in range(known, 23):
        y, *new = window_attention_step(*(x[:, :, t : t + 1] for x in (q, k, v)), *state, torch.tensor(t), 0.3, sinks, aligned)
        torch.testing.assert_close(y, wanted[:, :, t : t + 1], rtol=1e-12, atol=1e-12)
        assert [x.shape for x in new] == [x.shape for x in state]
        state = (new[0], new[1])
