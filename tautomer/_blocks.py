"""The middle level of a rewrite in place: what no leaf's code can say becomes the forward of a subclass of a block's class.

    refused in a leaf → the module around it, captured alone, on the inputs it was called with → rewrite and check → code

A block is a function of what it is given. Its code is proven on the block alone, so it holds whoever calls the block, and its
class's own forward answers the calls that the capture has not seen: another structure, mode or dtype, a cache, autocast.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tautomer.backends.block_code import Block, free_sizes, require_plain
from tautomer.backends.exchange import exchange
from tautomer.backends.module_calls import is_leaf, watch
from tautomer.passes.cleanup.fold_constants import FoldConstants
from tautomer.passes.cleanup.fold_weights import FoldWeights
from tautomer.passes.lowrank.factor_linears import FactorLinears
from tautomer.passes.memory.checkpoint_blocks import CheckpointBlocks
from tautomer.passes.memory.plan_memory import MeasureMemory, PlanMemory
from tautomer.passes.recipes import NORM
from tautomer.rewrite._torch import pytree
from tautomer.rewrite.errors import CaptureError, Refused, UsageError, require
from tautomer.rewrite.library import SEMANTIC
from tautomer.rewrite.pass_base import FIXED, Application, Context, Log, Pass, Refusal
from tautomer.rewrite.pipeline import Outcome
from tautomer.rewrite.program import Mode, Program
from tautomer.rewrite.record import Recording, record
from tautomer.rewrite.samples import samples
from tautomer.rewrite.target import Target

from ._given import capture
from ._settle import LAST, Job, path_of, was_given_up

_ONCE: tuple[type[Pass], ...] = (
    *NORM, FoldConstants, FoldWeights, FactorLinears, CheckpointBlocks, MeasureMemory, PlanMemory, *LAST,
)  # fmt: skip
Place = tuple[str, str]
"""A rewrite and the module path that it wants to rewrite at."""
Admitted = tuple[tuple[str, ...], tuple[str, ...]]
"""What ``only`` and ``skip`` say inside of a block."""
Made = tuple[Outcome, str, Mode]
"""What was done to a block, its code, and the mode it is for."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one model.

    Attributes:
        passes: what to apply; those that compute weights once are left out.
        target: asked what pays; None asks nobody, and then a block may compute edited matrices at every call.
    """

    model: nn.Module
    captured: Program
    passes: Sequence[Pass]
    context: Context
    target: Target | None
    check: bool
    written: list[str] = field(default_factory=list)
    made: dict[tuple[str, Admitted], Made | Refused] = field(default_factory=dict)

    def write(self, outcome: Outcome, undo: ExitStack) -> None:
        """Give blocks the code of what ``outcome`` refused for want of a place to write it, and enter that in ``outcome``."""
        wanted = self.wanted(outcome.log)
        if not wanted:
            return
        recordings = [self.run(sample.inputs) for sample in samples(self.captured)]
        spanning = {_place(r) for r in outcome.log.refusals if was_given_up(r)}
        waiting: dict[str, Counter[Place]] = {}
        for place, count in wanted.items():
            waiting.setdefault(place[1], Counter())[place] = count
        reasons: dict[Place, str] = {}
        while waiting:
            path = max(waiting, key=lambda path: (path.count(".") + bool(path), path))
            places, done, worthless = waiting.pop(path), Counter[Place](), False
            try:
                inner = self.block(path, recordings, undo)
                calls = recordings[0].calls[path]
                done = Counter({place: n * calls for place, n in Counter(map(_place, inner.log.applications)).items()})
                _enter(outcome, inner)
            except Refused as refusal:
                worthless = isinstance(refusal, _Worthless)
                if path in recordings[0].inputs:
                    sentence = f"{type(self.model.get_submodule(path)).__name__} keeps its forward: {refusal}"
                    reasons |= {place: sentence for place in places if place not in reasons}
            # Its parent may know more: that nobody reads the probabilities, what stands before the norm. The root is asked last.
            left = places - done if not worthless else Counter()
            parent, leaf = path.rpartition(".")[0], is_leaf(self.model.get_submodule(path))
            if path and (left := Counter({p: n for p, n in left.items() if parent or leaf or p in spanning})):
                waiting.setdefault(parent, Counter()).update(left)
            wanted.subtract(wanted & done)  # also what was done besides: in a child that was not worth it, for one
        _settle(outcome.log, self.reasons(), wanted, reasons)

    def reasons(self) -> set[str]:
        return {node.meta[FIXED] for node in self.captured.graph.nodes if FIXED in node.meta}

    def wanted(self, log: Log) -> Counter[Place]:
        """Where rewrites fit and found no leaf to be written to."""
        fixed, names = self.reasons(), {rewrite.name for rewrite in self.inside if rewrite.phase != "cleanup"}
        homeless = [r for r in log.refusals if (r.reason in fixed or was_given_up(r)) and "@" in r.id]
        return Counter(_place(r) for r in homeless if r.rewrite in names)

    @property
    def inside(self) -> tuple[Pass, ...]:
        """The passes that do without weights computed once, and without a plan for all of the model; forms that runtimes choose
        among, only if the user named them."""
        chosen = (rewrite for rewrite in self.passes if self.target is None or rewrite.phase != "choose")
        return tuple(rewrite for rewrite in chosen if not isinstance(rewrite, _ONCE))

    def run(self, inputs: Sequence[Any]) -> Recording:
        args, kwargs = pytree.tree_unflatten(list(inputs), self.captured.signature.in_spec)
        return record(self.model, args, kwargs, keep_inputs=True)

    def block(self, path: str, recordings: Sequence[Recording], undo: ExitStack) -> Outcome:
        """Rewrite one module as a block; one like another gets its code.

        Raises:
            Refused: no code of its own class can stand for it, or what was rewritten is not worth a forward.
        """
        module = self.model.get_submodule(path)
        require(path in recordings[0].inputs, "it is not called")
        require(path or not hasattr(module, "save_pretrained"), "a Hugging Face model is saved under the name of its class")
        require("forward" not in vars(module), "its forward is replaced on the instance, which its class cannot change")
        require(not isinstance(module, torch.jit.ScriptModule), "it is a compiled TorchScript module")
        context, kind = self.narrowed(path), likeness(self.captured, module, path, recordings[0].inputs[path])
        if (kind, context) not in self.made:
            try:
                self.made[kind, context] = self.rewritten(path, recordings, context)
            except Refused as refusal:
                self.made[kind, context] = refusal
            except (CaptureError, UsageError) as error:
                self.made[kind, context] = Refused(str(error).splitlines()[0])
        if isinstance(twin := self.made[kind, context], Refused):
            raise twin
        outcome, text, mode = twin
        exchange(module, text, mode, undo)
        self.written.append(path)
        return _seen_from_the_root(outcome, path)

    def rewritten(self, path: str, recordings: Sequence[Recording], admitted: Admitted) -> Made:
        """What a block's rewriting did, the code and the mode it is for."""
        module, (args, kwargs) = self.model.get_submodule(path), recordings[0].inputs[path]
        alone = record(module, args, kwargs)
        require(not alone.remembers, "it keeps state between calls")
        effects = {*alone.effects, *(x for run in recordings for x in run.effects if x.startswith(f"self.{path}."))}
        require(not effects, f"its forward changes {', '.join(sorted(effects))}")
        require_plain(alone.out_spec)
        varying = _varying(path, recordings)
        spec = pytree.tree_unflatten(varying, pytree.tree_structure((args, kwargs)))
        bound = inspect.signature(module.forward).bind(*spec[0], **spec[1]).arguments
        # Where the program of the model reads no flag, its two modes are one, and one export tells both.
        one = self.captured.mode == "both" and not any(f"{flag}.".startswith(f"{path}.") for flag in self.captured.training)
        program = capture(module, args, kwargs, dynamic_shapes=bound, mode="eval" if one else self.captured.mode)
        program.mode = "both" if one else program.mode
        _require_free(program, varying)
        program.weights.live = True
        block = Block(module, program, alone.calls, watch(module, args, kwargs), self.target is None)
        only, skip = admitted
        context = Context(check=self.check, only=only, skip=skip)
        after, outcome, code = Job(program, self.inside, context, self.target, block.code).settle(self.check)
        cleanup = {p.name for p in self.inside if p.phase == "cleanup"}
        fired = any(a.rewrite not in cleanup for a in outcome.log.applications)
        nothing = "nothing fits in it alone" + (", where there is no data" if self.context.data is not None else "")
        require(fired, next((r.reason for r in outcome.log.refusals if was_given_up(r)), nothing))
        if self.target is not None and not _computes(after):
            raise _Worthless("its new code would name what it computes already")
        return outcome, code.text, after.mode

    def narrowed(self, path: str) -> Admitted:
        """What the user admits, as the paths and ids of one block."""

        def inside(entries: Sequence[str]) -> tuple[str, ...]:
            return tuple(_within(entry, path) for entry in entries if entry != path and not path.startswith(f"{entry}."))

        around = any(entry == path or path.startswith(f"{entry}.") for entry in self.context.skip)
        require(not around, "skip= names it")
        whole = any(entry == path or path.startswith(f"{entry}.") for entry in self.context.only)
        return () if whole else inside(self.context.only), inside(self.context.skip)


