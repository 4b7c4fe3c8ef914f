"""Every spelling of one value is that value."""

from __future__ import annotations

import pytest
import torch

from tautomer.passes.raise_.spellings import inverse_root, mean_square, root
from tautomer.rewrite.ops import TorchOps


class Alternative(TorchOps):
    """Takes the alternative of a given number, wherever there is one."""

    def __init__(self, number):
        self.number = number

    def any_of(self, *alternatives):
        return alternatives[min(self.number, len(alternatives) - 1)]


@pytest.mark.parametrize("number", range(3))
def test_spellings_agree(number):
    x, op = torch.rand(3, 4, dtype=torch.float64) + 0.5, Alternative(number)
    torch.testing.assert_close(mean_square(op, x), (x * x).mean(-1, keepdim=True))
    torch.testing.assert_close(root(op, x), x.sqrt())
    torch.testing.assert_close(inverse_root(op, x), 1 / x.sqrt())
