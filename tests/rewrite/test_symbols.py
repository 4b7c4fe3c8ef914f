"""A variable is what its annotation says, and says so."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch

from tautomer.rewrite.errors import PatternError
from tautomer.rewrite.ops import Operand, Parameter, Scalar, Tensor, Weight
from tautomer.rewrite.symbols import Variable


def test_an_annotation_that_says_nothing_is_an_error():
    for annotation in (Annotated[Scalar, "positive"], Annotated[Tensor, "n", "d"], Annotated[Tensor, 4],
                       Annotated[Tensor, "... n *b"], Annotated[Scalar, torch.float32]):  # fmt: skip
        with pytest.raises(PatternError, match="the annotation of x restricts it by"):
            Variable.of("x", annotation)


def test_what_a_variable_wants_is_a_phrase():
    wanted = {
        "a weight [d] or None for b": Annotated[Weight, "d"] | None,
        "a number > 0 for b": Annotated[Scalar, "> 0"],
        "a tensor of float16 or float64 for b": Annotated[Tensor, torch.float16, torch.float64],
        "a parameter (a weight itself) for b": Parameter,
        "an operand for b": Operand,
    }
    assert list(wanted) == [Variable.of("b", annotation).wanted for annotation in wanted.values()]
