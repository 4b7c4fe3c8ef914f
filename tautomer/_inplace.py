"""Rewrite a model in place: the proof is made on the captured graph, then the user's own object is edited.

    capture → rewrite and check → compare with the module tree → edit → capture again and compare     or all is as it was

A rewrite that the module tree cannot express is refused with its sentence, and the others are made without it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tautomer.backends.exchange import form_of
from tautomer.backends.guard import edits_of
from tautomer.backends.hugging_face import NAME, implementations, restore_attention, runs_eager, set_attention
from tautomer.backends.module_calls import exchangeable, watch
from tautomer.backends.rewritten import Rewritten
from tautomer.backends.to_module import plan, written
from tautomer.passes.raise_.raise_attention import RaiseAttention
from tautomer.passes.recipes import FOLD, Recipe
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.claims import ALGEBRAIC, Claim
from tautomer.rewrite.equivalence import check_equivalence
from tautomer.rewrite.errors import CaptureError, ClaimBroken, UsageError
from tautomer.rewrite.memory_plan import MemoryPlan
from tautomer.rewrite.pass_base import FIXED, Context, Log, Note, Pass
from tautomer.rewrite.pipeline import claim_of, run_passes
from tautomer.rewrite.program import Program
from tautomer.rewrite.report import Report
from tautomer.rewrite.target import Target
from tautomer.rewrite.weights import Weights, marked

from ._blocks import Blocks
from ._front import report_of
from ._given import Progress, capture, check_entry, data_of, entries_of, passes_of, progress_of, recipe_of, target_of
from ._settle import LAST, Job


@dataclass(frozen=True)
class Rewriting:
    """What ``optimize_`` did to a model.

    Attributes:
        report: what fired, what did not and why, how exact, what it cost.
        weights: the table of the model, over the values that were overwritten.
        modules: the paths of the modules whose code was exchanged.
        edits: which weights of the model are edited, by name; a state dict says so too, in its metadata.
    """

    report: Report
    weights: Weights
    modules: tuple[str, ...]
    edits: Mapping[str, str]

    def from_original(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of the original model as one of this model, ready to be loaded.

        Example: ``model.load_state_dict(done.from_original(checkpoint))``
        """
        kept = {name: x for name, x in state.items() if name in self.weights or name not in self.weights.leaves}
        return self.own({**kept, **self.weights.from_original(state)})

    def to_original(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of this model, perhaps trained further, as one of the original model.

        Raises:
            UsageError: as of ``Weights.to_original``.

        Example: ``original.load_state_dict(done.to_original(model.state_dict()))``
        """
        kept = {name: x for name, x in state.items() if name in self.weights.leaves or name not in self.weights}
        return OrderedDict(kept) | self.weights.to_original(state)

    def own(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of this model that lost its metadata (a plain copy, a safetensors file), ready to be loaded."""
        return marked(state, self.edits)

    def __str__(self) -> str:
        return f"{self.report}  code exchanged in {len(self.modules)} modules\n"


def optimize_(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe = "inference",
    passes: Sequence[str | Pass] | None = None,
    target: str | Target = "eager",
    data: Iterable[Any] | Data | None = None,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    dynamic_shapes: Any = "auto",
    mode: str = "auto",
    check: bool = True,
    progress: Progress | None = None,
) -> Rewriting:
    """Rewrite a model in place: its class, keys, hooks, ``generate``, ``save_pretrained`` and wrappers stay what they are.

    Weights are overwritten, and leaf modules (a norm, an activation, a layer scale) get new code as subclasses of their own
    classes. What no leaf can say becomes the forward of a subclass of the class of the block around it: it calls the leaves that
    it did not change, and leaves every call that was not captured to the class itself. A weight that a rewrite consumed stays
    under its key and does nothing: the state dict is right for the original classes too, so ``save_pretrained`` →
    ``from_pretrained`` gives a model of the original form with the same answers. ``tautomer.save_form`` and ``load_form`` carry
    the new form over. The other way the edits are missing, so a state dict of the original model is refused: load
    ``done.from_original(state_dict)``.

    Attention that a Hugging Face model runs eagerly goes through the model's registry of attention functions; where it drops
    out or returns probabilities it is the model's own still.

    With ``recipe="training"`` no weight is overwritten: the new code of a module edits its own parameters at every call, so any
    optimizer follows the trajectory of the original model, and checkpoints of either load into the other. ``fold_`` afterwards.
    Attach adapters before it: one that comes later is refused, since what it adds to a layer would not be edited.

    With ``recipe="compress"`` a linear layer holds two factors, ``V`` and ``U``, in the place of its ``weight``; its bias stays
    the very parameter. The original classes cannot read that: after ``from_pretrained``, whose report of missing weights is
    right, ``load_form`` takes the factors from the folder. Make the optimizer afterwards. An adapter that comes later stays
    beside the layer: it trains, and cannot be merged.

    Do it before ``DistributedDataParallel``, ``fully_shard`` or an optimizer takes the model, and in the dtype it will run in.

    Args: as of ``optimize``; also
        mode: "both" proves the rewrites with dropout on and off; "eval" or "train" for one mode, and the model refuses to
            compute in the other; "auto" is "both" for a model in training mode and wherever the mode makes no difference.

    Returns:
        The report, and the map of state dicts.

    Raises:
        UsageError, CaptureError: as of ``optimize``. ClaimBroken: the edited model does not compute what it did. Whatever is
            raised, the model is what it was.

    Example:
        >>> block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
        >>> done = optimize_(block, (torch.randn(2, 8),), target="onnxruntime")
        >>> done.modules, isinstance(block[1], nn.LayerNorm), bool(block[1].bias.any())
        (('1',), True, False)
    """
    _require_a_bare_model(model)
    recipe = recipe_of(recipe)
    tell, where, chosen = progress_of(progress), target_of(target), passes_of(recipe, passes)
    context = Context(only=entries_of("only", only), skip=entries_of("skip", skip), data=data_of(data, tell), target=where)
    start = perf_counter()
    tell("capturing")
    asked = recipe.mode if mode == "auto" else mode
    asked = "widest" if asked == "auto" else asked
    again = functools.partial(capture, model, args, kwargs, dynamic_shapes=dynamic_shapes, mode=asked)
    original = again()
    for entry in (*context.only, *context.skip):
        check_entry(entry, original)
    with contextlib.ExitStack() as undo:
        captured, log = undo.enter_context(_attention(model, original, again, chosen, context, check))
        captured.weights.live = recipe.live
        modules = exchangeable(captured, model, watch(model, args, kwargs or {}))
        seconds = perf_counter() - start
        tell("rewriting and checking")
        ordered = chosen if recipe.live else _named(chosen)
        ask = where if passes is None else None
        job = Job(captured, ordered, context, ask, functools.partial(plan, captured, model=model, modules=modules))
        program, outcome, edit = job.settle(check)
        outcome.log.applications[:0], outcome.log.refusals[:0] = log.applications, log.refusals
        outcome.log.notes += [Note("optimize_", name, _UNREAD) for name in edit.unread]
        outcome.log.notes += _unplanned(captured, job, outcome.log.plan)
        tell("measuring")
        report = report_of(original, program, where, outcome, seconds)
        tell("editing")
        before = undo.enter_context(written(model, edit, captured.mode))
        weights = edit.weights.copy()
        weights.live = False
        reference, blocks = original.copy(), Blocks(model, captured, chosen, context, ask, check)
        for table in (weights, reference.weights, program.weights):
            table.leaves.update(before)
        proven = len(outcome.log.applications)
        if outcome.log.plan is None:  # else what a block would do besides was not chosen
            blocks.write(outcome, undo.enter_context(_unless_it_raises()))
        if check and outcome.log.applications:
            claim, wanted = claim_of(outcome.log.applications, chosen), reference
            if not claim.exact and claim_of(outcome.log.applications[proven:], chosen).exact:
                wanted, claim = program, ALGEBRAIC  # how far it is from the original was measured; it is to be what was made
            edited = _compare(model, wanted, (args, kwargs, dynamic_shapes), claim)
            outcome.log.notes.extend(_stock(reference, weights, claim))
            if blocks.written:
                tell("measuring")
                report = report_of(reference, edited, where, outcome, seconds)
        names = {module: name for name, module in model.named_modules()}
        exchanged = (*(names[module] for module in edit.code), *blocks.written)
        edits = edits_of(model)
    return Rewriting(report, weights, exchanged, edits)


@contextlib.contextmanager
def _unless_it_raises() -> Iterator[contextlib.ExitStack]:
    """A stack of what to take back if the body raises."""
    with contextlib.ExitStack() as undo:
        yield undo
        undo.pop_all()


_UNREAD = "part of other weights now: it does nothing, and does not train"


def fold_(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    check: bool = True,
) -> Rewriting:
    """Compute the edits of a model that was rewritten in place for training once and for all, from what was learned.

    A weight that other modules read too, a tied table for one, goes on being edited at every call.

    Args: as of ``optimize_``.

    Raises:
        UsageError: no module of it was rewritten.
        CaptureError, ClaimBroken: as of ``optimize_``.

    Example:
        >>> block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
        >>> done = optimize_(block, (torch.randn(2, 8),), recipe="training", target="onnxruntime")
        >>> torch.allclose(block[0].weight.mean(0), torch.zeros(8), atol=1e-6)
        False
        >>> done = fold_(block, (torch.randn(2, 8),))
        >>> torch.allclose(block[0].weight.mean(0), torch.zeros(8), atol=1e-6)
        True
    """
    if not any(form_of(module) for module in model.modules()):
        raise UsageError(
            f"no module of this {type(model).__name__} was rewritten", hint="optimize_(…, recipe='training') it first"
        )
    passes = [kind() for kind in FOLD]
    return optimize_(model, args, kwargs, passes=passes, dynamic_shapes=dynamic_shapes, check=check)


def _require_a_bare_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"only a module can be rewritten in place, not a {type(model).__name__}")
    if isinstance(model, Rewritten):
        raise UsageError("this module was made by tautomer.optimize", hint="optimize_ the user's own model")
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if sharded or isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError("the model is distributed already", hint="optimize_ it first, then wrap or shard it")


