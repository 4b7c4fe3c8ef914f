"""Python text in pieces: an expression whose variables and numbers are still open.

Two modules are one class if their code is equal up to the names of variables and the values of numbers. So text is kept as
a tuple of strings, ``Var`` (a value, not yet named) and ``Number`` (a value that a constructor argument may replace).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

ATOM, POWER, UNARY, PRODUCT, SUM, SHIFT, AND, XOR, OR, COMPARE, NOT, TERNARY = range(12, 0, -1)
"""How tightly an expression binds."""


@dataclass(frozen=True)
class Var:
    """A variable: ``value`` is the node it holds, or the size."""

    value: Hashable


@dataclass(frozen=True)
class Number:
    """A number in the text, and what it would be called."""

    value: int | float
    role: str


@dataclass(frozen=True)
class Instance:
    """``Class(…)``: a class of the file, by its number, and the numbers in its text as this instance has them.

    A number may be a variable of a comprehension, by name.
    """

    number: int
    numbers: tuple[Number | str, ...]


@dataclass(frozen=True)
class Option:
    """``, name=number``, left out where the number is the default."""

    name: str
    number: Number | str
    default: int | float


Part = str | Var | Number | Instance | Option


@dataclass(frozen=True)
class Code:
    """An expression or a piece of a statement.

    Attributes:
        parts: its text.
        level: how tightly its outermost operator binds.
        cost: how many operations it has.
    """

    parts: tuple[Part, ...]
    level: int = ATOM
    cost: int = 0

    @property
    def variables(self) -> list[Var]:
        return [part for part in self.parts if isinstance(part, Var)]

    def mapped(self, function: Callable[[Part], Part]) -> Code:
        return Code(tuple(map(function, self.parts)), self.level, self.cost)


Piece = Code | str


def code(*pieces: Piece, level: int = ATOM, cost: int | None = None) -> Code:
    """The concatenation of pieces, one operation more than they have together unless ``cost`` says otherwise."""
    parts = list[Part]()
    for piece in pieces:
        for part in (piece,) if isinstance(piece, str) else piece.parts:
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part != "":
                parts.append(part)
    inner = sum(piece.cost for piece in pieces if isinstance(piece, Code))
    return Code(tuple(parts), level, inner + 1 if cost is None else cost)


def plain(text: str, level: int = ATOM) -> Code:
    return Code((text,), level)


def var(value: Hashable) -> Code:
    return Code((Var(value),))


def number(value: int | float, role: str) -> Code:
    return Code((Number(value, role),), UNARY if value < 0 else ATOM)


def within(piece: Code, level: int) -> Code:
    """``piece`` as an operand that must bind at least as tightly as ``level``."""
    return piece if piece.level >= level else code("(", piece, ")", cost=piece.cost)


def listed(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces with commas between."""
    found = list[Piece]()
    for piece in pieces:
        found.extend([", ", piece] if found else [piece])
    return found


def call(function: Piece, *args: Piece, **kwargs: Piece) -> Code:
    """``function(*args, **kwargs)``"""
    named = [code(f"{name}=", value, cost=value.cost if isinstance(value, Code) else 0) for name, value in kwargs.items()]
    return code(function, "(", *listed([*args, *named]), ")")


def method(owner: Code, name: str, *args: Piece, **kwargs: Piece) -> Code:
    """``owner.name(*args, **kwargs)``"""
    return call(code(within(owner, ATOM), f".{name}", cost=owner.cost), *args, **kwargs)


def tuple_of(pieces: list[Code]) -> Code:
    """A tuple in parentheses."""
    inner = listed(pieces)
    return code("(", *inner, ",)" if len(pieces) == 1 else ")", cost=sum(piece.cost for piece in pieces))


def binary(left: Code, sign: str, right: Code, level: int) -> Code:
    """``left sign right``; only a chain from the left needs no parentheses, and a comparison has no chain."""
    first = level + 1 if level in (COMPARE, POWER) else level
    if sign == "**" and all(x.cost == 0 and x.level >= UNARY for x in (left, right)):
        return code(within(left, ATOM), sign, within(right, UNARY), level=level)
    return code(within(left, first), f" {sign} ", within(right, level + 1), level=level)


