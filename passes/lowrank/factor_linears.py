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
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from tautomer.rewrite.allocation import Choice, Option, allocate, between, evolve, require_feasible, spent, threshold
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.claims import APPROXIMATE
from tautomer.rewrite.divergence import Divergence, sensitivities
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, UsageError, require
from tautomer.rewrite.factors import Factors, Moments, break_even, cost, factor
from tautomer.rewrite.latency import Latency
from tautomer.rewrite.layers import Layer, layer_of
from tautomer.rewrite.moments import moments
from tautomer.rewrite.options import check_options, least
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program, target_name
from tautomer.rewrite.refit import Fit, Pairs, error_of, fitted, pairs

from .prices import Of, Prices, Sizes, microseconds

Allocation = Literal["predicted", "measured", "uniform", "threshold"]
Error = Literal["outputs", "layer"]
GRID = 64
"""A layer has about as many sizes to choose from, besides dense."""
MULTIPLE = 8
"""Ranks are multiples of it."""
PROBES = (0.3, 0.7)
"""The sizes at which the loss of a layer is measured."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Matrix:
    """A layer y = W x + b that may be factored.

    Attributes:
        layer: the call; ``layer.weight`` may be the transpose of the weight of the table.
        name: of the weight in the table.
        bias: the name of its bias in the table; None if it has none.
        m, n: outputs and inputs.
    """

    layer: Layer
    name: str
    bias: str | None
    m: int
    n: int

    @property
    def x(self) -> fx.Node:
        x: fx.Node = self.layer.bound[self.layer.kind.x]
        return x

    def value(self, program: Program) -> Tensor:
        """W as [m, n], in float64."""
        return self.turned(program.weights.value(self.name, torch.float64)).reshape(self.m, self.n)

    def turned(self, W: Tensor) -> Tensor:
        """W of the layer from that of the table, or the other way round."""
        return W if self.layer.weight.op == "get_attr" else W.T


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
        plan = _Plan(self, program, found, sizes, prices, factors, [seen[c.x].mean if c.x in seen else None for c in found])
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
                found = candidate(layer, editor)
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

    def _apply(self, c: Matrix, rank: int | None, plan: _Plan, index: int, editor: Editor, context: Context) -> None:
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


def candidate(layer: Layer, editor: Editor) -> Matrix:
    """The layer, if it may be factored.

    Raises:
        Refused: it may not.
    """
    program, W, b = editor.program, layer.weight, layer.bias
    require(not program.weights.live, "its weight is edited at every call: factor the model first, and train the factors")
    if layer.kind.dims:
        pointwise = not layer.transposed and layer.groups == 1 and all(size == 1 for size in W.meta["val"].shape[2:])
        plain = pointwise and not any(map(any, layer.padding)) and _all_one(layer.bound["stride"])
        require(plain, "a convolution is a linear layer only with kernel and stride 1, without groups and padding")
    stored = W.args[0] if W.target is aten.t.default else W
    is_weight = isinstance(stored, fx.Node) and stored.op == "get_attr" and editor.constant(stored)
    require(is_weight, "the weight is computed at run time, or from others: fold-weights first")
    assert isinstance(stored, fx.Node)
    name = str(stored.target)
    names = {str(n.target) for n in program.graph.find_nodes(op="get_attr") if str(n.target) in program.weights.aliases(name)}
    readers = {r for n in program.graph.find_nodes(op="get_attr") if str(n.target) in names for r in n.users}
    readers = {user for r in readers for user in (r.users if r.target is aten.t.default else [r])}
    other = next((reader for reader in readers if reader is not layer.node), None)
    if other is not None:
        raise Refused(f"'{name}' is also read by {target_name(other)} '{other.name}', which needs it whole")
    bias = str(b.target) if isinstance(b, fx.Node) and b.op == "get_attr" and editor.constant(b) else None
    return Matrix(layer, name, bias, layer.outputs, layer.inputs)


def low_rank(op: GraphOps, c: Matrix, factors: Factors, rank: int, mean: Tensor | None) -> fx.Node:
    """linear(linear(x, Q^T W), P, b + (W - P Q^T W) mu)"""
    W, b, layer = c.layer.weight, c.layer.bias, c.layer
    where = _beside(c)
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
        b = op.node(op.add(b, op.measured(f"{_beside(c)}shift", fit.shift.to(kept), W)), "bias", beside=W)
    return _two_layers(op, c, V, U, b)


def _two_layers(op: GraphOps, c: Matrix, V: Any, U: Any, b: Any) -> fx.Node:
    layer, for_kernel = c.layer, [1] * c.layer.kind.dims
    down, up = (op.reshape(M, [*M.fake.shape, *for_kernel]) if for_kernel else M for M in (V, U))
    first = layer.on(op, c.x, op.node(down, name=f"{_beside(c)}V"), None)
    return layer.on(op, first, op.node(up, name=f"{_beside(c)}U"), b)


def _beside(c: Matrix) -> str:
    """What a name begins with that stands beside the weight."""
    return "".join(c.name.rpartition(".")[:2])


class _Plan:
    """Which rank each layer takes: what was measured, and what it was measured with."""

    def __init__(self, rewrite: FactorLinears, program: Program, layers: Sequence[Matrix], sizes: Sequence[Sizes],
                 prices: Prices, factors: Sequence[Factors], means: Sequence[Tensor | None]) -> None:  # fmt: skip
        self.rewrite, self.program, self.layers, self.factors, self.means = rewrite, program, layers, factors, means
        self.sizes, self.prices = sizes, prices
        self.total = sum(s.costs[-1] for s in sizes)
        self.budget = int(rewrite.ratio * self.total)
        self.options = [s.ranks for s in sizes]
        self.losses: list[list[float]] = []
        self.divergence: Divergence | None = None
        self.fits: dict[int, Fit] = {}

    def fit(self, ranks: Sequence[int | None], weighed: Mapping[fx.Node, Tensor], data: Data) -> None:
        """Fit each layer at its rank behind those before it."""
        inputs: dict[fx.Node, list[int]] = {}
        for index, rank in enumerate(ranks):
            if rank is not None:
                inputs.setdefault(self.layers[index].x, []).append(index)
        edits: dict[str, Tensor] = {}
        for number, (x, indices) in enumerate(inputs.items(), 1):
            data.tell(f"fitting what reads input {number} of {len(inputs)}")
            seen = pairs(self.program, data, edits, x, self.layers[indices[0]].layer.axis, self.rewrite.tokens)
            for index in indices:
                c, rank = self.layers[index], ranks[index]
                assert rank is not None
                bias = None if c.bias is None else self.program.weights.value(c.bias, torch.float64)
                self.fits[index] = fitted(c.value(self.program), bias, seen, rank, weighed.get(c.layer.node))
            edits |= self.edits({index: ranks[index] for index in indices})

    def ranks(self, context: Context) -> list[int | None]:
        costs = [s.costs for s in self.sizes]
        require_feasible([[Option(size, 0.0) for size in row] for row in costs], self.budget, self.prices.told)
        if context.data is None:
            return self._of(self._uniform())
        calls = list(islice(context.data.each(self.program), self.rewrite.calls))
        self.divergence = Divergence(self.program, calls, self.rewrite.tokens)
        if self.rewrite.allocation == "uniform":
            return self._of(self._uniform())
        self.losses = [self._curve(index, context) for index in range(len(self.layers))]
        curves = [[Option(*o) for o in zip(sizes, row, strict=True)] for sizes, row in zip(costs, self.losses, strict=True)]
        start = (threshold if self.rewrite.allocation == "threshold" else allocate)(curves, self.budget)
        if self.rewrite.generations:
            start = self._best_start(start, curves)
            start = evolve(curves, self.budget, start, self._fitness, self.rewrite.generations, seed=self.rewrite.seed)
        return self._of(start)

    def _best_start(self, start: Choice, curves: Sequence[Sequence[Option]]) -> Choice:
        """The allocation, or what is uniform if that measures better."""
        uniform = self._uniform()
        fits = spent(curves, uniform) <= self.budget
        return min([start, uniform] if fits else [start], key=lambda choice: self._fitness(choice, 1))

    def _uniform(self) -> Choice:
        """In every layer the largest rank whose cost is within the ratio; the smallest, if that is dearer."""
        wanted = self.rewrite.ratio
        fitting = [[i for i, size in enumerate(s.costs[:-1]) if size <= wanted * s.costs[-1]] for s in self.sizes]
        return tuple(max(row, default=0) for row in fitting)

    def _of(self, choice: Choice) -> list[int | None]:
        return [row[index] for row, index in zip(self.options, choice, strict=True)]

    def _curve(self, index: int, context: Context) -> list[float]:
        """The loss of one layer by option: predicted, or measured at the probes and between them in proportion to that."""
        assert self.divergence is not None and context.data is not None
        c, f, row = self.layers[index], self.factors[index], self.options[index]
        if self.rewrite.allocation in ("predicted", "threshold"):
            return [0.0 if rank is None else 0.5 * float(f.tail[rank]) for rank in row]
        context.data.tell(f"measuring layer {index + 1} of {len(self.layers)}")
        ranks = [rank for rank in row if rank is not None]
        wanted = [ratio * c.m * c.n / (c.m + c.n) for ratio in PROBES]
        probes = sorted({min(ranks, key=lambda rank, w=w: abs(rank - w)) for w in wanted}) if ranks else []  # type: ignore[misc]
        scale = {rank: max(0.0, self.divergence(self.edits({index: rank}))) / max(float(f.tail[rank]), 1e-300) for rank in probes}
        return [0.0 if rank is None else between(rank, scale) * float(f.tail[rank]) for rank in row]

    def _fitness(self, choice: Choice, stage: int) -> float:
        assert self.divergence is not None
        calls = len(self.divergence.calls)
        chosen = dict(enumerate(self._of(choice)))
        return self.divergence(self.edits(chosen), range(calls if stage else max(1, calls // 4)))

    def errors(self, ranks: Sequence[int | None], seen: Mapping[fx.Node, Moments]) -> dict[int, tuple[float, float]]:
        """|y' - y| / |y| of what factored layers give, predicted and measured in the factored model, by layer."""
        if self.divergence is None:
            return {}
        chosen = {index: rank for index, rank in enumerate(ranks) if rank is not None}
        nodes = {self.layers[index].layer.node: self.layers[index].layer.axis for index in chosen}
        measured = self.divergence.at(nodes, self.edits(chosen))
        return {
            index: (self._predicted(index, rank, seen[self.layers[index].x]), measured[self.layers[index].layer.node])
            for index, rank in chosen.items()
        }

    def _predicted(self, index: int, rank: int, seen: Moments) -> float:
        """Of the layer alone, or behind the fitted ones before it."""
        c, fit = self.layers[index], self.fits.get(index)
        if fit is not None:
            return fit.error
        W = c.value(self.program)
        product = self.factors[index].product(W, rank)
        bias = None if c.bias is None else self.program.weights.value(c.bias, torch.float64)
        shift = None if bias is None else (W - product) @ seen.mean
        return error_of(W, bias, Pairs(seen.second, seen, seen), product, shift)

    def edits(self, ranks: Mapping[int, int | None]) -> dict[str, Tensor]:
        """The weights of the table with some layers of a lower rank."""
        weights: dict[str, Tensor] = {}
        for index, rank in ranks.items():
            c, mean = self.layers[index], self.means[index]
            if rank is None:
                continue
            old = self.program.weights.value(c.name)
            W = c.turned(old.detach()).reshape(c.m, c.n)
            wide = W.to(torch.promote_types(W.dtype, torch.float32))
            fit = self.fits.get(index)
            product = self.factors[index].product(wide, rank) if fit is None else (fit.U @ fit.V).to(wide)
            weights[c.name] = c.turned(product.reshape(c.turned(old).shape)).to(old.dtype)
            if c.bias is not None and mean is not None:
                b = self.program.weights.value(c.bias).detach()
                shift = (wide - product) @ mean.to(wide) if fit is None or fit.shift is None else fit.shift.to(wide)
                weights[c.bias] = (b + shift).to(b.dtype)
        return weights


def _tell(
    rewrite: FactorLinears, plan: _Plan, ranks: Sequence[int | None], seen: Mapping[fx.Node, Moments],
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


def _all_one(stride: Any) -> bool:
    return all(n == 1 for n in (stride if isinstance(stride, Sequence) else [stride]))
