"""A mask that is computed from sizes alone, as the band it keeps.

    keep[i, j]  ⇔  i - left ≤ j ≤ i + right        unbounded on either side if None

Everything: (None, None). Causal: (None, 0). A window of w positions: (w - 1, 0). Positions count from the top left.

A subgraph whose leaves are sizes, literals and weights that do not train is a function of a few integers. It is
evaluated at several bindings of them, and is a band if it is the same band at every one. Thresholds hide in literals
(a window of 4096 looks causal at length 16), so every literal and every size of a table among the leaves is exceeded
once; a literal beyond ``LARGEST`` makes the mask unknown. The claim is "checked at sizes …", no more and no less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .errors import Refused, require
from .ops import is_pure
from .program import Program
from .samples import alike
from .shapes import Size
from .weights import Weights

aten = torch.ops.aten

LARGEST = 8192
"""The longest sequence a mask is evaluated at. One with thresholds beyond it stays unknown."""

LOW = -1e9
"""What is added to a score to mask it: this, or the dtype's lowest number, or less."""

_ENDLESS = 10**9
_BASES = ((2, 5, 7, 11, 13), (3, 8, 6, 12, 10), (4, 13, 17, 9, 14))

Sizes = Mapping[Any, int]


@dataclass(frozen=True)
class Band:
    """What a mask keeps; see the module.

    Attributes:
        left, right: how far before and after its own position a row sees; None is unbounded.
        sizes: the sizes it was checked at, for a sentence.
    """

    left: int | None
    right: int | None
    sizes: str = ""

    @property
    def full(self) -> bool:
        return self.left is None and self.right is None

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0

    @property
    def keeps_own(self) -> bool:
        """Whether every position sees itself."""
        return (self.left is None or self.left >= 0) and (self.right is None or self.right >= 0)

    def __and__(self, other: Band) -> Band:
        """What both keep."""
        sides = ((self.left, other.left), (self.right, other.right))
        left, right = (min((x for x in side if x is not None), default=None) for side in sides)
        return Band(left, right, other.sizes or self.sizes)

    def __str__(self) -> str:
        if self.full:
            return "full"
        if self.right == 0:
            return "causal" if self.left is None else f"a window of {self.left + 1}"
        return f"a band of {self.left} before and {self.right} after"


