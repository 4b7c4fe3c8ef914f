"""Choose for each block what its backward keeps, so that all fit a budget and the least is computed again.

    one bit per dropout,  operands of gates,  …,  inputs computed again,      each where it fits, or not;  or a checkpoint

What each application would change is read off the program (rewrite/effects.py), what is chosen comes from a dynamic program over
the blocks (rewrite/budget.py), which is exact. What stands outside of blocks has the same options, but for the checkpoint. This
pass only decides: it writes on the nodes which rewrites may fire there, and those that come after it keep to that. A plan is
tried before it is written, so what it says of bytes and FLOPs was read off the rewritten program.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tautomer.rewrite.blocks import Block
from tautomer.rewrite.checkpoints import given
from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.effects import effects_of
from tautomer.rewrite.errors import Refused, UsageError
from tautomer.rewrite.memory_options import Again, Choice, Options
from tautomer.rewrite.memory_pass import TrainingPass
from tautomer.rewrite.memory_plan import Chosen, MemoryPlan
from tautomer.rewrite.pass_base import Context, Log, Pass, Purpose
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import PLAN, Program, Site
from tautomer.rewrite.saved import SavedTensors, saved_in_training

from .checkpoint_blocks import CheckpointBlocks, require_gain, sites

TRIES = 6


class MeasureMemory(TrainingPass):
    """Note what the backward of the captured program keeps: what a budget is a fraction of.

    Args: as of ``TrainingPass``.
    """

    claim = BITWISE("nothing changes")
    purpose: ClassVar[Purpose] = "form"

    def run(self, program: Program, context: Context) -> None:
        context.log.kept = self.saved(program).bytes


class PlanMemory(Pass):
    """Every place gets an option; see the module.

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
        planner = Planner(program, self.rewrites, self.autocast, context)
        found = planner.best(budget)
        if found is None:
            raise self.missed(budget, captured, planner.tried(planner.options.least()).saved.bytes)
        choice, trial = found
        planner.write(program, choice)
        context.log.plan = planner.plan(choice, trial, budget, captured)

    def missed(self, budget: int, captured: int, floor: int) -> UsageError:
        hint = f"budget={floor}, or budget={math.ceil(1000 * floor / max(captured, 1)) / 1000}"
        exact = all(rewrite.claim.gradient != "approximate" for rewrite in self.rewrites)
        return UsageError(
            f"the budget is {budget:,} bytes of {captured:,}, and the least that the backward can keep is {floor:,}",
            hint=hint + ("; exact=False admits approximate gradients, which may keep less" if exact else ""),
        )


@dataclass(frozen=True)
class Trial:
    """What a program keeps under some choice, and the captured call that each of its calls stands for."""

    saved: SavedTensors
    calls: Mapping[str, str]


