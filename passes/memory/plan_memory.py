"""Choose for each block what its backward keeps, so that all fit a budget and the least is computed again.

    keep,  one bit per dropout,  operands of gates,  …,  compute inputs again,  checkpoint          for each block, one

What a block keeps under an option is read off the program (rewrite/saved.py), what is chosen comes from rewrite/budget.py. What
stands outside of blocks has the same options, but for the checkpoint. This pass only decides: it writes on the nodes which
rewrites may fire there, and those that come after it keep to that.

Options take the rewrites in their order, each with those before it. Norms are computed again last: several layers read one, and
each computes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tautomer.rewrite.allocation import Choice
from tautomer.rewrite.budget import Budget, Trial
from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.memory_plan import Chosen, MemoryPlan
from tautomer.rewrite.pass_base import Context, Log, Pass, Purpose
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import PLAN, Program, Site
from tautomer.rewrite.saved import saved_in_training

from .checkpoint_blocks import CheckpointBlocks, sites
from .recompute_inputs import RecomputeInputs, source_of


@dataclass(frozen=True)
class Way:
    """One option of a block.

    Attributes:
        name: what it is called in the plan.
        rewrites: those that may fire.
        norms: whether norms may be computed again.
    """

    name: str
    rewrites: tuple[str, ...]
    norms: bool = True


class MeasureMemory(Pass):
    """Note what the backward of the captured program keeps: what a budget is a fraction of."""

    claim = BITWISE("nothing changes")
    purpose: ClassVar[Purpose] = "form"

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        self.autocast = autocast

    def run(self, program: Program, context: Context) -> None:
        context.log.kept = saved_in_training(program, self.autocast).bytes


class PlanMemory(Pass):
    """Every block gets an option; see the module.

    Args:
        budget: a fraction of what ``MeasureMemory`` noted, or bytes.
        rewrites: what may be chosen, in order, ``CheckpointBlocks`` among them.
        autocast: the dtype of autocast that the program will be trained under, if any: it decides what is kept.
    """

    claim = BITWISE("nothing changes: it decides which rewrites may fire where")
    purpose: ClassVar[Purpose] = "form"

    def __init__(self, budget: float, rewrites: Sequence[Pass], autocast: torch.dtype | None = None) -> None:
        self.budget, self.rewrites, self.autocast = budget, tuple(rewrites), autocast

    def run(self, program: Program, context: Context) -> None:
        captured = context.log.kept
        assert captured is not None, "MeasureMemory comes first"
        budget = self.budget if isinstance(self.budget, int) else int(self.budget * captured)
        units = Units(program, self.rewrites, self.autocast, context)
        choice = units.budget.best(budget)
        if choice is None:
            raise self.missed(budget, captured, units.budget.tried(units.budget.least()).saved.bytes)
        units.write(program, choice)
        context.log.plan = units.plan(choice, budget, captured)

    def missed(self, budget: int, captured: int, floor: int) -> UsageError:
        hint = f"budget={floor}, or budget={math.ceil(1000 * floor / max(captured, 1)) / 1000}"
        exact = all(rewrite.claim.gradient != "approximate" for rewrite in self.rewrites)
        return UsageError(
            f"the budget is {budget:,} bytes of {captured:,}, and the least that the backward can keep is {floor:,}",
            hint=hint + ("; exact=False admits approximate gradients, which may keep less" if exact else ""),
        )


class Units:
    """The blocks of a program, in order, and as unit 0 what stands outside of them; and what each may choose."""

    def __init__(self, program: Program, rewrites: Sequence[Pass], autocast: torch.dtype | None, context: Context) -> None:
        self.program, self.rewrites, self.autocast, self.context = program, rewrites, autocast, context
        self.unit, self.names = dict[str, int](), ["outside of blocks"]
        blocks = (block for group in sites(program) for block in group)
        for block in sorted(blocks, key=lambda block: block.nodes[0]):
            self.unit |= dict.fromkeys((node.name for node in block.nodes), len(self.names))
            self.names.append(str(block))
        self.ways = [Way("all", tuple(rewrite.name for rewrite in rewrites if not isinstance(rewrite, CheckpointBlocks)))]
        fired = self.tried((0,) * len(self.names)).fired
        self.ways = list(ways(rewrite for rewrite in rewrites if rewrite.name in fired or isinstance(rewrite, CheckpointBlocks)))
        self.budget = Budget(len(self.names), len(self.ways), self.tried)

    def tried(self, choice: Choice) -> Trial:
        twin, log = self.program.copy(), Log()
        self.write(twin, choice)
        admitted = {name for way in choice for name in self.ways[way].rewrites}
        rewrites = [rewrite for rewrite in self.rewrites if rewrite.name in admitted]
        run_passes(rewrites, twin, Context(log, only=self.context.only, skip=self.context.skip), check=False)
        unit = {node.name: node.meta[PLAN].unit for node in twin.graph.nodes if PLAN in node.meta}
        return Trial(saved_in_training(twin, self.autocast), unit, frozenset(a.rewrite for a in log.applications))

    def write(self, program: Program, choice: Choice) -> None:
        """Let on every node of ``program`` fire what its unit chose."""
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            unit = self.unit.get(node.name, 0)
            way = self.ways[choice[unit]]
            source = None if way.norms else source_of(node)
            kept = {RecomputeInputs.name} if source is not None and source.by in ("layer_norm", "rms_norm") else set()
            node.meta[PLAN] = Site(unit, frozenset(way.rewrites) - kept)

    def plan(self, choice: Choice, budget: int, captured: int) -> MemoryPlan:
        before, after = self.budget.tried((0,) * len(choice)), self.budget.tried(choice)
        kept, keeps, again = before.kept, after.kept, after.again
        chosen = [
            Chosen(name, self.ways[way].name, self.ways[way].rewrites, kept[unit], keeps[unit], again[unit])
            for unit, (name, way) in enumerate(zip(self.names, choice, strict=True))
        ]
        return MemoryPlan(budget, captured, sum(before.saved.flops.values()), (*chosen[1:], chosen[0]))


def ways(rewrites: Iterable[Pass]) -> Iterator[Way]:
    """Nothing; more and more of the rewrites; a checkpoint."""
    yield Way("keep", ())
    names, last = tuple[str, ...](), list[Way]()
    for rewrite in rewrites:
        if isinstance(rewrite, CheckpointBlocks):
            last.append(Way("checkpoint", (rewrite.name,)))
            continue
        names += (rewrite.name,)
        if isinstance(rewrite, RecomputeInputs):
            yield Way("recompute but for norms", names, norms=False)
        yield Way(_CHOICES.get(rewrite.name, rewrite.name), names)
    yield from last


_CHOICES = {
    "pack-dropout-masks": "one bit per dropout",
    "lean-activations": "operands of gates",
    "lean-rms-norm": "inputs of norms",
    "share-norm-output": "outputs of norms, shared",
    "recompute-inputs": "recompute",
    "approximate-activations": "recompute, and two bits",
    "store-eight-bits": "recompute, and eight bits",
}
