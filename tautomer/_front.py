"""The front door: a model in, the same model in a better form out. What is behind it is data that these verbs hand on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import nn

from tautomer.backends.rewritten import Rewritten
from tautomer.backends.targets import resolve
from tautomer.backends.to_torch import to_torch
from tautomer.passes.recipes import FOLD, Finetune, Recipe
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture_parts
from tautomer.rewrite.claims import ALGEBRAIC, Claim
from tautomer.rewrite.equivalence import check_equivalence
from tautomer.rewrite.errors import TautomerError, UsageError
from tautomer.rewrite.evidence import Evidence
from tautomer.rewrite.measure import measure
from tautomer.rewrite.pass_base import Context, Log, Note, Pass
from tautomer.rewrite.pipeline import Outcome, run_passes
from tautomer.rewrite.program import Program
from tautomer.rewrite.report import Report, Size, Timing
from tautomer.rewrite.saved import kept_as_written
from tautomer.rewrite.target import Target

from ._asked import saved_tensors
from ._given import Model, Progress, capture, check_entry, data_of, entries_of, passes_of, progress_of, recipe_of, target_of
from ._parts import assemble, merge


def optimize(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe = "inference",
    passes: Sequence[str | Pass] | None = None,
    target: str | Target = "eager",
    data: Iterable[Any] | Data | None = None,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    fuel: int | None = None,
    dynamic_shapes: Any = "auto",
    check: bool = True,
    progress: Progress | None = None,
) -> Rewritten:
    """The same model in a better form: a new module, same call, same answers, any batch size.

    Untouched weights share their memory with ``model``: ``copy.deepcopy(model)`` first if you train both.

    Args:
        model: a module (never written), an ``ExportedProgram`` or a ``Program``.
        args, kwargs: one example call; batch 1 is fine.
        recipe: what to apply, by name or as a recipe: "inference", or "training" for a model that will be trained (the
            user's parameters stay and are edited inside the forward; ``fold`` afterwards), or "finetune" (and it keeps less).
        passes: exactly these instead, by name or as passes, in this order; nobody asks whether they pay.
        target: where it should pay: "eager", "inductor", "onnxruntime".
        data: example calls for rewrites that measure: an iterable of tensors, tuples of arguments or dicts of keyword
            arguments; or such an iterable as ``tautomer.Data``, which keeps the statistics in a folder. Read by each pass that
            needs it, one call at a time.
        only, skip: admit or forbid applications by pass name, id or module path.
        fuel: at most this many applications; for bisection.
        dynamic_shapes: as of ``capture``.
        check: hold every rewrite to its claim. Nothing unchecked is handed back without ``check=False``.
        progress: called with a few words as each phase starts.

    Returns:
        A module with ``.report`` (what fired, what did not and why), ``.graph`` and ``.weights``.

    Raises:
        UsageError, CaptureError: see ``capture``; also for an unknown recipe, pass or target, with the nearest name, and for
            data that does not fit the model, with the index of the call.

    Example:
        >>> block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
        >>> fast = optimize(block, (torch.randn(2, 8),), target="onnxruntime")
        >>> fast.report.fired("layer-norm-to-rms-norm")
        1
    """
    tell = progress_of(progress)
    recipe = recipe_of(recipe)
    where = target_of(target)
    context = Context(
        only=entries_of("only", only), skip=entries_of("skip", skip), fuel=fuel, data=data_of(data, tell), target=where
    )
    plan = _Plan(passes_of(recipe, passes), where, passes is None, context, check, tell)
    start = perf_counter()
    tell("capturing")
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, mode=recipe.mode)
    program.weights.live = recipe.live
    fast = _rewrite(program, plan, perf_counter() - start)
    if isinstance(recipe, Finetune) and passes is None and isinstance(model, nn.Module) and not isinstance(model, Rewritten):
        fast.report.log.notes.extend(_dissolved(model, (args, kwargs or {}), fast, recipe))
    return fast


def _dissolved(model: nn.Module, call: tuple[Any, Any], fast: Rewritten, recipe: Finetune) -> Iterator[Note]:
    """What a user should know: that a budget is missed; that the model keeps less as it is written."""
    ours = saved_tensors(fast, *call, autocast=recipe.autocast).bytes
    plan = fast.report.plan
    if plan is not None and ours > plan.budget:
        yield Note(
            recipe.name, fast.report.model, f"a rewrite was rolled back: {ours:,} bytes are kept, the budget is {plan.budget:,}"
        )
    written = kept_as_written(model, *call, training=True, autocast=recipe.autocast)
    if written is not None and written < ours:
        text = (
            f"the forward as it is written keeps {written:,} bytes, this one {ours:,}: what it checkpoints is not checkpointed "
            "here; checkpoint the rewritten module, or rewrite what is not checkpointed"
        )
        yield Note(recipe.name, fast.report.model, text)


def fold(module: Rewritten, *, check: bool = True) -> Rewritten:
    """The inference form of a module that was rewritten for training: its edits computed once, from what was learned.

    Args:
        module: what ``optimize(…, recipe="training")`` returned, trained or not; it is not changed.
        check: hold the result to equality with ``module``.

    Returns:
        A new module in the mode of ``module``. Untouched weights share their memory with it.

    Raises:
        UsageError: its edits are computed once already, or it was loaded or unpickled and does not know them.

    Example:
        >>> block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
        >>> trained = optimize(block, (torch.randn(2, 8),), recipe="training", target="inductor")
        >>> fold(trained).report.fired("name-weights")
        1
    """
    if not isinstance(module, Rewritten) or module.program is None or not module.program.weights.live:
        raise UsageError(
            "there is nothing to fold: no edit of this module is computed at every call, or it does not know its edits any more",
            hint="fold what optimize(…, recipe='training') returned, before it is saved and loaded; fold_ is for optimize_",
        )
    program = module.program.copy()
    values = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    program.weights = program.weights.folded(values)
    program.training = {path: module.get_submodule(path).training for path in program.training}
    passes = tuple(kind() for kind in FOLD)
    return _rewrite(program, _Plan(passes, resolve(module.report.target), False, Context(), check, progress_of(None)), 0.0)


def optimize_parts(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe = "inference",
    target: str | Target = "eager",
    dynamic_shapes: Any = "auto",
    check: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """A model that cannot be captured whole: its largest submodules that can are rewritten, in a copy of the user's class.

    Args: as of ``optimize``.

    Returns:
        A copy of ``model`` (weights shared) whose parts are emitted modules; ``.report`` says which, and why not the whole.

    Raises:
        CaptureError: no submodule can be captured.

    Example: ``optimize_parts(model, args).report.captured[0]``
    """
    tell = progress_of(progress)
    recipe = recipe_of(recipe)
    where = target_of(target)
    plan = _Plan(recipe.passes(), where, True, Context(target=where), check, tell)
    start = perf_counter()
    tell("capturing")
    parts = capture_parts(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    for part in parts.values():
        part.weights.live = recipe.live
    seconds = (perf_counter() - start) / len(parts)
    emitted = {path: _rewrite(part, plan, seconds) for path, part in parts.items()}
    whole = assemble(model, emitted)
    whole.report = merge(type(model).__name__, where.name, {path: part.report for path, part in emitted.items()})  # type: ignore[assignment]
    return whole


@dataclass(frozen=True)
class _Plan:
    """What ``optimize`` was asked to do to each program."""

    passes: tuple[Pass, ...]
    target: Target
    ask: bool
    context: Context
    check: bool
    tell: Progress


def _rewrite(program: Program, plan: _Plan, capture_seconds: float) -> Rewritten:
    original = program.copy()
    context = replace(plan.context, log=Log())
    for entry in (*context.only, *context.skip):
        check_entry(entry, program)
    plan.tell("rewriting and checking")
    outcome = run_passes(plan.passes, program, context, target=plan.target if plan.ask else None, check=plan.check)
    fast = to_torch(program, kernels=plan.target.name == "eager")
    plan.tell("measuring")
    fast.report = report_of(original, program, plan.target, outcome, capture_seconds)
    fast.weights, fast.program = program.weights, program
    return fast


def report_of(original: Program, program: Program, target: Target, outcome: Outcome, capture_seconds: float) -> Report:
    return Report(
        program.name,
        target.name,
        outcome.log,
        tuple(program.notes),
        Size.of(original),
        Size.of(program),
        outcome.gains,
        outcome.evidence,
        _measure(original, program, target, outcome),
        {"capture": capture_seconds} | outcome.seconds,
    )


def _measure(original: Program, program: Program, target: Target, outcome: Outcome) -> Timing | None:
    """Both programs on the example, alternating, if something fired: where that costs little, or it was made smaller.

    What is smaller is not always faster: that is said on every target.
    """
    if not outcome.log.applications or not (target.name.startswith("eager") or "size" in outcome.purposes):
        return None
    try:
        before, after = measure(target.compile(original), target.compile(program), original.example)
    except TautomerError as failure:
        outcome.log.notes.append(Note("optimize", program.name, f"not timed on {target.name}: {failure.what}"))
        return None
    return Timing(before / 1e3, after / 1e3, target.name)


def verify(
    reference: nn.Module | Program,
    candidate: nn.Module | Program,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    gradients: bool = False,
    claim: Claim = ALGEBRAIC,
) -> Evidence:
    """Check that two models agree; made for a user's own tests.

    Both are captured and run at several sizes. The oracle is the reference promoted to float64; the candidate may err
    twice as much as the reference does in its own dtype, plus 64 roundings. Nobody chooses a tolerance.

    Args:
        reference, candidate: any two modules with the same inputs and outputs.
        args, kwargs: one example call.
        gradients: compare gradients of inputs and of shared parameters too.
        claim: what is promised; an inexact claim only measures.

    Raises:
        ClaimBroken: they do not agree. An ``AssertionError``.

    Example:
        >>> a = nn.Linear(4, 2).eval()
        >>> b = nn.Linear(4, 2).eval()
        >>> verify(a, a, (torch.randn(3, 4),)).forward < 1e-6
        True
        >>> verify(a, b, (torch.randn(3, 4),))
        Traceback (most recent call last):
            ...
        tautomer.rewrite.errors.ClaimBroken: output 0 of Linear is off by ...
    """
    ours, theirs = capture(reference, args, kwargs), capture(candidate, args, kwargs)
    if isinstance(candidate, Rewritten) and candidate.program is not None and gradients:
        theirs = candidate.program.copy()
    return check_equivalence(ours, theirs, claim, gradients=gradients)
