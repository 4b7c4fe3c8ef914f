"""Every spelling of one value is that value."""

from __future__ import annotations

import pytest
import torch

from tautomer.passes.raise_.spellings import half_gated, inverse_root, mean_square, require_constant, root
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.ops import TorchOps


class Alternative(TorchOps):
    """Takes the alternative of a given number, wherever there is one."""

    def __init__(self, number):
        self.number = number

    def any_of(self, *alternatives):
        return alternatives[min(self.number, len(alternatives) - 1)]


@pytest.mark.parametrize("number", range(8))
def test_spellings_agree(number):
    x, op = torch.rand(3, 4, dtype=torch.float64) + 0.5, Alternative(number)
    torch.testing.assert_close(mean_square(op, x), (x * x).mean(-1, keepdim=True))
    torch.testing.assert_close(root(op, x), x.sqrt())
    torch.testing.assert_close(inverse_root(op, x), 1 / x.sqrt())
    torch.testing.assert_close(half_gated(op, x, x.erf()), 0.5 * x * (1 + x.erf()))


def test_a_literal_is_a_constant_to_the_last_digits_that_float64_can_tell():
    require_constant(0.5 + 1e-13, 0.5, "a half")
    require_constant(None, 0.5, "a half")
    with pytest.raises(Refused, match=r"0.500001 is not a half but 2.0e-06 \(relative\) away from it"):
        require_constant(0.500001, 0.5, "a half")
