"""What options may be: held to annotations, in one sentence."""

from __future__ import annotations

import doctest
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pytest

from tautomer.rewrite import options
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.options import check_options, least


@dataclass
class Odd:
    """One field of each kind of annotation."""

    whole: int | None = None
    number: float = 0.5
    flag: bool = False
    word: Literal["a", "b"] = "a"
    layers: Sequence[int | str] | int | str | None = None
    grid: tuple[int, ...] | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        check_options(self)


class Plain:
    """No dataclass."""

    name = "plain-pass"

    def __init__(self, ratio: float = 0.6, *, words: str = "") -> None:
        check_options(self, locals())
        self.ratio = ratio


def test_what_fits_is_taken() -> None:
    Odd(3, 1, True, "b", (0, "h.1"), (2, 3), object())
    Odd(layers=[], grid=()), Odd(layers=-1), Odd(layers="h.0"), Plain(1), Plain(0.1, words="x")


def test_a_number_of_numpys_is_one() -> None:
    odd = Odd(numpy.int64(3), numpy.float32(0.5), numpy.bool_(True), numpy.str_("b"), [numpy.int8(1), "h.1"], (numpy.int64(2),))
    assert repr(odd) == repr(Odd(3, 0.5, True, "b", [1, "h.1"], (2,)))
    Plain(numpy.float32(0.5))
    for wrong in (
        {"whole": numpy.float64(3)},
        {"flag": numpy.int64(1)},
        {"whole": numpy.bool_(True)},
        {"number": numpy.array([1.0])},
    ):
        with pytest.raises(UsageError, match="which is no"):
            Odd(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"whole": True}, "Odd: whole is True, which is no int | None"),
        ({"whole": 2.0}, "whole is 2.0"),
        ({"number": "1"}, "number is '1', which is no float"),
        ({"number": math.nan}, "number is nan"),
        ({"number": False}, "number is False"),
        ({"flag": 1}, "flag is 1, which is no bool"),
        ({"flag": None}, "flag is None"),
        ({"word": "c"}, "word is 'c', which is no 'a' | 'b'"),
        ({"layers": (True,)}, "layers is (True,), which is no Sequence of int | str | int | str | None"),
        ({"layers": 1.5}, "layers is 1.5"),
        ({"grid": (2, 3.0)}, "grid is (2, 3.0), which is no tuple of int | None"),
    ],
)
def test_what_does_not_is_one_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        Odd(**wrong)
    assert sentence in str(refused.value)


def test_arguments_of_a_plain_class_are_held_too() -> None:
    for wrong in ({"ratio": True}, {"words": 1}):
        with pytest.raises(UsageError, match=r"plain-pass: \w+ is .*, which is no"):
            Plain(**wrong)


def test_the_smallest_a_number_may_be() -> None:
    least(Odd(whole=1, number=0.0), whole=1, number=0)
    least(Odd(), whole=1)
    with pytest.raises(UsageError, match="Odd: whole is 0\n  try: 1 or more"):
        least(Odd(whole=0), whole=1)


def test_a_name_that_only_type_checkers_know_is_not_held_to_anything() -> None:
    @dataclass
    class Unknown:
        x: NotThere  # type: ignore[name-defined]  # noqa: F821

    check_options(Unknown(3))


def test_its_examples() -> None:
    assert doctest.testmod(options).failed == 0
