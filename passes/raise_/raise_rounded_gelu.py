"""Recognise the tanh form of GELU though sqrt(2/pi) was written with fewer digits.

    x/2 (1 + tanh(c (x + 0.044715 x^3))) ~ gelu(x, approximate="tanh")        |c / sqrt(2/pi) - 1| <= 2^-24

In float32 such a c is sqrt(2/pi): both round to the same number, up to its last bit (0.79788456 in BLOOM, 0.7978845608
in gelu_fast). Over the reals they differ, so this is no equality and must be asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import APPROXIMATE

from .raise_tanh_gelu import RaiseTanhGelu


class RaiseRoundedGelu(RaiseTanhGelu):
    """GELU by tanh with a rounded constant → ``gelu(approximate="tanh")``; see the module."""

    claim = APPROXIMATE("sqrt(2/pi) was written with fewer digits; in float32 and below that is its rounding")
    tolerance: ClassVar[float] = 2.0**-24

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64), "c": 0.79788456}
