"""What a target is: where a program will run, and whether a rewrite pays there.

Legality and profit are different questions. A claim answers the first, a target the second, by measuring the two forms
at the program's own shapes where that is cheap, and by a recorded figure where it is not. Implementations stand in
backends/: the framework knows no runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .program import Program

Compiled = Callable[[Sequence[Any]], tuple[Any, ...]]
"""A program made ready to run: flat inputs to flat outputs."""


@dataclass(frozen=True)
class Gain:
    """Whether a rewrite pays on a target.

    Attributes:
        pays: the rewritten form is not slower.
        before_us: one call of the original form, in µs; None where no figure is known.
        after_us: one call of the rewritten form, in µs; None where no figure is known.
        note: one sentence with both numbers, and where they come from.

    Example:
        >>> Gain(True, 46.0, 26.0, "an RMSNorm takes 26 µs, the LayerNorm 46 µs").pays
        True
    """

    pays: bool
    before_us: float | None
    after_us: float | None
    note: str

    def __str__(self) -> str:
        return self.note


class Target(Protocol):
    """Where a program will run.

    Attributes:
        name: as the user spells it, ``onnxruntime-cuda``.
        device: "cpu" or "cuda"; None where the model's own device decides.
        multiple: inner sizes that are a multiple of it suit its matrix products.
    """

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str | None: ...

    @property
    def multiple(self) -> int: ...

    def compile(self, program: Program) -> Compiled:
        """``program`` made ready to run here, for measuring: flat inputs to flat outputs, without gradients."""
        ...

    def gain(self, pass_name: str, program: Program) -> Gain | None:
        """What the pass of this name is worth to ``program`` here; None if the target has no opinion."""
        ...
