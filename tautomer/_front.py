"""The front door: one verb per thing a user wants. Everything behind it is data that these verbs hand on."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import nn

from tautomer.backends.archive import load as load
from tautomer.backends.archive import save as save
from tautomer.backends.files import staged, writable
from tautomer.backends.onnx_table import ROWS
from tautomer.backends.rewritten import Rewritten
from tautomer.backends.targets import TARGETS, resolve
from tautomer.backends.to_onnx import OnnxReport, refuse_unrolled, to_onnx
from tautomer.backends.to_package import PackageReport, to_package
from tautomer.backends.to_python import PythonReport
from tautomer.backends.to_python import to_python as write_python
from tautomer.backends.to_torch import as_run, to_torch
from tautomer.passes.recipes import FOLD, PASSES, RECIPES, Finetune, Recipe
from tautomer.rewrite._torch import pytree
from tautomer.rewrite.attention_drawing import draw_attentions
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture as capture_module
from tautomer.rewrite.capture import capture_parts
from tautomer.rewrite.claims import ALGEBRAIC, Claim
from tautomer.rewrite.drawing import draw as draw_program
from tautomer.rewrite.equivalence import check_equivalence
from tautomer.rewrite.errors import TautomerError, UsageError
from tautomer.rewrite.evidence import Evidence
from tautomer.rewrite.measure import measure
from tautomer.rewrite.pass_base import Context, Log, Note, Pass
from tautomer.rewrite.pipeline import Outcome, run_passes
from tautomer.rewrite.program import Program, path_of
from tautomer.rewrite.report import Report, Size, Timing
from tautomer.rewrite.rules import Rule, nearest_miss
from tautomer.rewrite.saved import SavedTensors, kept_as_written
from tautomer.rewrite.saved import saved_tensors as saved_by
from tautomer.rewrite.target import Target

from ._parts import assemble, merge

Model: TypeAlias = nn.Module | Program | torch.export.ExportedProgram
Progress: TypeAlias = Callable[[str], None]


def capture(
    model: Model | str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    mode: str = "auto",
) -> Program:
    """Capture a model as a program, in canonical form.

    Args:
        model: a module, an ``ExportedProgram``, or the path of a ``.pt2`` file; the last two bring their own inputs.
        args, kwargs: one example call.
        dynamic_shapes: "auto" (batch and length free where the model allows), "static", or a ``torch.export`` spec.
        mode: "auto" (the mode the model is in), "eval", "train", "both" (dropout and BatchNorm keep reading the flag), or
            "widest" (both for a model in training mode or one that computes the same in both, else the mode it is in).

    Raises:
        CaptureError: the model cannot be exported; says where and what to try.
        UsageError: the arguments are wrong.

    Example:
        >>> program = capture(nn.Linear(4, 2).eval(), (torch.randn(3, 4),))
        >>> program.count(torch.ops.aten.linear.default)
        1
    """
    if isinstance(model, Program):
        return model.copy()
    if isinstance(model, str | os.PathLike):
        model = _load_exported(Path(model))
    if isinstance(model, torch.export.ExportedProgram):
        args, kwargs = (args, kwargs) if args or kwargs else model.example_inputs  # type: ignore[assignment]
        model = model.module()
    if isinstance(model, Rewritten) and not args and not kwargs:
        if model.program is None:
            raise UsageError(f"a loaded {model._signature.owner} has no example inputs", hint="pass args or kwargs")
        args, kwargs = pytree.tree_unflatten(list(model.program.example), model.program.signature.in_spec)
    program = capture_module(model, args, kwargs, dynamic_shapes=dynamic_shapes, mode=mode)
    if isinstance(model, Rewritten):
        program.name = model._signature.owner
        program.signature = replace(program.signature, owner=model._signature.owner)
    return program


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
    tell = _progress(progress)
    recipe = _recipe(recipe)
    where = _target(target)
    context = Context(only=_entries("only", only), skip=_entries("skip", skip), fuel=fuel, data=_data(data, tell), target=where)
    plan = _Plan(_passes(recipe, passes), where, passes is None, context, check, tell)
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
    return _rewrite(program, _Plan(passes, resolve(module.report.target), False, Context(), check, _progress(None)), 0.0)


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
    tell = _progress(progress)
    recipe = _recipe(recipe)
    where = _target(target)
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
        _check_entry(entry, program)
    plan.tell("rewriting and checking")
    outcome = run_passes(plan.passes, program, context, target=plan.target if plan.ask else None, check=plan.check)
    fast = to_torch(program, kernels=plan.target.name == "eager")
    plan.tell("measuring")
    fast.report = _report(original, program, plan.target, outcome, capture_seconds)
    fast.weights, fast.program = program.weights, program
    return fast


def _report(original: Program, program: Program, target: Target, outcome: Outcome, capture_seconds: float) -> Report:
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


def export_onnx(
    model: Model,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    provider: str = "cpu",
    opset: int = 23,
    dynamic_shapes: Any = "auto",
    check: bool = True,
) -> OnnxReport:
    """Write a model as ONNX, run the file on ONNX Runtime and compare it with PyTorch.

    Args:
        model: a module, rewritten or not, or a program.
        path: the file; it appears only when it is complete and, with ``check``, agrees.
        provider: "cpu" or "cuda": whose kernels the file should use.
        opset: 18 or later.
        dynamic_shapes: as of ``capture``; "static" fixes every size to the example's.
        check: run the file at two sizes and compare.

    Raises:
        ExportError: the model cannot be written, or the file does not load, run or agree.
        UsageError: the path cannot be written, or the arguments are wrong.

    Example: ``export_onnx(fast, "model.onnx", args, kwargs)``
    """
    if isinstance(model, Rewritten) and model.program is not None and dynamic_shapes != "static":
        refuse_unrolled(model.program)
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    report = getattr(model, "report", None)
    rewrites = tuple(dict.fromkeys(f"{a.rewrite} ({a.claim})" for a in report.applications)) if isinstance(report, Report) else ()
    return to_onnx(
        program, path, provider=provider, opset=opset, dynamic=dynamic_shapes != "static", check=check, rewrites=rewrites
    )


def to_python(
    model: Model,
    folder: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    check: bool = True,
    overwrite: bool = False,
) -> PythonReport:
    """Write a model as a Python package that a person can read and maintain, and that needs no tautomer.

    ``model.py`` has one class for blocks that are equal and follows the user's modules; ``weights.safetensors`` has the keys of
    the state dict. The package is imported in a fresh process and run at two sizes: outputs and buffers must have the bits of
    the emitted module, gradients have where sums are taken in one order. docs/python.md shows one.

    Args:
        model: a module, rewritten or not, or a program.
        folder: the package; it appears only when it is complete and, with ``check``, agrees. Its name is that of the package.
        args, kwargs: one example call; a rewritten module or a program has its own.
        dynamic_shapes: as of ``capture``.
        check: run it and compare.
        overwrite: replace a folder that this function wrote.

    Raises:
        UsageError: the folder exists or cannot be written, or the arguments are wrong.
        ExportError: the model holds what has no Python text, or the package does not agree.

    Example: ``to_python(fast, "readable")``, then ``import readable; model = readable.load()``
    """
    rewritten = isinstance(model, Rewritten) and model.program is not None
    program = (
        model.program
        if isinstance(model, Rewritten) and rewritten
        else capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    )
    module = model if isinstance(model, Rewritten) and rewritten else None
    report = getattr(model, "report", None)
    rewrites = tuple(dict.fromkeys(f"{a.rewrite}: {a.claim}" for a in report.applications)) if isinstance(report, Report) else ()
    return write_python(program, folder, module=module, check=check, overwrite=overwrite, rewrites=rewrites)


def export_package(
    model: Model,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    check: bool = True,
) -> PackageReport:
    """Compile a model ahead of time with AOTInductor, reload the package and compare it with PyTorch.

    The package runs where torch is and a model is not: ``torch._inductor.aoti_load_package(path)`` is called as the
    example was, positions and keywords alike.

    Args:
        model: a module, rewritten or not, or a program; it is compiled for the device it is on.
        path: the file, ``….pt2``; it appears only when it is complete and, with ``check``, agrees.
        dynamic_shapes: as of ``capture``; "static" fixes every size to the example's.
        check: run the reloaded package at two sizes and compare.

    Raises:
        ExportError: there is no C++ compiler, the model cannot be compiled, or the package does not run or agree.
        UsageError: the path cannot be written, or the arguments are wrong.

    Example: ``export_package(fast, "model.pt2", args, kwargs)``
    """
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return to_package(program, path, dynamic=dynamic_shapes != "static", check=check)


def bench(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe = "inference",
    target: str | Target = "eager",
    rounds: int = 20,
    dynamic_shapes: Any = "auto",
    progress: Progress | None = None,
) -> Timing:
    """Time the captured model against the rewritten one on a target, alternating in one run; medians of ``rounds``.

    Unlike the figure in ``optimize``'s report this runs every target, ONNX Runtime included.

    Raises:
        UsageError: ``rounds`` is not positive; see ``optimize`` for the rest.

    Example: ``bench(model, args, target="onnxruntime").ratio``
    """
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, not {rounds}")
    where = _target(target)
    original = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    fast = optimize(original, recipe=recipe, target=where, progress=progress)
    _progress(progress)("measuring")
    before, after = measure(where.compile(original), where.compile(fast.program), original.example, rounds)
    return Timing(before / 1e3, after / 1e3, where.name)


def draw(
    model: Model | Report,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    at: str | None = None,
) -> Path:
    """Draw a model in layers, as an SVG file: repeated blocks in one box, what was rewritten with a thick border.

    A report of a run that replaced attentions is drawn as a bar per attention, as long as that is off.

    Args:
        model: a module with an example call, a rewritten module or a program; or ``fast.report``.
        path: the file.
        at: only below this module path, call by call.

    Raises:
        UsageError: the path cannot be written, no call is below ``at``, or the report says nothing of attentions; see ``capture``
            for the rest.

    Example: ``draw(fast, "block.svg", at="transformer.h.0")``
    """
    if isinstance(model, Report):
        drawing = draw_attentions(model.attentions)
    else:
        rewritten = model.program if isinstance(model, Rewritten) else None
        program = rewritten if rewritten is not None else capture(model, args, kwargs)
        drawing = draw_program(program, at)
    file = writable(path, "model.svg")
    with staged(file.parent, path) as beside:
        (beside / file.name).write_text(drawing, encoding="utf-8")
    return Path(path)


def saved_tensors(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    autocast: torch.dtype | None = None,
    mode: str = "train",
) -> SavedTensors:
    """What the backward of one call keeps of its forward: every storage, which node made it, which nodes need it.

    To the byte what ``torch.autograd.graph.saved_tensors_hooks`` sees when the captured program runs, each storage once,
    without parameters and buffers. Nothing is computed and no memory is needed: the graph runs on fake tensors. What
    requires a gradient is what says so: freeze parameters first.

    Args:
        model: a module, rewritten or not, or a program.
        args, kwargs: one example call, whose sizes count; a rewritten module or a program has its own.
        autocast: ``torch.bfloat16`` or ``torch.float16``: as mixed-precision training runs it, casts included.
        mode: as of ``capture``.

    Raises:
        UsageError: ``autocast`` is no 16-bit float, or a rewritten module computes another mode alone.
        CaptureError: see ``capture``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> saved = saved_tensors(model, (torch.randn(10, 8),))
        >>> saved.bytes, saved.by_need
        (2880, {('aten.linear',): 1600, ('aten.gelu',): 1280})
        >>> saved.freed(["gelu"])
        1280
    """
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise UsageError(f"autocast is torch.bfloat16, torch.float16 or None, not {autocast!r}")
    given = kwargs or {}
    if isinstance(model, Rewritten) and model.program is not None:
        program = _in_mode(model, mode)
        held = dict(model.named_parameters(remove_duplicate=False))
        inputs = program.signature.bind(args, given) if args or given else None
        return saved_by(program, inputs, trains=lambda name: name in held and held[name].requires_grad, autocast=autocast)
    program = as_run(capture(model, args, kwargs, dynamic_shapes=None, mode=mode))
    inputs = program.signature.bind(args, given) if args or given else None
    saved = saved_by(program, inputs, autocast=autocast)
    if not isinstance(model, nn.Module):
        return saved
    written = kept_as_written(model, args, given, training=program.mode == "train", autocast=autocast)
    if written is None or written == saved.bytes:
        return saved
    note = (
        f"the forward as it is written keeps {written:,} bytes: the captured graph is in canonical form, without "
        "torch.utils.checkpoint and autograd.Function, and with the dtypes it was captured with"
    )
    return replace(saved, notes=(*saved.notes, note))


def _in_mode(module: Rewritten, mode: str) -> Program:
    """The program that a rewritten module runs, in a mode."""
    program = as_run(module.program)
    wanted = module.training if mode in ("auto", "both", "widest") else mode == "train"
    if program.mode != "both" and (program.mode == "train") != wanted:
        raise UsageError(
            f"{program.name} was captured in {program.mode} mode and computes that alone", hint=f'mode="{program.mode}"'
        )
    flags = {path: module.get_submodule(path).training for path in program.training}
    program.training = flags if module.training == wanted else dict.fromkeys(flags, wanted)
    return program


@dataclass(frozen=True)
class Explanation:
    """Why a rewrite fired where it did, and why not elsewhere.

    Attributes:
        rewrite: its name.
        fired: ids of the applications.
        refused: id and sentence of each refusal.
        sources: the user's source line of each refusal, or None.
        nearest: the nearest miss of a rule that found nothing, or "".
    """

    rewrite: str
    fired: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    sources: tuple[str | None, ...]
    nearest: str = ""

    def __str__(self) -> str:
        lines = [f"{self.rewrite}: fired {len(self.fired)}, declined {len(self.refused)}"]
        lines += [f"  fired at {i.split('@', 1)[-1]}" for i in self.fired]
        for (place, reason), source in zip(self.refused, self.sources, strict=True):
            lines.append(f"  not at {place.split('@', 1)[-1]}: {reason}" + (f"\n    {source}" if source else ""))
        return "\n".join(lines + ([f"  nearest miss: {self.nearest}"] if self.nearest else []))


def explain(
    model: Model,
    rule: str | Pass,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    at: str | None = None,
) -> Explanation:
    """Why a rewrite fires or does not fire, without keeping it.

    Args:
        model: a module with an example call, or a program.
        rule: the rewrite, by name or itself.
        at: only below this module path.

    Example:
        >>> program = capture(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval(), (torch.randn(2, 8),))
        >>> print(explain(program, "layer-norm-to-rms-norm"))
        layer-norm-to-rms-norm: fired 1, declined 0
          fired at 1/layer_norm...
    """
    rewrite = _pass(rule)
    program = capture(model, args, kwargs)
    if at is not None:
        _check_entry(at, program)
    miss = nearest_miss(rewrite, program, at) if isinstance(rewrite, Rule) else None
    context = Context(check=False, only=(at,) if at else ())
    run_passes((rewrite,), program, context, check=False)
    log = context.log
    fired = tuple(a.id for a in log.applications)
    refused = tuple((r.id, r.reason) for r in log.refusals)
    sources = tuple(r.source for r in log.refusals)
    return Explanation(rewrite.name, fired, refused, sources, str(miss) if miss is not None and not fired else "")


@dataclass(frozen=True)
class Catalogue:
    """The rewrites, recipes, targets and ONNX lowerings there are.

    Attributes:
        passes: name, claim, paper, phase, purpose and first docstring line of each rewrite.
        recipes: name to the names of its passes, in order.
        targets: names.
        operators: op, provider, opset, form, dtypes and measurement of each row of the ONNX table, in words.
    """

    passes: tuple[dict[str, str], ...]
    recipes: dict[str, tuple[str, ...]]
    targets: tuple[str, ...]
    operators: tuple[dict[str, str], ...] = ()


def catalogue() -> Catalogue:
    """What there is, as data.

    Example:
        >>> "inference" in catalogue().recipes
        True
    """
    rows = tuple(
        {"name": p.name, "claim": p.claim.name, "note": p.claim.note, "paper": p.paper, "phase": p.phase, "purpose": p.purpose,
         "summary": _summary(p)}
        for p in _known().values()
    )  # fmt: skip
    recipes = {name: tuple(p.name for p in recipe().passes()) for name, recipe in RECIPES.items()}
    return Catalogue(rows, recipes, tuple(TARGETS), tuple(row.facts for row in ROWS))


# -- resolving what the user named -----------------------------------------------------------------------------


def _known() -> dict[str, Pass]:
    """Our passes, and those that installed packages add through the entry point group ``tautomer.passes``."""
    passes = {rewrite.name: rewrite for rewrite in (kind() for kind in PASSES)}
    for entry in importlib.metadata.entry_points(group="tautomer.passes"):
        rewrite = entry.load()()
        if not isinstance(rewrite, Pass):
            raise UsageError(f"the entry point '{entry.name}' of tautomer.passes is not a Pass", hint=f"mend {entry.value}")
        passes.setdefault(rewrite.name, rewrite)
    return passes


def _passes(recipe: str | Recipe, passes: Sequence[str | Pass] | None) -> tuple[Pass, ...]:
    if passes is not None:
        if isinstance(passes, str):
            raise UsageError(f"passes takes a list, not the string {passes!r}", hint=f"passes=[{passes!r}]")
        return tuple(map(_pass, passes))
    return _recipe(recipe).passes()


def _recipe(named: str | Recipe) -> Recipe:
    if isinstance(named, Recipe):
        return named
    if not isinstance(named, str):
        raise UsageError(f"recipe is a name or a Recipe, not {named!r}", hint="passes=[…] takes rewrites one by one")
    if named not in RECIPES:
        raise _unknown("recipe", named, RECIPES)
    return RECIPES[named]()


def _pass(named: str | Pass) -> Pass:
    if isinstance(named, Pass):
        return named
    if isinstance(named, type) and issubclass(named, Pass):
        return named()
    known = _known()
    if named not in known:
        raise _unknown("pass", str(named), known)
    return known[named]


def _target(named: str | Target) -> Target:
    if isinstance(named, str):
        return resolve(named)
    if not hasattr(named, "gain"):
        raise UsageError(f"target is a name or a Target, not {named!r}", hint=f"one of {', '.join(TARGETS)}")
    return named


def _progress(told: Progress | None) -> Progress:
    if told is None:
        return lambda phase: None
    if not callable(told):
        raise UsageError(f"progress is a function of the phase's name, not {told!r}", hint="progress=print")
    return told


def _data(given: Iterable[Any] | Data | None, tell: Progress) -> Data | None:
    if given is None:
        return None
    return replace(given, tell=tell) if isinstance(given, Data) else Data(given, tell)


def _entries(argument: str, entries: Iterable[str]) -> tuple[str, ...]:
    if isinstance(entries, str):
        raise UsageError(f"{argument} takes a list, not the string {entries!r}", hint=f"{argument}=[{entries!r}]")
    return tuple(entries)


def _check_entry(entry: str, program: Program) -> None:
    """An entry of only=, skip= or at= names a pass, an application or a module that the program runs."""
    paths = {path_of(node) for node in program.graph.nodes}
    modules = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}
    if "@" not in entry and entry not in modules and entry not in _known():
        nearest = difflib.get_close_matches(entry, sorted(modules | set(_known())), 1)
        raise UsageError(
            f"'{entry}' is no pass, no application (name@place) and no module that {program.name} runs",
            hint=f"'{nearest[0]}'" if nearest else "a module path such as " + ", ".join(sorted(modules)[:3]),
        )


def _unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, 1)
    return UsageError(f"there is no {kind} '{name}'", hint=f"'{nearest[0]}'" if nearest else f"one of {', '.join(names)}")


def _load_exported(path: Path) -> torch.export.ExportedProgram:
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    try:
        return torch.export.load(path)
    except Exception as failure:
        raise UsageError(f"{path} is not a .pt2 file that torch.export wrote: {failure}") from failure


def _summary(rewrite: Pass) -> str:
    module = __import__("sys").modules[type(rewrite).__module__]
    return (module.__doc__ or type(rewrite).__doc__ or "").strip().splitlines()[0]


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
