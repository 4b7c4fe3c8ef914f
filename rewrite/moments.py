"""First and second moments of values of a program over the user's data, one pass, in float64.

Memory: n² + n numbers of 8 bytes for each distinct value of n channels; layers that read one value share them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from .calibration import Data
from .errors import UsageError
from .factors import Moments
from .program import Program, place

ROWS = 8192
"""Rows that are promoted at a time."""


def moments(
    program: Program, data: Data, values: Mapping[fx.Node, int], tokens: str = "attention_mask"
) -> dict[fx.Node, Moments]:
    """The moments of nodes over the tokens of all calls.

    Args:
        values: the nodes, and which of their axes holds the channels.
        tokens: the input that is not zero where a token counts, if the model has one. A value of another shape counts whole.

    Raises:
        UsageError: as of ``Data.watch`` and ``Data.checkpoint``, a value is not finite, or no token counts.
    """
    mask_input = next((node for node in program.placeholders if node.target == tokens), None)
    inputs = program.placeholders
    early = set() if mask_input is None else {node for node in inputs[: inputs.index(mask_input)] if node in values}
    kept = data.checkpoint("moments", program, {"sites": {node.name: axis for node, axis in values.items()}, "tokens": tokens})
    found = {node: _read(kept.saved, node.name) for node in values if f"{node.name} count" in kept.saved}
    kept.state = lambda: {name: x for node, m in found.items() for name, x in _written(m, node.name).items()}
    mask: Tensor | None = None
    waiting: list[tuple[fx.Node, Tensor]] = []

    def see(node: fx.Node, value: Tensor) -> None:
        nonlocal mask
        if node is mask_input:
            mask = value != 0
            while waiting:
                take(*waiting.pop())
        if node in early:  # this call's mask is still to come
            waiting.append((node, value))
        elif node in values:
            take(node, value)

    def take(node: fx.Node, value: Tensor) -> None:
        rows = token_rows(value, values[node], mask)
        if not rows.isfinite().all():
            what = f"data[{kept.calls - 1}]: '{node.name}' at {place(node)} holds NaN or infinity"
            raise UsageError(what, hint="a covariance needs finite values: look at this call, or at the dtype")
        found[node] = added(found.get(node), rows)

    data.watch(program, [node for node in (mask_input, *values) if node is not None], see, kept=kept)
    if empty := [node for node in values if node not in found or not found[node].count]:
        what = f"no token of data counts: nothing was seen of '{empty[0].name}' at {place(empty[0])}"
        raise UsageError(
            what, hint=f"'{tokens}' is not zero where a token counts" if mask_input is not None else "calls with rows"
        )
    return found


def token_rows(value: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """[N, n]: the vectors along an axis whose token counts; all, if the mask is of another shape."""
    x = value.movedim(axis, -1)
    return x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])


def added(known: Moments | None, rows: Tensor) -> Moments:
    """What is known when rows ``[..., N, n]`` have come too; the sums of ``known`` grow in place."""
    *batch, count, n = rows.shape
    second = rows.new_zeros((*batch, n, n), dtype=torch.float64) if known is None else known.second.to(rows.device)
    first = rows.new_zeros((*batch, n), dtype=torch.float64) if known is None else known.first.to(rows.device)
    for part in torch.split(rows, ROWS, dim=-2):
        promoted = part.double()
        second += promoted.mT @ promoted
        first += promoted.sum(-2)
    return Moments(second, first, count + (0 if known is None else known.count))


def _written(found: Moments, name: str) -> dict[str, Tensor]:
    return {f"{name} second": found.second, f"{name} first": found.first, f"{name} count": torch.tensor(found.count)}


def _read(saved: Mapping[str, Tensor], name: str) -> Moments:
    return Moments(saved[f"{name} second"], saved[f"{name} first"], int(saved[f"{name} count"]))
