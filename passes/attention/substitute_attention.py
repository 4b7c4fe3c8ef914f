"""Let a cheaper form stand for softmax attention: what every such rewrite does alike.

    y = softmax(scale q kᵀ + mask) v   →   emit(op, site)

A method says what of a mask it has a place for, and writes its form. Here the places are chosen, and what the method cannot
represent is refused: nothing of a mask is ever dropped without a word.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tautomer.rewrite.attention_report import AttentionReport, Learning, Place
from tautomer.rewrite.attentions import AttentionSite, Masking, attentions, kept, site_of
from tautomer.rewrite.beside import Twins, beside, relative
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.divergence import Reading, divergence
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, UsageError, require
from tautomer.rewrite.masks import Masks
from tautomer.rewrite.options import check_options, least
from tautomer.rewrite.pass_base import Context, Pass, identify
from tautomer.rewrite.program import Program, path_of, source_of
from tautomer.rewrite.rules import shape
from tautomer.rewrite.shapes import product

from .layer_budget import Chosen, choose

NO_DATA = "it is measured on example calls: pass data=[…] to optimize"
_LEFT = "it is left alone, as layers=, only=, skip= or fuel= ask"
LONG = 4096
"""The length at which the note of an application counts operations."""
_LENGTHS = [2**i for i in range(1, 21)]


@dataclass(frozen=True, eq=False)
class SubstituteAttention(Pass):
    """An attention → another form of it; see the module.

    With ``data``, the report (``fast.report.attentions``) has the error of every new output there, on the inputs of the original,
    and how far the outputs of the model moved.

    Class attributes:
        represents: what of a mask the method has a place for.
        crosses: whether queries may come from another tensor than keys, or be fewer.

    Attributes:
        layers: which attentions, by their number in the program (the last is -1) or by module path; one or several, None is all.
        budget: the divergence of the model's outputs (KL of its logits, or their relative error if it has none) that may not be
            exceeded on ``data``: where it would be, attentions stay as they are (layer_budget.py). None is no limit.
    """

    represents: ClassVar[Masking] = Masking(0)
    crosses: ClassVar[bool] = False
    _: KW_ONLY
    layers: Sequence[int | str] | int | str | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        check_options(self)
        least(self, budget=0)

    def run(self, program: Program, context: Context) -> None:
        found = [Place(identify(self, node), False, source=source_of(node)) for node in attentions(program)]
        sites = self.sites(program, context)
        facts = self.measure(program, sites, context) if sites else {}
        sites, data = [site for site in sites if site.node in facts], context.data
        if data is None and self.budget is not None:
            for site in sites:
                context.refused(self, site.node, f"how far the outputs move is not known: {NO_DATA}")
            sites = []
        known: dict[str, dict[str, Any]] = {identify(self, x.node): {"learning": self.learnt(facts[x.node])} for x in sites}
        errors, chosen, moved = dict[fx.Node, float](), None, None
        if data is None or not sites:
            made = self.put(program, sites, facts, errors, context)
        else:
            original, errors = program.copy(), self.errors(program, sites, facts, data)
            chosen = self.within_budget(program, sites, facts, context)
            for site in sites:
                alone = chosen.alone[site] if chosen else None
                known[identify(self, site.node)] |= {"error": errors[site.node], "alone": alone}
            made = self.put(program, chosen.items if chosen else sites, facts, errors, context)
            moved = divergence(original, program, data) if made else None
        reasons = {refusal.id: refusal.reason for refusal in context.log.refusals if refusal.rewrite == self.name}
        told = {place.id: "" if place.id in made else reasons.get(place.id, _LEFT) for place in found}
        places = tuple(replace(x, replaced=x.id in made, reason=told[x.id], **known.get(x.id, {})) for x in found)
        selection = chosen.selection if chosen else None
        context.log.attentions.append(AttentionReport(self.name, self.claim.name, places, moved, selection))

    def put(
        self, program: Program, sites: Sequence[AttentionSite], facts: Mapping[fx.Node, Any], errors: Mapping[fx.Node, float],
        context: Context,
    ) -> set[str]:  # fmt: skip
        """Put the new form at all sites; the ids of those where it stands."""
        editor, made = Editor(program), set[str]()
        for site in sites:
            emit = lambda op, site=site: [op.node(self.emit(op, site, facts[site.node]))]  # noqa: E731
            note = lambda op, site=site: self.note(op, site, errors.get(site.node))  # noqa: E731
            name = identify(self, site.node)
            try:
                substitute(self, [site.node], emit, editor, context, note=note)
                made.add(name)
            except Refused as refusal:
                context.refused(self, site.node, str(refusal))
        return made

    def errors(
        self, program: Program, sites: Sequence[AttentionSite], facts: Mapping[fx.Node, Any], data: Data
    ) -> dict[fx.Node, float]:
        """The relative error of every new output on ``data`` where queries are no padding, on the inputs of the original."""
        found, at = {site.node: torch.zeros(2, dtype=torch.float64) for site in sites}, {site.node: site for site in sites}

        def emit(op: GraphOps, place: fx.Node, twins: Twins) -> tuple[Any, Any]:
            site = at[place].on(twins)
            return self.emit(op, site, facts[place]), site.keys_kept(op) if site.own else None

        def see(place: fx.Node, values: list[Tensor | None]) -> None:
            new, keep, old = values
            assert new is not None and old is not None
            if keep is not None:
                rows = kept(keep).mT
                new, old = (x.masked_fill(~rows, 0) for x in (new, old))
            found[place] += relative(new - old, old)

        beside(program, list(at), emit).watch(data, see)
        return {node: math.sqrt(float(error / value)) if value else 0.0 for node, (error, value) in found.items()}

    def within_budget(
        self, program: Program, sites: Sequence[AttentionSite], facts: Mapping[fx.Node, Any], context: Context
    ) -> Chosen[AttentionSite] | None:
        """The sites that together stay within the budget; None without one."""
        if self.budget is None or context.data is None:
            return None

        def moved(chosen: Sequence[AttentionSite]) -> float:
            at = {site.node: site for site in chosen}
            emit = lambda op, place, twins: [self.emit(op, at[place].on(twins), facts[place])]  # noqa: E731
            made = beside(program, list(at), emit)
            for place, (new,) in made.made.items():
                made.twins[place].replace_all_uses_with(new)  # type: ignore[arg-type]
            return divergence(program, made.program, context.data).mean  # type: ignore[arg-type]

        saved = {site: max(1.0, site.heads * (_softmax(site, LONG) - self.flops(site, LONG))) for site in sites}
        chosen, what = choose(saved, self.budget, moved), Reading(program).what
        for site, value in chosen.refused.items():
            alone = chosen.alone[site]
            over = f"more than the budget of {self.budget:.2e}"
            alone_it = f"alone it moves the {what} on data by {alone:.2e}, {over}"
            with_it = f"with it the {what} on data is {value:.2e}, {over} (alone: {alone:.2e})"
            context.refused(self, site.node, with_it if value != alone else alone_it)
        return chosen

    def sites(self, program: Program, context: Context) -> list[AttentionSite]:
        """Where the method may stand: chosen, admitted and represented."""
        found, masks = list[AttentionSite](), Masks(program)
        for node in self._chosen(attentions(program)):
            if not context.admits(self, node):
                continue
            try:
                site = site_of(node, masks)
                self.check(site)
                found.append(site)
            except Refused as refusal:
                context.refused(self, node, str(refusal))
        return found[: context.fuel]

    def check(self, site: AttentionSite) -> None:
        """Refuse a site that the method cannot represent; a method with more conditions adds them."""
        require(site.dropout == 0.0, "attention weights are dropped out, and the new form draws none")
        beyond = site.masking & ~self.represents
        for part, sentence in _BEYOND.items():
            require(part not in beyond, sentence.format(name=self.name, band=site.band, unknown=site.unknown))
        if not self.crosses:
            require(not site.cached, f"keys of a cache are among its keys, and {self.name} counts positions from the first query")
            require(site.own, f"its queries and keys are not of one sequence, as {self.name} needs")

    def measure(self, program: Program, sites: Sequence[AttentionSite], context: Context) -> Mapping[fx.Node, Any]:
        """What the method must know of each site, by node, before any is rewritten; a site left out stays (say why)."""
        return {site.node: None for site in sites}

    def learnt(self, fact: Any) -> Learning | None:
        """How the form with this fact learnt; None if it did not."""
        return None

    @abstractmethod
    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        """The new form: a value of the attention's shape and dtype."""

    @abstractmethod
    def flops(self, site: AttentionSite, n: int) -> float:
        """Multiplications and additions of the new form per head at n positions; attention has 4 n² d."""

    def note(self, op: GraphOps, site: AttentionSite, error: float | None = None) -> str:
        """What the substitution changes, for the report."""
        made = sum(int(product(weight.meta.shape)) for name in op.staged if (weight := op.program.weights[name]).requires_grad)
        share = {n: self.flops(site, n) / _softmax(site, n) for n in _LENGTHS}
        fewer = next((n for n in _LENGTHS if share[n] < 1), None)
        told = [f"{share[LONG]:.2g} of its operations at {LONG} positions"]
        told += [f"fewer from {fewer} on" if fewer else "never fewer"] + ([f"{made} parameters more"] if made else [])
        return ", ".join(told + ([f"off by {error:.2g} on data"] if error is not None else []))

    def _chosen(self, nodes: list[fx.Node]) -> list[fx.Node]:
        if self.layers is None:
            return nodes
        chosen = set[fx.Node]()
        for layer in (self.layers,) if isinstance(self.layers, int | str) else self.layers:
            if isinstance(layer, int):
                found = nodes[layer : layer + 1 or None]
            else:
                found = [node for node in nodes if f"{path_of(node)}.".startswith(f"{layer}.")]
            if not found:
                places = ", ".join(filter(None, dict.fromkeys(map(path_of, nodes)))) or "none of its modules"
                raise UsageError(f"layers: there is no attention {layer!r}", hint=f"{len(nodes)} attentions, at {places}")
            chosen.update(found)
        return [node for node in nodes if node in chosen]


_BEYOND = {
    Masking.OTHER: "its mask is nothing that {name} can represent: {unknown}",
    Masking.CAUSAL: "it is causal, and {name} lets positions see the future",
    Masking.WINDOW: "its mask is {band}, for which {name} has no place",
    Masking.PADDING: "some keys are padding, for which {name} has no place",
    Masking.NUMBERS: "numbers are added to its scores key by key; for {name} a key counts or does not: make the mask boolean",
    Masking.BIAS: "a bias of positions is added to its scores, for which {name} has no place",
}


def _softmax(site: AttentionSite, n: int) -> float:
    """The operations of attention itself per head at n positions."""
    return 2.0 * n * n * (site.width + int(shape(site.value)[-1]))


def weight_name(site: AttentionSite, name: str) -> str:
    """The name of a new weight beside the attention."""
    return ".".join(filter(None, (path_of(site.node), name)))