@contextlib.contextmanager
def _attention(
    model: nn.Module, captured: Program, again: Callable[[], Program], passes: Sequence[Pass], context: Context, check: bool
) -> Iterator[tuple[Program, Log]]:
    """The program of a Hugging Face model whose attention goes through the registry, if that raises it; as it was if the body
    raises."""
    log = Log()
    rewrite = next((rewrite for rewrite in passes if isinstance(rewrite, RaiseAttention)), None)
    if rewrite is None or not runs_eager(model):
        yield captured, log
        return
    before = implementations(model)
    try:
        program = _raised(model, captured, again, rewrite, replace(context, log=log), check)
        if program is None:
            restore_attention(before)
        yield program or captured, log
    except BaseException:
        restore_attention(before)
        raise


def _raised(
    model: nn.Module, captured: Program, again: Callable[[], Program], rewrite: Pass, context: Context, check: bool
) -> Program | None:
    attention = torch.ops.aten.scaled_dot_product_attention.default
    try:
        set_attention(model)
        program = again()
        raised = program.graph.find_nodes(op="call_function", target=attention)
        if len(raised) == captured.count(attention) or not all(context.lets(rewrite, node) for node in raised):
            return None
        error = check_equivalence(captured, program, rewrite.claim).forward if check else None
    except (CaptureError, ClaimBroken, UsageError, ValueError) as failure:
        context.refused(rewrite, captured.output, f"not through the registry of attention functions: {failure}")
        return None
    for node in raised:
        context.applied(rewrite, node, f"through the registry of attention functions, as '{NAME}'", error)
    return program


