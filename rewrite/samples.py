"""Inputs to verify on: the example's own values, at other sizes.

Sizes that are symbols are shrunk (a float64 run should be cheap) and varied: batch 1 and an odd length are where
specialised graphs lie. Integers keep to the example's values (an index out of range is not a counterexample), masks of
zeros and ones keep their pattern, floats keep mean and spread. Sizes that the program was not captured for (it took
another branch there) are no samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program
from .shapes import Size
from .signature import holds

_BATCH, _LENGTH = 2, 16
_ODD = 7


@dataclass(frozen=True)
class Sample:
    """Flat inputs and what is special about them."""

    inputs: tuple[Any, ...]
    sizes: str


def samples(program: Program, *, seed: int = 0) -> Iterator[Sample]:
    """The example at small sizes; then, where sizes are symbols, batch 1 with an odd length and fresh values.

    Only sizes that the conditions of the program admit: where these are not, the nearest that are. A program without
    symbolic sizes yields its example alone.
    """
    generator = torch.Generator().manual_seed(seed)
    first, *others = _admitted(program) or [{}]
    yield _sized(program, first, None)
    for sizes in others[:1]:
        yield _sized(program, sizes, generator)


def admits(program: Program, inputs: Sequence[Any]) -> bool:
    """Whether ``program`` was captured for flat inputs of these sizes."""
    return all(holds(condition, inputs) for condition in program.signature.conditions)


def _admitted(program: Program) -> list[dict[Any, int]]:
    """Different sizes of the symbols that the program admits: a small one first, then one as odd as it may be."""
    symbols = _symbols(program)
    found: list[dict[Any, int]] = []
    for wanted in (_SMALL, _ODD_ONES):
        for batch_size, length in wanted:
            # Equal sizes of the example may be different symbols (ids and their mask): equal hints get equal sizes.
            sizes = {symbol: (batch_size if batch else length)(hint) for symbol, (hint, batch) in symbols.items()}
            if sizes not in found and admits(program, _sized(program, sizes, None).inputs):
                found.append(sizes)
                break
    return found


def _another(length: int) -> int:
    """A length other than ``length``, odd where there is room."""
    return _ODD if length > _ODD else length - 2 if length > 4 else length + 1


def _same(size: int) -> int:
    return size


def _next(size: int) -> int:
    return size + 1


_Choice = tuple[Callable[[int], int], Callable[[int], int]]
_SMALL: tuple[_Choice, ...] = (
    (lambda _: _BATCH, lambda length: min(length, _LENGTH)),
    (lambda _: _BATCH, _same),
    (_same, _same),
)
"""Batch and length from the example's, the best first."""
_ODD_ONES: tuple[_Choice, ...] = (
    (lambda _: 1, _another),
    (lambda _: 1, _next),
    (lambda _: 1, _same),
    (_next, _another),
    (_next, _next),
    (_next, _same),
    (_same, _next),
    (_same, _same),
)


def as_given(program: Program) -> Sample:
    """The example itself."""
    inputs = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in program.example)
    return Sample(inputs, _show(program, inputs))


def _symbols(program: Program) -> dict[Any, tuple[int, bool]]:
    """Every free symbol of the inputs: its size in the example, and whether it is some leading dim (a batch)."""
    found: dict[Any, tuple[int, bool]] = {}
    for node, value in zip(program.placeholders, program.example, strict=True):
        for axis, symbol in symbolic_dims(node):
            found.setdefault(symbol, (int(value.shape[axis]), axis == 0))
    return found


def symbolic_dims(node: fx.Node) -> list[tuple[int, Any]]:
    """The dims of an input whose size is a plain symbol."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return []
    sizes: list[tuple[int, Any]] = [(axis, size) for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
    return [(axis, size.node.expr) for axis, size in sizes if size.node.expr.is_Symbol]


def example_sizes(program: Program) -> dict[Any, int]:
    """The value of every symbol in the example."""
    return {
        symbol: int(value.shape[axis])
        for node, value in zip(program.placeholders, program.example, strict=True)
        for axis, symbol in symbolic_dims(node)
    }


def number(size: Size, sizes: Mapping[Any, int]) -> int:
    """A size of the graph in the example; 1 if it depends on the data."""
    if isinstance(size, int):
        return size
    value = size.node.expr.subs(sizes)
    return int(value) if value.is_Integer else 1


def alike(program: Program) -> list[list[Any]]:
    """The free symbols of the inputs, those with equal sizes in the example together: they may have to be equal."""
    hints: dict[int, list[Any]] = {}
    seen: set[Any] = set()
    for node, value in zip(program.placeholders, program.example, strict=True):
        for axis, symbol in symbolic_dims(node):
            if symbol not in seen:
                seen.add(symbol)
                hints.setdefault(int(value.shape[axis]), []).append(symbol)
    return list(hints.values())


def _sized(program: Program, sizes: dict[Any, int], generator: torch.Generator | None) -> Sample:
    inputs = []
    for node, value in zip(program.placeholders, program.example, strict=True):
        if not isinstance(value, Tensor):
            inputs.append(value)
            continue
        resized = value.detach()
        for axis, symbol in symbolic_dims(node):
            resized = resize(resized, axis, sizes.get(symbol, resized.shape[axis]))
        inputs.append(refresh(resized, generator) if generator is not None else resized.clone())
    return Sample(tuple(inputs), _show(program, inputs))


def resize(value: Tensor, axis: int, size: int) -> Tensor:
    """``value`` with ``size`` entries along ``axis``: its first ones, repeated if there are too few."""
    index = torch.arange(size, device=value.device) % value.shape[axis]
    return value.index_select(axis, index)


def refresh(value: Tensor, generator: torch.Generator) -> Tensor:
    """Other values of the same kind: floats by mean and spread, integers from the values at hand, masks as they are."""
    if value.is_complex():
        return torch.view_as_complex(refresh(torch.view_as_real(value), generator).contiguous())
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return noise * value.std() + value.mean() if value.numel() > 1 else value.clone()
    if value.dtype is torch.bool or value.numel() == 0 or (int(value.min()) >= 0 and int(value.max()) <= 1):
        return value.clone()
    index = torch.randint(value.numel(), value.shape, generator=generator).to(value.device)
    return value.flatten()[index]


def _show(program: Program, inputs: Sequence[Any]) -> str:
    shapes = (
        f"{node.target}{list(x.shape)}" for node, x in zip(program.placeholders, inputs, strict=True) if isinstance(x, Tensor)
    )
    return ", ".join(shapes)
