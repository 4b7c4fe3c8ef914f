"""A call is held to what was captured, and told in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.expected import Expected, check, expected, kind_of

X = Expected("x", "floating", "cpu", ("s0", 7))
MASK = Expected("mask", "boolean", "cpu", ("s0",))


def test_what_fits_passes():
    check([torch.zeros(3, 7), torch.zeros(3, dtype=torch.bool)], [X, MASK], "M")
    check([torch.zeros(1, 7, dtype=torch.bfloat16), None], [X, None], "M")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.zeros(2, 3), r"'x' has shape \[2, 3\]; M was captured with \[\*, 7\], axis 1 is fixed"),
        (torch.zeros(7), r"'x' has shape \[7\]; M was captured with \[\*, 7\]"),
        (torch.zeros(2, 7, dtype=torch.int64), "'x' holds torch.int64; M was captured with floating numbers there"),
        (torch.zeros(2, 7, device="meta"), "'x' is on meta; M was captured on cpu"),
        (None, "'x' is no tensor"),
    ],
)
def test_what_does_not_fit_is_said(value, sentence):
    with pytest.raises(UsageError, match=sentence):
        check([value], [X], "M")


def test_one_symbol_is_one_size():
    with pytest.raises(UsageError, match="'mask' has size 3 in axis 0 and 'x' 2 in axis 0"):
        check([torch.zeros(2, 7), torch.zeros(3, dtype=torch.bool)], [X, MASK], "M")


def test_a_mask_of_integers_is_no_mask_of_booleans():
    assert kind_of(torch.bool) != kind_of(torch.int64) == kind_of(torch.uint8)


def test_a_captured_program_says_what_it_expects():
    class Model(nn.Module):
        def forward(self, x, unused, flag=True):
            return x + 1

    program = capture(Model(), (torch.zeros(2, 7), torch.zeros(3)))
    first, *rest = expected(program)
    assert first is not None and (first.name, first.kind, first.device) == ("x", "floating", "cpu")
    assert isinstance(first.shape[0], str) and first.shape[1] == 7
    assert rest == [None]
