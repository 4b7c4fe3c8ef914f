"""Let a cheaper form stand for softmax attention: what every such rewrite does alike.

    y = softmax(scale q kᵀ + mask) v   →   emit(op, site)

A method says what of a mask it has a place for, and writes its form. Here the places are chosen, and what the method cannot
represent is refused: nothing of a mask is ever dropped without a word.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import fx

from tautomer.rewrite.attentions import AttentionSite, Masking, attentions, site_of
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, UsageError, require
from tautomer.rewrite.masks import Masks
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program, path_of
from tautomer.rewrite.rules import shape
from tautomer.rewrite.shapes import product

NO_DATA = "it is measured on example calls: pass data=[…] to optimize"
LONG = 4096
"""The length at which the note of an application counts operations."""


@dataclass(frozen=True, eq=False)
class SubstituteAttention(Pass):
    """An attention → another form of it; see the module.

    Class attributes:
        represents: what of a mask the method has a place for.
        crosses: whether queries may come from another tensor than keys, or be fewer.

    Attributes:
        layers: which attentions, by their number in the program (the last is -1) or by module path; None is all.
    """

    represents: ClassVar[Masking] = Masking(0)
    crosses: ClassVar[bool] = False
    _: KW_ONLY
    layers: Sequence[int | str] | None = None

    def run(self, program: Program, context: Context) -> None:
        sites = self.sites(program, context)
        facts = self.measure(program, sites, context) if sites else {}
        editor = Editor(program)
        for site in sites:
            if site.node in facts:
                self.apply(site, facts[site.node], editor, context)

    def apply(self, site: AttentionSite, fact: Any, editor: Editor, context: Context) -> None:
        """Let the new form stand at ``site``, or enter why not."""
        emit = lambda op: [op.node(self.emit(op, site, fact))]  # noqa: E731
        try:
            substitute(self, [site.node], emit, editor, context, note=lambda op: self.note(op, site))
        except Refused as refusal:
            context.refused(self, site.node, str(refusal))

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

    @abstractmethod
    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        """The new form: a value of the attention's shape and dtype."""

    @abstractmethod
    def flops(self, site: AttentionSite, n: int) -> float:
        """Multiplications and additions of the new form per head at n positions; attention has 4 n² d."""

    def note(self, op: GraphOps, site: AttentionSite) -> str:
        """What the substitution changes, for the report."""
        made = sum(int(product(weight.meta.shape)) for name in op.staged if (weight := op.program.weights[name]).requires_grad)
        dense = lambda n: 2 * n * n * (site.width + int(shape(site.value)[-1]))  # noqa: E731
        fewer = next((2**i for i in range(1, 21) if self.flops(site, 2**i) < dense(2**i)), None)
        told = [f"{self.flops(site, LONG) / dense(LONG):.2g} of its operations at {LONG} positions"]
        told += [f"fewer from {fewer} on" if fewer else "never fewer"] + ([f"{made} parameters more"] if made else [])
        return ", ".join(told)

    def _chosen(self, nodes: list[fx.Node]) -> list[fx.Node]:
        if self.layers is None:
            return nodes
        chosen = set[fx.Node]()
        for layer in self.layers:
            if isinstance(layer, int):
                found = nodes[layer : layer + 1 or None]
            else:
                found = [node for node in nodes if f"{path_of(node)}.".startswith(f"{layer}.")]
            if not found:
                places = ", ".join(dict.fromkeys(map(path_of, nodes))) or "none"
                raise UsageError(f"layers: there is no attention {layer!r}", hint=f"{len(nodes)} attentions, at {places}")
            chosen.update(found)
        return [node for node in nodes if node in chosen]


_BEYOND = {
    Masking.OTHER: "its mask is nothing that {name} can represent: {unknown}",
    Masking.CAUSAL: "it is causal, and {name} lets positions see the future",
    Masking.WINDOW: "its mask is {band}, for which {name} has no place",
    Masking.PADDING: "some keys are padding, for which {name} has no place",
    Masking.BIAS: "a bias of positions is added to its scores, for which {name} has no place",
}


def weight_name(site: AttentionSite, name: str) -> str:
    """The name of a new weight beside the attention."""
    return ".".join(filter(None, (path_of(site.node), name)))