class Masks:
    """The masks of one version of a program, computed on demand and remembered.

    Args:
        program: must not change while these facts are in use.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._groups = alike(program)
        self._values: dict[fx.Node, list[Tensor] | Refused] = {}

    def band(self, node: fx.Node, *, keeps: bool = True, behind: bool = False) -> Band:
        """What ``node`` keeps: True in a boolean mask (False if it says what it drops), zero in one that is added.

        Args:
            behind: whether positions count from the bottom right, as behind a past of any length.

        Raises:
            Refused: its values depend on more than sizes, or it is no band.
        """
        masks = [kept(value) if keeps else ~kept(value) for value in self.values(node)]
        band = _band([mask.flip(-2, -1) for mask in masks]) if behind else _band(masks)
        band = Band(band.right, band.left) if behind else band
        return Band(band.left, band.right, ", ".join(dict.fromkeys(f"{mask.shape[-2]}×{mask.shape[-1]}" for mask in masks)))

    def values(self, node: fx.Node) -> list[Tensor]:
        """The values of ``node`` at the sizes tried, at least three.

        Raises:
            Refused: they depend on more than sizes, or no three sizes can be tried.
        """
        if node not in self._values:
            try:
                self._values[node] = self._evaluate(node)
            except Refused as refusal:
                self._values[node] = refusal
        found = self._values[node]
        if isinstance(found, Refused):
            raise Refused(str(found))
        return found

    def _evaluate(self, node: fx.Node) -> list[Tensor]:
        region = size_region(node, self.program.weights)
        thresholds = set(_thresholds(region, self.program.weights))
        longest = max(thresholds, default=0)
        require(longest <= LARGEST, f"the mask compares with {longest}, more than the {LARGEST} positions it can be tried at")
        tried = (self._value(node, region, sizes) for sizes in self._bindings(thresholds))
        values = [value for value in tried if value is not None]
        require(len(values) >= 3, "the mask could not be evaluated at three sizes")
        return values

    def _bindings(self, thresholds: set[int]) -> Iterator[Sizes]:
        """Small distinct sizes; all of them one; each threshold exceeded by each free size in turn.

        Equal sizes of the example may have to be equal, or may not: both are tried, and what cannot run does not count.
        """
        singles = [[symbol] for group in self._groups for symbol in group]
        for groups in (self._groups, singles) if len(singles) > len(self._groups) else (self._groups,):
            bases = [dict(zip(range(len(groups)), base * len(groups), strict=False)) for base in _BASES]
            bases.append(dict.fromkeys(range(len(groups)), 1))
            total = sum(thresholds)
            beyond = sorted(thresholds | ({total} if 0 < total <= LARGEST else set()))
            bases += [{**bases[0], index: size + 2} for size in beyond for index in range(len(groups))]
            bases += [{**bases[0], index: size} for size in beyond for index in range(len(groups))]
            for base in bases:
                yield {symbol: size for index, size in base.items() for symbol in groups[index]}

    def _value(self, node: fx.Node, region: Sequence[fx.Node], sizes: Sizes) -> Tensor | None:
        """``node`` at these sizes; None if the program does not run at them."""
        try:
            value = evaluate(region, self.program.weights, sizes)[node]
        except (RuntimeError, IndexError, ValueError):
            return None
        fits = isinstance(value, Tensor) and value.ndim >= 2 and list(value.shape) == _shape(node, sizes)
        return value if fits else None


def kept(mask: Tensor) -> Tensor:
    """The positions a mask keeps.

    Raises:
        Refused: it is neither boolean nor made of zeros and lowest numbers.
    """
    if mask.dtype is torch.bool:
        return mask
    require(mask.is_floating_point(), f"the mask is {mask.dtype}, neither boolean nor floating")
    keep = mask == 0
    low = mask <= max(LOW, torch.finfo(mask.dtype).min)
    require(bool((keep | low).all()), "the mask is a bias: it holds more than zeros and lowest numbers")
    return keep


def _band(masks: Sequence[Tensor]) -> Band:
    """The one band that all of ``masks`` are."""
    left = right = 0
    bounded = [False, False]
    offsets = [_offset(mask) for mask in masks]
    for mask, offset in zip(masks, offsets, strict=True):
        rows, columns = mask.shape[-2:]
        seen = offset[mask.reshape(-1, rows, columns).any(0)]
        require(seen.numel() > 0, "the mask keeps nothing")
        first, last = int(seen.min()), int(seen.max())
        left, right = max(left, -first), max(right, last)
        bounded = [bounded[0] or first > 1 - rows, bounded[1] or last < columns - 1]
    band = Band(left if bounded[0] else None, right if bounded[1] else None)
    for mask, offset in zip(masks, offsets, strict=True):
        keep = torch.ones_like(offset, dtype=torch.bool)
        if band.left is not None:
            keep &= offset >= -band.left
        if band.right is not None:
            keep &= offset <= band.right
        require(bool((mask == keep).all()), "the mask depends on sizes alone but keeps no band of positions")
    return band


def _offset(mask: Tensor) -> Tensor:
    """j - i."""
    rows, columns = mask.shape[-2:]
    return torch.arange(columns) - torch.arange(rows)[:, None]


# -- functions of sizes ---------------------------------------------------------------------------------------


def size_region(node: fx.Node, weights: Weights) -> list[fx.Node]:
    """What ``node`` is computed from, in order, itself last.

    Raises:
        Refused: something else than sizes, literals and weights that do not train is among it.
    """
    found, stack = set[fx.Node](), [node]
    while stack:
        at = stack.pop()
        if at in found:
            continue
        found.add(at)
        if at.op == "placeholder":
            require(not isinstance(at.meta.get("val"), Tensor), f"the mask depends on the input '{at.target}'")
        elif at.op == "get_attr":
            require(at.target in weights, f"the mask depends on '{at.target}'")
            require(not weights[str(at.target)].requires_grad, f"the mask depends on '{at.target}', which trains")
            require(not weights[str(at.target)].meta.is_meta, f"the mask depends on '{at.target}', which has no values yet")
        else:
            require(is_pure(at.target) and not at.meta.get("tautomer_mutated"), f"the mask depends on '{at.name}'")
        stack.extend(operand for operand in at.all_input_nodes if not (_reads_shape_alone(at) and operand is at.args[0]))
    return sorted(found)


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The input tensors whose values ``node`` depends on."""
    found, stack = set[fx.Node](), [node]
    while stack:
        at = stack.pop()
        if at not in found:
            found.add(at)
            stack.extend(operand for operand in at.all_input_nodes if not (_reads_shape_alone(at) and operand is at.args[0]))
    return sorted(at for at in found if at.op == "placeholder" and isinstance(at.meta.get("val"), Tensor))


_SHAPE_ALONE = frozenset({
    aten.sym_size.int, aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default,
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default,
})  # fmt: skip


def _reads_shape_alone(node: fx.Node) -> bool:
    """Whether the values of the first operand do not matter."""
    return node.target in _SHAPE_ALONE


def evaluate(region: Sequence[fx.Node], weights: Weights, sizes: Sizes) -> dict[fx.Node, Any]:
    """The values of a region of sizes alone, with its symbols bound."""
    values: dict[fx.Node, Any] = {}

    def read(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        return torch.empty(_shape(node, sizes), dtype=node.meta["val"].dtype)

    for node in region:
        if node.op == "placeholder":
            values[node] = node.meta["val"]
        elif node.op == "get_attr":
            values[node] = weights.value(str(node.target)).detach().cpu()
        else:
            args, kwargs = fx.node.map_arg((node.args, {k: v for k, v in node.kwargs.items() if k != "device"}), read)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _shape(node: fx.Node, sizes: Sizes) -> list[int]:
    return [_bound(size, sizes) for size in node.meta["val"].shape]


def _bound(size: Size, sizes: Sizes) -> int:
    if isinstance(size, int):
        return size
    bound = size.node.expr.subs(sizes)
    require(bound.is_Integer, f"the size {size} depends on more than the sizes of the inputs")
    return int(bound)


def _thresholds(region: Sequence[fx.Node], weights: Weights) -> Iterator[int]:
    """Where the values of a region may change their pattern: its literals, and the sizes of its tables."""
    numbers: list[Any] = []
    for node in region:
        if node.op == "get_attr":
            table = weights.value(str(node.target))
            numbers += [*table.shape, *(table.flatten().tolist() if table.numel() <= 16 else ())]
        fx.node.map_aggregate((node.args, node.kwargs), numbers.append)
    for number in numbers:
        if isinstance(number, (int, float)) and not isinstance(number, bool) and 2 <= abs(number) < _ENDLESS:
            yield int(abs(number))
