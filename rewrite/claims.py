"""A claim is what a rewrite promises about outputs and gradients, and what verification holds it to.

    f(x; W)  ->  f'(x; w(W))        w is the weight map of the rewrite

BITWISE               f' = f and df' = df, same bits
ALGEBRAIC             f' = f over the reals, and df'/dx = df/dx, df'(w(W))/dW = df/dW through the weight map
FORWARD               f' = f over the reals, gradients not promised
APPROXIMATE_GRADIENT  f' = f, gradients approximate and stated
APPROXIMATE           the error is measured and reported
ARCHITECTURE          f' is another function of the same type, to be trained
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Forward = Literal["bitwise", "equal", "measured", "free"]
Gradient = Literal["bitwise", "equal", "approximate", "none"]

FORWARD_ORDER: tuple[Forward, ...] = ("bitwise", "equal", "measured", "free")
GRADIENT_ORDER: tuple[Gradient, ...] = ("bitwise", "equal", "approximate", "none")
"""Strongest first: a chain of rewrites keeps the weakest of its claims."""


@dataclass(frozen=True)
class Claim:
    """What a rewrite promises. Calling a claim attaches the sentence that says which roundings move.

    Example:
        >>> ALGEBRAIC("the product is rounded in the weight").note
        'the product is rounded in the weight'
    """

    name: str
    forward: Forward
    gradient: Gradient
    note: str = ""

    def __call__(self, note: str) -> Claim:
        return replace(self, note=note)

    @property
    def exact(self) -> bool:
        """Whether outputs are equal over the reals."""
        return self.forward in ("bitwise", "equal")

    @property
    def opt_in(self) -> bool:
        """Whether a user must ask for it by name."""
        return not self.exact or self.gradient == "approximate"

    def __str__(self) -> str:
        return f"{self.name}: {self.note}" if self.note else self.name


BITWISE = Claim("bitwise", "bitwise", "bitwise")
ALGEBRAIC = Claim("algebraic", "equal", "equal")
FORWARD = Claim("forward", "equal", "none")
APPROXIMATE_GRADIENT = Claim("approximate gradient", "equal", "approximate")
APPROXIMATE = Claim("approximate", "measured", "none")
ARCHITECTURE = Claim("architecture", "free", "none")
