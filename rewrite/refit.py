"""The factors of a layer whose input is no longer what it was: they give what the layer gave, from what it is given now.

    y = W x + b    x of the model as it was, x' of the one whose layers before this one are factored

    W* = E[y x'^T] E[x' x'^T]^-1 = W + W E[(x - x') x'^T] E[x' x'^T]^-1        the best map from x' to y
    W' = R^-1 P_r P_r^T R W*                                                   the best of rank r (factors.py)
    b' = b + W E[x] - W' E[x']                                                 if there is a bias

The error of W' is that of W*, which no matrix undoes, and the tail of its factors under the covariance of x'. Layers are fitted
in the order of the graph, each in two runs over the data; kept are the sums of one input at a time, and the factors.

arXiv:2403.07378 (SVD-LLM), the sequential variant; reduced-rank regression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .calibration import Data
from .checkpoint import checksum
from .factors import RIDGE, Moments, factor
from .interpret import interpret
from .moments import added, token_rows
from .program import Program


@dataclass(frozen=True)
class Pairs:
    """What was seen of a value before and now: sums over the same rows, in float64.

    Attributes:
        cross: [n, n], the sum of x x'^T.
        before, now: the moments of x and of x'.
    """

    cross: Tensor
    before: Moments
    now: Moments


@dataclass(frozen=True)
class Fit:
    """Factors of a layer.

    Attributes:
        U, V: [m, r] and [r, n].
        shift: [m], what its bias takes; None without a bias.
        error: |W x + b - (U V x' + b')| / |W x + b| in the root mean square.
    """

    U: Tensor
    V: Tensor
    shift: Tensor | None
    error: float


@torch.no_grad()
def pairs(
    program: Program, data: Data, edits: Mapping[str, Tensor], node: fx.Node, axis: int, tokens: str = "attention_mask"
) -> Pairs:
    """The moments of a value over the tokens of all calls, and of the same value with ``edits`` in the place of weights.

    Args:
        edits: tensors by the names of the table.
        axis: of the channels.
        tokens: the input that is not zero where a token counts, if the model has one.

    Raises:
        UsageError: as of ``Data.watch`` and ``Data.checkpoint``.
    """
    names = [str(x.target) for x in program.placeholders]
    about = {"sites": {node.name: axis}, "tokens": tokens, "edits": checksum(edits)}
    kept = data.checkpoint("pairs", program, about)
    sums = dict(kept.saved)
    kept.state = lambda: sums
    for flat in data.each(program, kept):
        mask = flat[names.index(tokens)] != 0 if tokens in names else None
        x, now = (token_rows(_value(program, flat, node, given), axis, mask) for given in ({}, edits))
        for name, value in (("before", x), ("now", now)):
            known = _moments(sums, name) if f"{name} count" in sums else None
            m = added(known, value)
            sums |= {f"{name} second": m.second, f"{name} first": m.first, f"{name} count": torch.tensor(m.count)}
        cross = x.double().mT @ now.double()
        sums["cross"] = sums["cross"].to(cross.device) + cross if "cross" in sums else cross
    return Pairs(sums["cross"], _moments(sums, "before"), _moments(sums, "now"))


def fitted(W: Tensor, bias: Tensor | None, seen: Pairs, rank: int, G: Tensor | None = None) -> Fit:
    """The best factors of a layer of weight ``W`` [m, n], where an error e of its output costs e^T G e.

    Args:
        bias: [m], if it has one that may take a shift.
    """
    W, count = W.detach().double(), seen.now.count
    centred = bias is not None
    C, moved = seen.now.covariance(centred), seen.before.mean - seen.now.mean
    D = (seen.cross - seen.now.second) / count - (moved[:, None] * seen.now.mean if centred else 0)
    ridge = RIDGE * C.diagonal().mean() + torch.finfo(C.dtype).tiny
    best = W + W @ torch.linalg.solve(C + ridge * torch.eye(len(C), dtype=C.dtype, device=C.device), D.mT).mT
    found = factor(best, C, G)
    U, V = found.left[:, :rank], found.right[:, :rank].T @ best
    shift = W @ seen.before.mean - U @ (V @ seen.now.mean) if centred else None
    return Fit(U, V, shift, error_of(W, bias, seen, U @ V, shift))


def error_of(W: Tensor, bias: Tensor | None, seen: Pairs, fit: Tensor, shift: Tensor | None) -> float:
    """From the sums: E|W x - W' x' - s|^2 and E|W x + b|^2."""
    count, s = seen.now.count, torch.zeros_like(W[:, 0]) if shift is None else shift
    b = torch.zeros_like(s) if bias is None else bias.detach().double()
    before, now = W @ seen.before.mean, fit @ seen.now.mean
    power = ((W @ seen.before.second) * W).sum() / count
    lost = power - 2 * ((W @ seen.cross) * fit).sum() / count + ((fit @ seen.now.second) * fit).sum() / count
    lost = lost - 2 * s @ (before - now) + s @ s
    power = power + 2 * b @ before + b @ b
    return float((lost.clamp_min(0) / power.clamp_min(1e-300)).sqrt())


def _moments(sums: Mapping[str, Tensor], name: str) -> Moments:
    return Moments(sums[f"{name} second"], sums[f"{name} first"], int(sums[f"{name} count"]))


class _Reached(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


def _value(program: Program, flat: list[Any], node: fx.Node, edits: Mapping[str, Tensor]) -> Tensor:
    """One value of a run, which ends there."""

    def observe(at: fx.Node, value: Any) -> None:
        if at is node:
            raise _Reached(value)

    weight = lambda name: edits[name] if name in edits else program.weights.value(name)  # noqa: E731
    try:
        interpret(program, flat, weight=weight, observe=observe, noise=False)
    except _Reached as reached:
        found: Tensor = reached.value
    return found