class Planner:
    """The blocks of a program, in order, and as unit 0 what stands outside of them; and what each may choose."""

    def __init__(self, program: Program, rewrites: Sequence[Pass], autocast: torch.dtype | None, context: Context) -> None:
        self.program, self.rewrites, self.autocast, self.context = program, rewrites, autocast, context
        self.unit, self.names, self.first = dict[str, int](), ["outside of blocks"], dict[str, int]()
        self.saved = self.kept(program)
        blocks = sorted(sites(program), key=lambda block: block.nodes[0])
        for index, block in enumerate(blocks, 1):
            self.unit |= dict.fromkeys((node.name for node in block.nodes), index)
            self.first[block.nodes[0].name] = index
            self.names.append(str(block))
        others = [rewrite for rewrite in rewrites if not isinstance(rewrite, CheckpointBlocks)]
        self.effects = effects_of(others, program, self.kept, context)
        order = {node.name: place for place, node in enumerate(program.graph.nodes)}
        self.options = Options(self.effects, self.unit, dict(self.again(blocks)), order)

    def kept(self, program: Program) -> SavedTensors:
        return saved_in_training(program, self.autocast)

    def again(self, blocks: Sequence[Block]) -> Iterator[tuple[int, Again]]:
        """The blocks that may be run again."""
        checkpoint = next((rewrite for rewrite in self.rewrites if isinstance(rewrite, CheckpointBlocks)), None)
        for index, block in enumerate(blocks, 1):
            if checkpoint is None or not self.context.lets(checkpoint, block.nodes[0]):
                continue
            with contextlib.suppress(Refused):
                nodes = require_gain(self.saved, block)
                keys = frozenset(key for x in given(nodes) for key in self.effects.values.get(x.name, ()))
                yield index, Again(keys, sum(self.saved.flops.get(node.name, 0) for node in nodes))

    def best(self, budget: int) -> tuple[Choice, Trial] | None:
        """The choice that computes the least again within ``budget`` bytes, and what it was found to keep; None if there is none.

        A choice that keeps more than its parts say is one in which a rewrite declined: the next aim is as much lower.
        """
        aim = budget
        for _ in range(TRIES):
            choice = self.options.best(aim)
            if choice is None:
                return None
            trial = self.tried(choice)
            if trial.saved.bytes <= budget:
                return choice, trial
            aim -= trial.saved.bytes - budget
        return None

    def tried(self, choice: Choice) -> Trial:
        twin = self.program.copy()
        self.write(twin, choice)
        chosen = {name for node in twin.graph.nodes if PLAN in node.meta for name in node.meta[PLAN].rewrites}
        rewrites = [rewrite for rewrite in self.rewrites if rewrite.name in chosen]
        run_passes(rewrites, twin, Context(Log(), only=self.context.only, skip=self.context.skip), check=False)
        return Trial(self.kept(twin), {node.name: node.meta[PLAN].call for node in twin.graph.nodes if PLAN in node.meta})

    def write(self, program: Program, choice: Choice) -> None:
        """Let on every node of ``program`` fire what was chosen there."""
        admitted = defaultdict[str, set[str]](set)
        for effect in (self.effects.found[index] for index in choice.effects):
            for call in effect.at:
                admitted[call].add(effect.rewrite)
        for call, unit in self.first.items():
            if unit in choice.again:
                admitted[call].add(CheckpointBlocks.name)
        for node in program.graph.nodes:
            if node.op == "call_function":
                node.meta[PLAN] = Site(node.name, frozenset(admitted[node.name]))

    # -- what is told ------------------------------------------------------------------------------------------

    def plan(self, choice: Choice, trial: Trial, budget: int, captured: int) -> MemoryPlan:
        before = Trial(self.saved, {node.name: node.name for node in self.program.graph.nodes})
        kept, keeps, again = self.bytes_of(before), self.bytes_of(trial), self.by_unit(trial, trial.saved.again)
        chosen = [
            Chosen(name, *self.told(unit, choice), kept[unit], keeps[unit], again[unit]) for unit, name in enumerate(self.names)
        ]
        return MemoryPlan(budget, captured, sum(self.saved.flops.values()), (*chosen[1:], chosen[0]))

    def told(self, unit: int, choice: Choice) -> tuple[str, tuple[str, ...]]:
        """What was chosen for a unit, in words and as the rewrites that fire."""
        if unit in choice.again:
            return "checkpoint", (CheckpointBlocks.name,)
        here, all_ = Counter[str](), Counter[str]()
        for index, effect in enumerate(self.effects.found):
            if self.unit.get(min(effect.at), 0) == unit:
                all_[effect.rewrite] += 1
                here[effect.rewrite] += index in choice.effects
        fired = tuple(name for name in all_ if here[name])
        shares = (f" ({here[name]} of {all_[name]})" if here[name] < all_[name] else "" for name in fired)
        return ", ".join(_CHOICES.get(name, name) + share for name, share in zip(fired, shares, strict=True)) or "keep", fired

    def bytes_of(self, trial: Trial) -> Counter[int]:
        """Bytes by the unit of the first node that needs them."""
        first = Counter[str]()
        for tensor in trial.saved.tensors:
            first[tensor.needed_by[0]] += tensor.bytes
        return self.by_unit(trial, first)

    def by_unit(self, trial: Trial, amounts: Mapping[str, int]) -> Counter[int]:
        found = Counter[int]()
        for name, amount in amounts.items():
            found[self.unit.get(trial.calls.get(name, ""), 0)] += amount
        return found


_CHOICES = {
    "pack-dropout-masks": "one bit per dropout",
    "lean-activations": "operands of gates",
    "lean-rms-norm": "inputs of norms",
    "share-norm-output": "outputs of norms, shared",
    "recompute-inputs": "inputs computed again",
    "approximate-activations": "two bits per activation",
    "store-eight-bits": "eight bits per input",
}