def _unplanned(captured: Program, job: Job[Any], plan: MemoryPlan | None) -> Iterator[Note]:
    """What a budget would have cost with the rewrites too that no module can do by itself."""
    if plan is None:
        return
    program, log = captured.copy(), Log()
    for node in program.graph.nodes:
        node.meta.pop(FIXED, None)
    run_passes(job.passes, program, replace(job.context, log=log), check=False)
    free = log.plan
    if free is not None and (free.flops, free.after) < (plan.flops, plan.after):
        ours, theirs = (f"{x.flops:,} FLOPs again and keeps {x.after:,} bytes" for x in (plan, free))
        text = f"the plan computes {ours}; with what no module can do by itself, as in optimize(…), it computes {theirs}"
        yield Note("optimize_", captured.name, text)


def _named(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The edit is written under the old names, so the passes that give them always run, last."""
    return (*(rewrite for rewrite in passes if not isinstance(rewrite, LAST)), *(kind() for kind in LAST))


def _compare(model: nn.Module, reference: Program, call: Any, claim: Claim) -> Program:
    """The edited model, captured once more, against what it was."""
    args, kwargs, dynamic_shapes = call
    try:
        edited = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, mode=reference.mode)
        check_equivalence(reference, edited, claim)
        return edited
    except ClaimBroken as broken:
        hooked = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        hint = f"skip={hooked!r}: a hook that changes values is not part of a module's code" if hooked else None
        raise ClaimBroken(f"written back, {broken.what}", where=broken.where, hint=hint) from broken


def _stock(reference: Program, weights: Weights, claim: Claim) -> Iterator[Note]:
    """Whether the original classes compute the same with the new weights; if not, the user should know."""
    if not weights.edits():
        return
    note = "the new weights are right for the new code alone: after from_pretrained, load_form"
    if any(weight.kind == "parameter" and name not in weights for name, weight in reference.weights.entries.items()):
        yield Note("optimize_", reference.name, note)
        return
    stock = reference.copy()
    stock.weights = weights
    try:
        check_equivalence(reference, stock, claim)
    except ClaimBroken:
        yield Note("optimize_", reference.name, note)
