"""Let a form with weights of its own stand for softmax attention, and let it learn on data what attention gave.

    y = softmax(scale q kᵀ + mask) v   →   core(q, k, v; θ)         θ by attention transfer (transfer.py)

Another function, good only after training: without data it is refused, unless the user says that the model will be trained
(``architecture=True``). θ are parameters of the result, beside the attention they serve, and train on with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tautomer.rewrite.attention_report import Learning
from tautomer.rewrite.attentions import AttentionSite, Masking, Part
from tautomer.rewrite.axes import rank
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.emit import GraphOps
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.ops import Operand, Ops, TorchOps
from tautomer.rewrite.pass_base import Context, identify
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import dtype

from .feature_maps import FeatureMap, Heads, Side
from .substitute_attention import SubstituteAttention, weight_name
from .transfer import Effort, Student, Transfer, errors, transfer

aten = torch.ops.aten
UNTRAINED = (
    "it must learn what attention gave: pass data=[…] to optimize, an iterable of example calls. architecture=True puts it there "
    "untrained, for a model that will be trained: as it stands, {stands}"
)


@dataclass(frozen=True, eq=False)
class Trained:
    """What stands at a site: its weights by name, and how they were learnt."""

    weights: dict[str, Tensor]
    learning: Learning | None = None


@dataclass(frozen=True, eq=False)
class LearnedAttention(SubstituteAttention):
    """Attention → a form that learns; see the module.

    Class attributes:
        stands: what it is worth before it has learnt, for a refusal.

    Attributes:
        transfer: how it learns.
        architecture: put it there without data, untrained.
        seed: of what is drawn at the start.
    """

    represents: ClassVar[Masking] = Masking.CAUSAL | Masking.PADDING
    stands: ClassVar[str] = "even with a window it is worse than its own window alone"
    _: KW_ONLY
    transfer: Transfer = field(default_factory=Transfer)
    architecture: bool = False
    seed: int = 0

    @abstractmethod
    def initial(self, given: Heads, draw: torch.Generator) -> dict[str, Tensor]:
        """The weights to start with, by name.

        Raises:
            Refused: they need data, or there are none for these heads.
        """

    def trains(self, name: str) -> bool:
        """Whether a weight is trained; by default all are."""
        return True

    @property
    def measured(self) -> bool:
        """Whether the weights start from statistics of queries and keys; by default they do not."""
        return False

    @abstractmethod
    def core(self, op: Ops, site: AttentionSite, weights: Mapping[str, Operand]) -> Operand:
        """The new form, over nodes of the graph or over tensors."""

    def emit(self, op: GraphOps, site: AttentionSite, fact: Trained) -> Any:
        new = {
            name: value.to(op.dtype(site.query) if self.trains(name) else torch.float32) for name, value in fact.weights.items()
        }
        named = {name: op.tensor(weight_name(site, name), x, site.query, self.trains(name)) for name, x in new.items()}
        return self.core(op, site, named)

    def measure(self, program: Program, sites: Sequence[AttentionSite], context: Context) -> dict[fx.Node, Trained]:
        if context.data is None and not self.architecture:
            for site in sites:
                context.refused(self, site.node, UNTRAINED.format(stands=self.stands))
            return {}
        spreads = spread(sites, program, context.data) if context.data is not None and self.measured else {}
        draw = torch.Generator().manual_seed(self.seed)
        found = dict[fx.Node, dict[str, Tensor]]()
        for site in sites:
            try:
                found[site.node] = self.initial(spreads.get(site.node) or Heads(site.heads, site.width, site.scale), draw)
            except Refused as refusal:
                context.refused(self, site.node, str(refusal))
        if context.data is None:
            return {node: Trained(weights) for node, weights in found.items()}
        return self.learn([x for x in sites if x.node in found], found, program, context)

    def learnt(self, fact: Trained) -> Learning | None:
        return fact.learning

    def learn(
        self, sites: Sequence[AttentionSite], weights: Mapping[fx.Node, dict[str, Tensor]], program: Program, context: Context
    ) -> dict[fx.Node, Trained]:
        """The weights after the transfer, each as it started where it did not learn."""
        assert context.data is not None
        students = [self.student(site, weights[site.node]) for site in sites]
        before, trains = errors(students, program, context.data), any(student.weights for student in students)
        efforts = transfer(students, program, context.data, self.transfer) if trains else [Effort(0, False)] * len(students)
        after = errors(students, program, context.data) if trains else before
        made, starts = dict[fx.Node, Trained](), trains or self.measured
        for site, student, effort, first, last in zip(sites, students, efforts, before, after, strict=True):
            kept = not trains or last < first  # nan is no progress
            learning = Learning(effort.steps, first, last if kept else first, effort.stopped, kept) if starts else None
            made[site.node] = Trained({**weights[site.node], **(student.weights if kept else {})}, learning)
        return made

    def student(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> Student:
        wide = torch.promote_types(dtype(site.query), torch.float32)
        fixed = {name: x for name, x in weights.items() if not self.trains(name)}

        def counts(values: Mapping[fx.Node, Tensor]) -> Tensor | None:
            keep = kept(TorchOps(), valued(site, values)) if site.own else None
            return None if keep is None else keep.unsqueeze(-1)

        def run(values: Mapping[fx.Node, Tensor], trained: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = self.core(TorchOps(), valued(site, values), {**fixed, **trained})
            return y

        whole = (site.mask,) if Masking.OTHER in self.represents and site.mask is not None else ()
        operands = (site.query, site.key, site.value, *(part.node for part in site.padding), *whole)
        trained = {name: x.to(wide) for name, x in weights.items() if name not in fixed}
        return Student(identify(self, site.node), tuple(dict.fromkeys(operands)), site.node, run, trained, counts)


def valued(site: AttentionSite, values: Mapping[fx.Node, Tensor]) -> AttentionSite:
    """A site over tensors, in float32 at least."""
    q, k, v = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in map(values.__getitem__, (site.query, site.key, site.value))
    )
    padding = tuple(Part(values[part.node], part.keeps) for part in site.padding)  # type: ignore[arg-type]
    mask = values.get(site.mask) if site.mask is not None else None
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    return replace(site, query=q, key=k, value=v, padding=padding, mask=mask)  # type: ignore[arg-type]


def for_queries(op: Ops, site: AttentionSite, x: Operand) -> Operand:
    """A head of keys or values for every head of the queries."""
    return x if site.groups == 1 else op(aten.repeat_interleave.self_int)(x, site.groups, 1)


def keys_for_queries(op: Ops, site: AttentionSite) -> Operand:
    """A head of keys for every head of the queries."""
    return for_queries(op, site, site.key)


def kept(op: Ops, site: AttentionSite) -> Operand:
    """Which keys count, broadcast to ``[batch, heads, keys]``; None if all do."""
    mask = site.keys_kept(op)
    if mask is None:
        return None
    keep = mask if op.dtype(mask) is torch.bool else op(aten.gt.Scalar)(mask, -1e4)
    return op.select(keep, -2, 0) if rank(keep) > 1 else keep


def mapped(op: Ops, phi: FeatureMap, x: Operand, side: Side, weights: Mapping[str, Operand]) -> Operand:
    """φ(x), its weights those named ``query_map.…`` or ``key_map.…``."""
    prefix = f"{side}_map."
    return phi.features(op, x, side, {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})


def map_weights(phi: FeatureMap, given: Heads, draw: torch.Generator) -> dict[str, Tensor]:
    sides: tuple[Side, Side] = ("query", "key")
    return {f"{side}_map.{name}": x for side in sides for name, x in phi.initial(given, side, draw).items()}


def spread(sites: Sequence[AttentionSite], program: Program, data: Data) -> dict[fx.Node, Heads]:
    """What feature maps ask of queries and keys, over all calls."""
    wanted = {site.query for site in sites} | {site.key for site in sites}
    sums, tops = dict[fx.Node, Tensor](), dict[fx.Node, Tensor]()

    def see(node: fx.Node, value: Tensor) -> None:
        x = value.double()
        one = torch.stack([*torch.stack([torch.ones_like(x), x, x.square()]).sum((1, 3, 4)), x.norm(dim=-1).sum((0, 2))])
        sums[node] = sums[node] + one if node in sums else one
        top = x.amax((0, 2, 3))
        tops[node] = torch.maximum(tops[node], top) if node in tops else top

    data.watch(program, wanted, see)

    def deviation(node: fx.Node) -> Tensor:
        count, total, squares, _ = sums[node]
        variance: Tensor = squares / count - (total / count).square()
        return variance.clamp_min(0).sqrt()

    def length(node: fx.Node, width: int) -> Tensor:
        count, *_, norms = sums[node]
        found: Tensor = norms * width / count
        return found

    def of(site: AttentionSite) -> Heads:
        q, k, d, groups = site.query, site.key, site.width, site.groups
        spread = {"query": deviation(q), "key": deviation(k).repeat_interleave(groups)}
        lengths = {"query": length(q, d), "key": length(k, d).repeat_interleave(groups)}
        return Heads(site.heads, d, site.scale, spread, tops[k].repeat_interleave(groups), lengths)  # type: ignore[arg-type]

    return {site.node: of(site) for site in sites}
