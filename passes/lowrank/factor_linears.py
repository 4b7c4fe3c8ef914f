"""Linear layers of low rank, each of the rank that a budget of parameters, FLOPs or time leaves it.

    linear(x, W, b)  ->  linear(linear(x, Q^T W), P, b + (W - P Q^T W) mu)

P Q^T W is the matrix of rank r that is nearest to W on what it is applied to over ``data``, where an error counts by what the
outputs of the model lose (rewrite/factors.py); with ``error="layer"`` all errors of the layer's output count alike, and P = Q.
Where the layer has a bias, the covariance of x is centred and the bias takes the mean mu; where it has none, none is added.
Without data this is the plain SVD: much worse, and said so.

Ranks: a dynamic program spends the budget where the outputs lose least, with "stays dense" among the options. What a layer loses
is predicted from the same statistics ("predicted"), or measured with one layer factored at a time ("measured"); "threshold" keeps
what saves the outputs most per cost, by one threshold on the weighted singular values of all layers. Errors of the layers' own
outputs cannot be compared: their sum is worse than one ratio for all, and is not offered. Losses do not quite add up, so a search
may then move budget between layers and measure the whole. None of it needs labels: the loss is the KL of the logits, or the
relative error of the outputs of a model without logits.

The budget is a part of the parameters of all layers, of their FLOPs in the example (a head that reads one position costs less
than a layer that reads them all), or of their time on the target (prices.py). Of a time, only layers that are faster in factors
there, at some rank, are part; the others stay dense.

With ``sequential=True`` the layers are then fitted again, in order, at the ranks they got: each to give what it gave in the dense
model from what the factored layers before it give now (rewrite/refit.py). Two more runs over the data for each layer input.

arXiv:2403.07378 (SVD-LLM: the whitened factors), arXiv:2410.14649 (EvoPress: the search).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from tautomer.rewrite.claims import APPROXIMATE
from tautomer.rewrite.divergence import sensitivities
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, UsageError
from tautomer.rewrite.factors import Factors, Moments, break_even, cost, factor
from tautomer.rewrite.latency import Latency
from tautomer.rewrite.layers import layer_of
from tautomer.rewrite.moments import moments
from tautomer.rewrite.options import check_options, least
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program
from tautomer.rewrite.refit import Fit

from .matrices import Matrix, matrix_of
from .prices import Of, Prices, Sizes, microseconds
from .rank_plan import Allocation, Choosing, RankPlan

Error = Literal["outputs", "layer"]
GRID = 64
"""A layer has about as many sizes to choose from, besides dense."""
MULTIPLE = 8
"""Ranks are multiples of it."""

aten = torch.ops.aten


class FactorLinears(Pass):
    """A linear layer → two thin ones; see the module.

    Args:
        ratio: the part of what all layers cost that may be factored (and that ``only`` and ``skip`` admit) which is left. From 1
            on, nothing is done.
        of: the cost: "parameters"; "flops" of the layers in the example; or "latency", their time there on the target, measured
            for each shape at a few ranks.
        allocation: where the budget goes: by losses "predicted" from the statistics or "measured" one layer at a time (a run of
            ``calls`` for each of two sizes of every layer); by one "threshold" on predicted losses; or "uniform": ``ratio`` in
            every layer.
        multiple: ranks are rounded down to a multiple of it; by default 8, or what the products of the target like best if the
            budget is a time.
        generations: of the search after the measured allocation; 0 is none.
        error: how errors of a layer's output are weighed: by what the "outputs" of the model lose, or all alike ("layer").
        calls: how many calls of the data the losses are measured on; their outputs are kept meanwhile.
        tokens: the input that is not zero where a token counts, if the model has one.
        sequential: fit each layer behind the factored ones before it; needs data.
        seed: of the search.
    """

    claim = APPROXIMATE("a matrix is replaced by the nearest one of a lower rank on the data")
    paper = "arXiv:2403.07378, arXiv:2410.14649"
    purpose: ClassVar[Purpose] = "size"

    def __init__(self, ratio: float = 0.6, *, of: Of = "parameters", allocation: Allocation = "predicted",
                 multiple: int | None = None, generations: int = 0, error: Error = "outputs", calls: int = 4,
                 tokens: str = "attention_mask", sequential: bool = False, seed: int = 0) -> None:  # fmt: skip
        check_options(self, locals())
        if not ratio > 0:
            raise UsageError(f"{self.name}: ratio is {ratio!r}", hint="the part of the parameters that is left, between 0 and 1")
        if allocation == "threshold" and of == "latency":
            raise UsageError("a threshold needs ranks of equal cost, which times are not", hint="allocation='predicted'")
        if allocation in ("predicted", "threshold") and error == "layer":
            raise UsageError("errors of layers cannot be compared", hint="error='outputs', or allocation='measured' or 'uniform'")
        self.ratio, self.of, self.allocation, self.multiple, self.generations = ratio, of, allocation, multiple, generations
        self.error, self.calls, self.tokens, self.seed = error, calls, tokens, seed
        self.sequential = sequential
        least(self, multiple=1, calls=1, generations=0)
        self._times: dict[Hashable, Latency] = {}

    def run(self, program: Program, context: Context) -> None:
        if self.sequential and context.data is None:
            raise UsageError("sequential=True fits the layers on data, and there is none", hint="data=[…]")
        if self.ratio >= 1:
            return
        editor, prices = Editor(program), Prices(self.of, program, context.target, self._times)
        priced = list(self._candidates(editor, prices, context))
        if not priced:
            return
        found, sizes = [c for c, _ in priced], [s for _, s in priced]
        seen: Mapping[fx.Node, Moments] = {}
        if context.data is not None:
            seen = moments(program, context.data, {c.x: c.layer.axis for c in found}, self.tokens)
        weighed = self._weighed(found, program, context)
        factors = self._factors(found, program, seen, weighed)
        how = Choosing(self.ratio, self.allocation, self.generations, self.calls, self.tokens, self.seed)
        plan = RankPlan(how, program, found, sizes, prices, factors, [seen[c.x].mean if c.x in seen else None for c in found])
        ranks = plan.ranks(context)
        if self.sequential and context.data is not None:
            plan.fit(ranks, weighed, context.data)
        errors = plan.errors(ranks, seen)
        for index, (candidate, rank) in enumerate(zip(found, ranks, strict=True)):
            if context.fuel is not None and context.fuel <= 0:
                break
            self._apply(candidate, rank, plan, index, editor, context)
        _tell(self, plan, ranks, seen, errors, context)

    def _candidates(self, editor: Editor, prices: Prices, context: Context) -> Iterator[tuple[Matrix, Sizes]]:
        for node in list(editor.program.graph.nodes):
            layer = layer_of(node) if node.op == "call_function" else None
            if layer is None or not context.admits(self, node):
                continue
            try:
                found = matrix_of(layer, editor)
                yield found, prices.sizes(layer, self._ranks(found, context))
            except Refused as refusal:
                context.refused(self, node, str(refusal))

    def _ranks(self, c: Matrix, context: Context) -> list[int]:
        """The ranks that a layer may take, increasing."""
        k, largest = self._multiple(context), break_even(c.m, c.n)
        if self.allocation == "threshold":
            return list(range(k, largest + 1, k))
        step = max(1, largest // k // GRID) * k
        wanted = int(self.ratio * c.m * c.n / (c.m + c.n)) // k * k
        return sorted({rank for rank in (*range(step, largest + 1, step), wanted) if 0 < rank <= largest})

    def _multiple(self, context: Context) -> int:
        best = context.target.multiple if self.of == "latency" and context.target is not None else MULTIPLE
        return self.multiple or best

    def _weighed(self, found: Sequence[Matrix], program: Program, context: Context) -> Mapping[fx.Node, Tensor]:
        if context.data is None or self.error != "outputs":
            return {}
        context.data.tell("measuring what the outputs depend on")
        return sensitivities(program, context.data, {c.layer.node: c.layer.axis for c in found}, self.tokens, self.seed)

    def _factors(
        self, found: Sequence[Matrix], program: Program, seen: Mapping[fx.Node, Moments], weighed: Mapping[fx.Node, Tensor]
    ) -> list[Factors]:
        return [
            factor(c.value(program), seen[c.x].covariance(c.bias is not None) if c.x in seen else None, weighed.get(c.layer.node))
            for c in found
        ]

    def _apply(self, c: Matrix, rank: int | None, plan: RankPlan, index: int, editor: Editor, context: Context) -> None:
        node = c.layer.node
        if rank is None:
            dense = (
                f"stays dense: {cost(c.m, c.n, None):,} parameters, which factors have from rank {break_even(c.m, c.n) + 1} on"
            )
            small = break_even(c.m, c.n) < self._multiple(context)
            context.refused(self, node, dense if small else "stays dense: the budget is spent better elsewhere")
            return
        c = replace(c, layer=layer_of(node) or c.layer)  # what it reads may have been factored by now
        fit, factors, mean = plan.fits.get(index), plan.factors[index], plan.means[index]
        emit = lambda op: [behind(op, c, fit) if fit is not None else low_rank(op, c, factors, rank, mean)]  # noqa: E731
        try:
            substitute(self, [node], emit, editor, context, copies=True)
        except Refused as refusal:
            context.refused(self, node, str(refusal))


def low_rank(op: GraphOps, c: Matrix, factors: Factors, rank: int, mean: Tensor | None) -> fx.Node:
    """linear(linear(x, Q^T W), P, b + (W - P Q^T W) mu)"""
    W, b, layer = c.layer.weight, c.layer.bias, c.layer
    where = c.beside
    kept = torch.promote_types(W.meta["val"].dtype, torch.float32)
    left, right = (axes[:, :rank].to(kept).contiguous() for axes in (factors.left, factors.right))
    P, Q = op.instead("left", left, W), op.measured(f"{where}right", right, W)
    matrix = op.reshape(W, [c.m, c.n]) if layer.kind.dims else W
    B = op.matmul(op.t(Q), matrix)
    if c.bias is not None and mean is not None:
        mu = op.measured(f"{where}mean", mean.to(kept), W)
        b = op.node(op.add(b, op.sub(op.mv(matrix, mu), op.mv(P, op.mv(B, mu)))), "bias", beside=W)
    return _two_layers(op, c, B, P, b)


def behind(op: GraphOps, c: Matrix, fit: Fit) -> fx.Node:
    """linear(linear(x, V), U, b + s), fitted to what stands before it."""
    W, b = c.layer.weight, c.layer.bias
    kept = torch.promote_types(W.meta["val"].dtype, torch.float32)
    V, U = (op.instead(name, x.to(kept).contiguous(), W) for name, x in (("right", fit.V), ("left", fit.U)))
    if fit.shift is not None:
        b = op.node(op.add(b, op.measured(f"{c.beside}shift", fit.shift.to(kept), W)), "bias", beside=W)
    return _two_layers(op, c, V, U, b)


def _two_layers(op: GraphOps, c: Matrix, V: Any, U: Any, b: Any) -> fx.Node:
    layer, for_kernel = c.layer, [1] * c.layer.kind.dims
    down, up = (op.reshape(M, [*M.fake.shape, *for_kernel]) if for_kernel else M for M in (V, U))
    first = layer.on(op, c.x, op.node(down, name=f"{c.beside}V"), None)
    return layer.on(op, first, op.node(up, name=f"{c.beside}U"), b)


def _tell(
    rewrite: FactorLinears, plan: RankPlan, ranks: Sequence[int | None], seen: Mapping[fx.Node, Moments],
    errors: Mapping[int, tuple[float, float]], context: Context,
) -> None:  # fmt: skip
    """One line per layer, one per shape that was timed, and one of the whole."""
    timed = {id(s.latency): (c, s.latency) for c, s in zip(plan.layers, plan.sizes, strict=True) if s.latency is not None}
    for c, time in timed.values():
        first = f"{microseconds(time.times[0])} in two factors of rank {time.ranks[0]}"
        dense = f"[{c.m}, {c.n}] {plan.prices.where(c.layer)} takes {microseconds(time.dense)}"
        context.noted(rewrite, c.layer.node, f"{dense}, {first}: break-even at rank {time.break_even}")
    for index, (c, rank) in enumerate(zip(plan.layers, ranks, strict=True)):
        if rank is None:
            continue
        loss = f", loss alone {plan.losses[index][plan.options[index].index(rank)]:.1e}" if plan.losses else ""
        part, node = cost(c.m, c.n, rank) / (c.m * c.n), c.layer.node
        alone = "" if index in errors else f", relative error {plan.factors[index].error(rank):.3f}"
        what = f"[{c.m}, {c.n}] at rank {rank}: {part:.2f} of its parameters{alone}{loss}"
        context.noted(rewrite, c.layer.node, what)
        if index in errors:
            context.estimated(rewrite, node, "relative error of the output", *errors[index])
        if c.x in seen and seen[c.x].count < c.n:
            few = f"{seen[c.x].count} tokens tell little of {c.n} channels: a ridge was added; give at least {10 * c.n}"
            context.noted(rewrite, c.layer.node, few)
    left = sum(s.costs[s.ranks.index(rank)] for s, rank in zip(plan.sizes, ranks, strict=True))
    prices = plan.prices
    amount = f"{prices.number(left)} of {prices.told(plan.total)}"
    whole = f"{amount} of {len(plan.layers)} layers are left ({left / plan.total:.3f})"
    if plan.divergence is not None:
        whole += f"; {plan.divergence.reading.what}: {plan.divergence(plan.edits(dict(enumerate(ranks)))):.2e}"
    if not seen:
        whole += "; without data this is the plain SVD of the weights: pass data=[…]"
    context.noted(rewrite, plan.program.output, whole)
