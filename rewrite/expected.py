"""What a captured graph expects of its inputs, checked once per call in plain integers.

A size of the capture is a number (fixed) or a symbol (any size, but one symbol is one size). What eager PyTorch would
report three layers deep, or broadcast without a word, is one sentence here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError
from .program import Program
from .shapes import key


@dataclass(frozen=True)
class Expected:
    """One tensor input.

    Attributes:
        name: for messages.
        kind: "floating", "integer", "boolean" or "complex"; the graph computes something else for another kind.
        device: "cpu" or "cuda"; sizes that the graph makes tensors of are made there.
        shape: a number where the size is fixed, the symbol's text where it is free.
    """

    name: str
    kind: str
    device: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return _brackets("*" if isinstance(size, str) else size for size in self.shape)


def expected(program: Program) -> tuple[Expected | None, ...]:
    """What the graph of ``program`` expects of every flat input; None for what is no tensor or is never read."""
    found: list[Expected | None] = []
    for node, name in zip(program.placeholders, program.signature.leaf_names, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not node.users:
            found.append(None)
            continue
        shape = tuple(size if isinstance(size := key(s), int) else str(size) for s in value.shape)
        found.append(Expected(name, kind_of(value.dtype), value.device.type, shape))
    return tuple(found)


def kind_of(dtype: torch.dtype) -> str:
    """The kind of numbers a dtype holds.

    Example:
        >>> kind_of(torch.bfloat16), kind_of(torch.int64)
        ('floating', 'integer')
    """
    if dtype is torch.bool:
        return "boolean"
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def check(flat: Sequence[Any], inputs: Sequence[Expected | None], owner: str) -> None:
    """Hold the flat inputs of a call to what the graph expects.

    Raises:
        UsageError: an input is no tensor, or has another kind, device or shape than the capture allows.
    """
    sizes: dict[str, tuple[Any, Expected, int]] = {}
    for value, want in zip(flat, inputs, strict=True):
        if want is None:
            continue
        if not isinstance(value, Tensor):
            raise UsageError(f"'{want.name}' is no tensor; {owner} was captured with a tensor there")
        if kind_of(value.dtype) != want.kind:
            raise UsageError(f"'{want.name}' holds {value.dtype}; {owner} was captured with {want.kind} numbers there")
        if value.device.type != want.device:
            raise UsageError(
                f"'{want.name}' is on {value.device}; {owner} was captured on {want.device}",
                hint="capture the model again on the device it will run on",
            )
        if value.dim() != len(want.shape):
            raise UsageError(f"'{want.name}' has shape {_brackets(value.shape)}; {owner} was captured with {want}")
        _check_sizes(value, want, sizes, owner)


def _check_sizes(value: Tensor, want: Expected, sizes: dict[str, tuple[Any, Expected, int]], owner: str) -> None:
    for axis, size in enumerate(want.shape):
        given = value.shape[axis]
        if isinstance(size, int):
            if given != size:
                raise UsageError(
                    f"'{want.name}' has shape {_brackets(value.shape)}; {owner} was captured with {want}, axis {axis} is fixed",
                    hint="capture the model with this axis dynamic, or with an example of this size",
                )
            continue
        first, other, there = sizes.setdefault(size, (given, want, axis))
        if given != first:
            raise UsageError(
                f"'{want.name}' has size {given} in axis {axis} and '{other.name}' {first} in axis {there}; "
                f"{owner} was captured with one size for both"
            )


def _brackets(sizes: Any) -> str:
    return f"[{', '.join(map(str, sizes))}]"