def _within(entry: str, path: str) -> str:
    """A module path, or an id (``name@block.mlp/gelu``, ``name@block/mul`` for the block's own code), as the block has it."""
    name, at, place = entry.rpartition("@")
    return name + at + (place.removeprefix(f"{path}.").removeprefix(f"{path}/") if path else place)


class _Worthless(Refused):
    """What fits is not worth a forward."""


def _place(entry: Application | Refusal) -> Place:
    return entry.rewrite, path_of(entry.id)


def _varying(path: str, recordings: Sequence[Recording]) -> list[Any]:
    """Which sizes of the leaves of a call vary with the inputs of the model, as ``torch.export`` takes them."""
    calls = [pytree.tree_leaves(recording.inputs[path]) for recording in recordings if path in recording.inputs]
    found: list[Any] = []
    for leaf, *others in zip(*calls, strict=False):
        if not isinstance(leaf, Tensor):
            found.append(None)
            continue
        shapes = [other.shape for other in others if isinstance(other, Tensor) and other.dim() == leaf.dim()]
        axes = [axis for axis, size in enumerate(leaf.shape) if any(shape[axis] != size for shape in shapes)]
        found.append(dict.fromkeys(axes, torch.export.Dim.AUTO) or None)
    return found


def _require_free(program: Program, varying: Sequence[Any]) -> None:
    free = free_sizes(program)
    for index, (node, axes) in enumerate(zip(program.placeholders, varying, strict=True)):
        fixed = [axis for axis in axes or () if axis not in free.get(index, ())]
        name = program.signature.leaf_names[index]
        require(not fixed or not node.users, f"its code would be for one size of '{name}' alone, in axis {fixed[:1]}")