# -- literals --------------------------------------------------------------------------------------------------


def literal(value: Any, role: str) -> Code:
    """A constant of a graph as Python text.

    Raises:
        TypeError: it has none.
    """
    if value is None or isinstance(value, (bool, str)):
        return plain(_quoted(value) if isinstance(value, str) else repr(value))
    if isinstance(value, (int, float)):
        special = _special(value)
        return special if special is not None else number(value, role)
    if isinstance(value, torch.dtype):
        return plain(str(value))
    if isinstance(value, torch.device):
        return plain(f'torch.device("{value}")')
    if isinstance(value, (torch.memory_format, torch.layout)):
        return plain(str(value))
    if isinstance(value, complex):
        return plain(f"complex({value.real!r}, {value.imag!r})")
    if isinstance(value, (list, tuple)):
        return tuple_of([literal(x, role) for x in value])
    raise TypeError(f"a constant of type {type(value).__name__}")


def _quoted(text: str) -> str:
    shown = repr(text)
    return '"' + shown[1:-1] + '"' if shown[0] == "'" and '"' not in shown else shown


def _special(value: int | float) -> Code | None:
    if isinstance(value, float) and not math.isfinite(value):
        return plain('float("nan")' if math.isnan(value) else 'float("inf")' if value > 0 else '-float("inf")')
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        if isinstance(value, float) and abs(value) == torch.finfo(dtype).max:
            return plain(f"torch.finfo({dtype}).{'max' if value > 0 else 'min'}")
    return None


# -- text ------------------------------------------------------------------------------------------------------

WIDTH = 120


def wrapped(text: str, indent: int) -> list[str]:
    """A line of code as ``ruff format`` lays it out: if it is too long, split in its last brackets."""
    pad = " " * indent
    if indent + len(text) <= WIDTH:
        return [pad + text]
    if text.startswith("return ") and len(_split(text.removeprefix("return "))) > 1:
        text = f"return ({text.removeprefix('return ')})"
    opening, closing = _brackets(text)
    if opening is None:
        return [pad + text]
    head, body, tail = text[: opening + 1], text[opening + 1 : closing], text[closing:]
    if indent + 4 + len(body) <= WIDTH and not body.endswith(","):
        return [pad + head, f"{pad}    {body}", pad + tail]
    first, rest = _comprehension(body)
    if rest:
        return [pad + head, *wrapped(first, indent + 4), *wrapped(f"for {rest}", indent + 4), pad + tail]
    lines = [line for piece in _split(body) for line in wrapped(f"{piece},", indent + 4)]
    return [pad + head, *lines, pad + tail]


def _comprehension(body: str) -> tuple[str, str]:
    """The two sides of ``for`` in a comprehension; the second is empty if it is none."""
    depth = 0
    for index, sign in _signs(body):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0 and body[index:].startswith(" for "):
            return body[:index], body[index + 5 :]
    return body, ""


def _brackets(text: str) -> tuple[int | None, int]:
    """The last outermost pair of brackets that holds something."""
    pairs, stack = list[tuple[int, int]](), list[int]()
    for index, sign in _signs(text):
        if sign in "([{":
            stack.append(index)
        elif sign in ")]}":
            start = stack.pop()
            if not stack and index > start + 1:
                pairs.append((start, index))
    return pairs[-1] if pairs else (None, 0)


def _signs(text: str) -> Iterator[tuple[int, str]]:
    """The characters of ``text`` that are not inside a string."""
    quote = ""
    for index, sign in enumerate(text):
        if sign == '"':
            quote = "" if quote else sign
        elif not quote:
            yield index, sign


def _split(body: str) -> list[str]:
    """``body`` at its outermost commas."""
    pieces, depth, start = list[str](), 0, 0
    for index, sign in _signs(body):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            pieces.append(body[start:index].strip())
            start = index + 1
    rest = body[start:].strip()
    return [*pieces, rest] if rest else pieces
