"""A mask of sizes alone is the band it keeps, at every size; thresholds in literals and tables are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.masks import LARGEST, Band, Masks, kept

LOWEST = torch.finfo(torch.float32).min


class Builds(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.ones(64, 64).tril().triu(-19))
        self.trained = nn.Parameter(torch.zeros(16, 16))

    def forward(self, ids, other):
        return self.function(self, ids, other).clone(), ids + 1, other + 1


def masks_of(function, ids=None, other=None):
    ids = torch.ones(2, 7, dtype=torch.int64) if ids is None else ids
    program = capture(Builds(function).eval(), (ids, ids.clone() if other is None else other))
    return Masks(program), program.output.args[0][0].args[0]


def band(function, **inputs):
    masks, node = masks_of(function, **inputs)
    return masks.band(node)


def offset(ids):
    index = torch.arange(ids.shape[1])
    return index[None, :] - index[:, None]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda m, ids, o: torch.ones_like(ids, dtype=torch.bool)[:, None].expand(-1, ids.shape[1], -1), "full"),
        (lambda m, ids, o: offset(ids) <= 0, "causal"),
        (lambda m, ids, o: (offset(ids) <= 0)[None, None].expand(ids.shape[0], 1, -1, -1), "causal"),
        (lambda m, ids, o: torch.where(offset(ids) <= 0, 0.0, LOWEST), "causal"),
        (lambda m, ids, o: (offset(ids) <= 0) & (offset(ids) > -5000), "a window of 5000"),
        (lambda m, ids, o: m.table[: ids.shape[1], : ids.shape[1]] > 0, "a window of 20"),
        (lambda m, ids, o: offset(ids).abs() <= 64, "a band of 64 before and 64 after"),
    ],
)
def test_bands(function, text):
    assert str(band(function)) == text


def test_it_says_where_it_was_checked():
    assert band(lambda m, ids, o: offset(ids) <= 0).sizes.startswith("5×5, 8×8, 13×13, 1×1")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, ids, o: ids[:, None, :] > 0, "depends on the input 'ids'"),
        (lambda m, ids, o: m.trained[: ids.shape[1], : ids.shape[1]] > 0, "which trains"),
        (lambda m, ids, o: torch.rand(ids.shape[1], ids.shape[1]) > 0.5, "depends on 'rand"),
        (lambda m, ids, o: offset(ids) % 2 == 0, "keeps no band"),
        (lambda m, ids, o: offset(ids) > 10**6, "more than the 8192 positions"),
        (lambda m, ids, o: offset(ids).float(), "more than zeros and lowest numbers"),
        (lambda m, ids, o: offset(ids), "neither boolean nor floating"),
        (lambda m, ids, o: offset(ids) > 4096, "keeps nothing"),
        (lambda m, ids, o: offset(ids) == ids.shape[0] - 2, "no band|keeps nothing"),
    ],
)  # fmt: skip
def test_what_is_no_band(function, reason):
    with pytest.raises(Refused, match=reason):
        band(function)


def test_a_refusal_is_remembered():
    masks, node = masks_of(lambda m, ids, o: ids[:, None, :] > 0)
    for _ in range(2):
        with pytest.raises(Refused):
            masks.values(node)


def test_equal_sizes_that_need_not_be_equal_are_tried_apart():
    """Keys of the same number in the example, not in general: keeping j < queries is not full."""
    with pytest.raises(Refused):
        band(lambda m, ids, o: (torch.arange(o.shape[1])[None, :] < ids.shape[1]).expand(ids.shape[1], -1))


def test_equal_sizes_that_must_be_equal_are_tried_together():
    assert band(lambda m, ids, o: torch.ones_like(ids + o, dtype=torch.bool)[:, None, :].expand(-1, o.shape[1], -1)).full


def test_what_counts_as_masked():
    assert kept(torch.tensor([[0.0, -float("inf"), LOWEST, -1e9]])).tolist() == [[True, False, False, False]]
    half = torch.tensor([[0.0, torch.finfo(torch.float16).min]], dtype=torch.float16)
    assert kept(half).tolist() == [[True, False]]
    with pytest.raises(Refused):
        kept(torch.tensor([[0.0, -1e4]]))


def test_a_band_reads():
    assert Band(None, None).full and Band(None, 0).causal and not Band(3, 0).causal
    assert str(Band(3, 0)) == "a window of 4"
    assert LARGEST >= 4096 + 2


def test_a_mask_may_say_what_it_drops():
    masks, node = masks_of(lambda m, ids, other: offset(ids) > 0)
    assert masks.band(node, keeps=False).causal and masks.band(node, keeps=False).keeps_own
    with pytest.raises(Refused, match="keeps nothing"):
        masks.band(node)


@pytest.mark.parametrize(("band", "own"), [((None, 0), True), ((3, 0), True), ((None, -1), False), ((-1, None), False)])
def test_a_band_keeps_its_own_positions(band, own):
    assert Band(*band).keeps_own is own