_NAMES = {f"tautomer::{op.name}" for op in SEMANTIC}


def _computes(program: Program) -> bool:
    """Whether a rewrite made a call that computes otherwise than what stood there: no view, and no name of several calls."""
    made = [node.target for node in program.graph.nodes if node.meta.get("rewritten") and node.op == "call_function"]
    ops = [target for target in made if isinstance(target, torch._ops.OpOverload)]
    schemas = [op._schema for op in ops if f"{op._schema.name}.{op._overloadname}" not in _NAMES]
    return any(not result.alias_info for schema in schemas for result in schema.returns)


def likeness(program: Program, module: nn.Module, path: str, call: Any) -> str:
    """What tells a block from another that computes the same: what ``program`` runs at ``path``, classes, buffers, the call."""
    prefix, order = f"{path}." if path else "", dict[Any, str]()

    def operand(node: fx.Node) -> str:
        if node.op == "get_attr" and (weight := program.weights.entries.get(str(node.target))) is not None:
            return f"{str(node.target).removeprefix(prefix)} {list(weight.meta.shape)} {weight.meta.dtype}"
        return order.setdefault(node, f"given {len(order)}")

    lines = list[str]()
    for node in program.graph.nodes:
        paths = [str(inside) for inside, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if node.op == "call_function" and any(f"{inside}.".startswith(prefix) for inside in paths):
            given = fx.node.map_arg((node.args, node.kwargs), operand)
            lines.append(f"{node.target} {given} at {paths[-1].removeprefix(prefix)}")
            order[node] = f"made {len(lines)}"
    lines += [f"{name} is {type(inner)} {id(type(inner))}" for name, inner in module.named_modules()]
    lines += [f"{name} = {_digest(buffer)}" for name, buffer in module.named_buffers()]
    leaves, spec = pytree.tree_flatten(call)
    shown = (f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x) for x in leaves)
    return "\n".join([*lines, str(spec), *shown])


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _seen_from_the_root(outcome: Outcome, path: str) -> Outcome:
    """The outcome with ids as the whole model has them."""

    def moved(entry: str) -> str:
        name, at, place = entry.partition("@")
        inner, slash, node = place.rpartition("/")
        return f"{name}{at}{'.'.join(filter(None, (path, inner)))}{'/' if path or slash else ''}{node}" if at else entry

    log = replace(outcome.log, applications=[replace(a, id=moved(a.id)) for a in outcome.log.applications])
    log.notes = [replace(note, id=moved(note.id)) for note in outcome.log.notes]
    return replace(outcome, log=log)


def _enter(outcome: Outcome, inner: Outcome) -> None:
    """Add what a block did to what the model did."""
    outcome.log.applications += inner.log.applications
    outcome.log.notes += inner.log.notes
    if inner.evidence is not None:
        outcome.evidence = inner.evidence if outcome.evidence is None else outcome.evidence.also(inner.evidence)
    for phase, seconds in inner.seconds.items():
        outcome.seconds[phase] = outcome.seconds.get(phase, 0.0) + seconds


def _settle(log: Log, fixed: set[str], left: Counter[Place], reasons: dict[Place, str]) -> None:
    """Leave the refusals of what no block took either, with what the block said."""
    kept, homeless = list[Refusal](), {rewrite for (rewrite, _), count in left.items() if count > 0}
    for refusal in log.refusals:
        place = _place(refusal)
        if refusal.reason not in fixed and not was_given_up(refusal):
            kept.append(refusal)
        elif place not in left:
            kept += [refusal] * ("@" in refusal.id or refusal.rewrite in homeless or all(r != refusal.rewrite for r, _ in left))
        elif left[place] > 0:
            left[place] -= 1
            more = f"; {reasons[place]}" if place in reasons else ""
            kept.append(replace(refusal, reason=refusal.reason + more))
    log.refusals[:] = kept
