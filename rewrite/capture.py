"""Capture a model as a program: one recorded eager run, ``torch.export`` before decomposition, canonical form, checked.

    interpret(capture(model, args, kwargs), leaves)  =  leaves of model(*args, **kwargs)

at the sizes of the example and at other batch sizes and lengths.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import guards_of
from .build import build
from .canonical import canonicalize
from .errors import CaptureError, DataDependent, Refused, UsageError
from .example import Call, agrees, answer, call_of, check_mode, differentiates, functions_of, resized, trials_of
from .export import PREFIX, Sizes, automatic_sizes, export, given_sizes
from .functional import functionalize
from .functions import defined
from .interpret import written
from .modes import merge
from .program import Program
from .record import record, undisturbed
from .shapes import static
from .signature import Signature

_MODES = ("auto", "eval", "train", "both", "widest")


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    mode: str = "auto",
) -> Program:
    """The program that ``model(*args, **kwargs)`` runs.

    Args:
        model: any module. It is afterwards what it was, bit for bit, whether the capture succeeds or raises; the
            program shares its weights.
        args, kwargs: an example call. Tensors may be of any shape the model takes.
        dynamic_shapes: "auto" keeps batch sizes and sequence lengths symbolic where the model allows it; None fixes
            the sizes of the example; anything else is passed to ``torch.export``.
        mode: "eval" or "train" for one mode, "both" for a program that reads the ``training`` flags of the modules,
            "auto" for the mode the model is in, "widest" for both if the model is in training mode or computes the same in
            both, and else for the mode it is in.

    Raises:
        UsageError: the model or the example cannot be right; the sentence says why.
        CaptureError: the forward does what a graph cannot; with the user's line, what to try, and the largest
            submodules that can be captured (see ``capture_parts``).

    Example:
        >>> program = capture(torch.nn.Linear(4, 2), (torch.randn(3, 4),))
        >>> program.count(torch.ops.aten.linear.default), program.notes
        (1, [])
    """
    if mode not in _MODES:
        raise UsageError(f"there is no mode {mode!r}", hint=f"one of {', '.join(_MODES)}")
    call = call_of(model, args, {} if kwargs is None else kwargs, resolve=mode == "auto")
    try:
        with undisturbed(model):
            return _widest(call, dynamic_shapes) if mode == "widest" else _capture(call, dynamic_shapes, mode)
    except CaptureError as error:
        parts = _exportable(call)
        if not parts:
            raise
        raise type(error)(
            f"{error.what}\n  can be captured: {', '.join(parts)}",
            where=error.where,
            hint=f"{error.hint}; or tautomer.optimize_parts(model, args, kwargs), which rewrites those submodules",
        ) from error.__cause__


def capture_parts(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = "auto"
) -> dict[str, Program]:
    """The largest submodules of ``model`` that can be captured, by path; ``{"": program}`` if the whole can.

    A submodule is captured with the inputs of its first call in ``model(*args, **kwargs)``, in the mode it is in.

    Raises:
        UsageError: as for ``capture``.
        CaptureError: nothing in the model can be captured.
    """
    call = call_of(model, args, {} if kwargs is None else kwargs, resolve=False)
    found: dict[str, Program] = {}
    for path, part in _descend(call):
        found[path] = _capture(part, dynamic_shapes, "auto")
    if not found:
        raise CaptureError(f"no submodule of {type(model).__name__} can be captured")
    return found


# -- one capture ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """One way to try an export: which sizes are symbolic, on which leaves; and what it gave, by the mode of all modules."""

    leaves: Sequence[Any]
    sizes: Sequence[Sizes]
    oblivious: bool = False
    exported: dict[bool | None, torch.export.ExportedProgram] = field(default_factory=dict, compare=False)

    def export(self, call: Call) -> torch.export.ExportedProgram:
        """Made once for a mode; the model is in it."""
        modes = {module.training for module in call.model.modules()}
        mode = modes.pop() if len(modes) == 1 else None
        if mode is None or mode not in self.exported:
            self.exported[mode] = export(call.model, self.leaves, call.in_spec, self.sizes, oblivious=self.oblivious)
        return self.exported[mode]


def _widest(call: Call, dynamic_shapes: Any) -> Program:
    """The program in both modes, if that is wanted, or in the one that the model is in; what both have is exported once."""
    plans = list(_plans(call, dynamic_shapes))
    with contextlib.suppress(CaptureError):  # perhaps in one of the modes alone
        program = _capture(call, dynamic_shapes, "both", plans)
        if call.model.training or (program.mode == "both" and not program.training):
            return program
    check_mode(call.model)
    return _capture(call, dynamic_shapes, "auto", plans)


def _capture(call: Call, dynamic_shapes: Any, mode: str, plans: Sequence[_Plan] | None = None) -> Program:
    """The program in a mode; the caller puts the model back."""
    if mode != "both":
        if mode != "auto" and call.model.training != (mode == "train"):
            call.model.train(mode == "train")
            # The output may have another structure in this mode, as with auxiliary heads.
            call = dataclasses.replace(call, recording=record(call.model, call.args, call.kwargs))
        program = _best(call, dynamic_shapes, plans, both=False)
        program.mode = "train" if call.model.training else "eval"
        return program
    try:
        return _best(call, dynamic_shapes, plans, both=True)
    except Refused as refusal:
        program = _capture(call, dynamic_shapes, "auto", plans)
        program.notes.insert(0, f"captured for {program.mode} mode only: {refusal}")
        return program


def _best(call: Call, dynamic_shapes: Any, plans: Sequence[_Plan] | None, *, both: bool) -> Program:
    """The first capture that computes what the model computes at every trial, or the one that does at most of them."""
    trials = [trials_of(call, training) for training in ((True, False) if both else (None,))]
    best, most, failure = None, (-1, 0), None
    for plan in plans or _plans(call, dynamic_shapes):
        try:
            program = _attempt(call, plan, both)
        except CaptureError as error:
            failure = failure or error
            if isinstance(error, DataDependent):
                break
            continue
        verdicts = [agrees(program, trial) for group in trials for trial in group]
        if False in verdicts:
            failure = failure or _wrong(call)
            continue
        score = (verdicts.count(True), -len(program.signature.conditions))
        if score > most:
            best, most = program, score
        if call.embedded and _fixes_length(program, call):
            # No other plan frees the length; one without it may have fewer conditions.
            if not _branches_of(program) or not any(size and len(size) > 1 for size in plan.sizes):
                break
        elif all(verdicts):
            break
    if best is None:
        assert failure is not None
        raise failure
    lost = set(call.recording.replaced) - {str(node.target) for node in written(best.graph) if node.op == "get_attr"}
    if lost:
        raise CaptureError(
            f"the forward assigns '{min(lost)}' anew, torch.export drops that, and the next call of "
            f"{type(call.model).__name__} would not see it",
            hint=f"write it in place: self.{min(lost)}.copy_(…)",
        )
    if (both or call.model.training) and not differentiates(best, call):
        raise _lost_backward(call)
    best.notes = [*_notes(best, call), *_size_notes(best, call, dynamic_shapes)]
    return best


def _branches_of(program: Program) -> list[str]:
    """The conditions of a program besides the sizes that are fixed."""
    fixed = set(_fixed(program))
    return [condition for condition in program.signature.conditions if condition not in fixed]


def _fixes_length(program: Program, call: Call) -> bool:
    """Whether the batch is free and the length is not, in every input that has one."""
    sizes = [(node.meta.get("val"), size) for node, size in zip(program.placeholders, _wanted(call, call.leaves), strict=True)]
    free = [(static(value.shape[dim]) is None, dim) for value, size in sizes if isinstance(value, Tensor) for dim in size or ()]
    return all(is_free == (dim == 0) for is_free, dim in free)


def _plans(call: Call, dynamic_shapes: Any) -> Iterator[_Plan]:
    leaves: Sequence[Any] = call.leaves
    if dynamic_shapes not in ("auto", None, "static"):
        yield _Plan(leaves, given_sizes(call.model, call.args, call.kwargs, dynamic_shapes))
        return
    fixed = _Plan(leaves, [None] * len(leaves))
    if dynamic_shapes == "auto" and any(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        # A size of 1 would be taken for a constant.
        if call.batch == 1:
            larger = resized(call, batch=2)
            leaves = leaves if answer(call, larger, None) is None else larger
        sizes = _wanted(call, leaves)
        batch: list[Sizes] = [{0: size[0]} if size else None for size in sizes]  # type: ignore[index]
        yield _Plan(leaves, sizes)
        if call.embedded and sizes != batch:
            # The second size was a guess, worth one export.
            sizes = batch
            yield _Plan(leaves, sizes)
        yield _Plan(leaves, sizes, oblivious=True)
        if sizes != batch:
            yield _Plan(leaves, batch)
    yield fixed


def _wanted(call: Call, leaves: Sequence[Any]) -> list[Sizes]:
    return automatic_sizes(leaves, call.length, call.cached, call.embedded)


def _attempt(call: Call, plan: _Plan, both: bool) -> Program:
    if both:
        flags = {path: module.training for path, module in call.model.named_modules()}
        train, evaluated = (_raw(call, plan, training) for training in (True, False))
        conditions = dict.fromkeys((*train.signature.conditions, *evaluated.signature.conditions))
        program = merge(train, evaluated, flags)
        program.signature = dataclasses.replace(program.signature, conditions=tuple(conditions))
    else:
        program = _raw(call, plan, None)
    functionalize(program)
    return canonicalize(program)


def _raw(call: Call, plan: _Plan, training: bool | None) -> Program:
    """The program as exported, with every module in the given mode (None: each in the mode it is in)."""
    with call.in_mode(training):
        exported = plan.export(call)
        recording = call.recording
        signature = Signature.of(call.model.forward, type(call.model).__name__, call.args, call.kwargs, recording.out_spec)
        program = build(exported, call.model, PREFIX, signature, call.leaves, recording.inference)
    program.signature = dataclasses.replace(signature, conditions=(*_branches(exported), *_fixed(program)))
    return program


# -- what sizes a program is for ------------------------------------------------------------------------------


def _branches(exported: torch.export.ExportedProgram) -> Iterator[str]:
    """The conditions on symbolic sizes that the forward asked about."""
    for guard in guards_of(exported):
        yield guard.replace("L['leaves']", "leaves")


def _fixed(program: Program) -> Iterator[str]:
    """The sizes of the inputs that are the same in every call."""
    for index, node in enumerate(program.placeholders):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not node.users:
            continue
        for dim, size in enumerate(value.shape):
            if static(size) is not None:
                yield f"leaves[{index}].size()[{dim}] == {static(size)}"


# -- what the report says -------------------------------------------------------------------------------------


def _notes(program: Program, call: Call) -> Iterator[str]:
    for effect in call.recording.effects:
        yield f"the forward changes {effect}; the program does not"
    if call.recording.remembers:
        yield f"{type(call.model).__name__} keeps state between calls; the program computes what the first call does"
    if not call.model.training and defined() and (names := functions_of(call)) and not differentiates(program, call):
        for name in names:
            yield f"the backward of '{name}' is not part of the program: its gradients are those of its forward"
    for path, module in call.model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            yield f"the backward hooks of '{path or type(module).__name__}' are not part of the program"


def _size_notes(program: Program, call: Call, dynamic_shapes: Any) -> Iterator[str]:
    if dynamic_shapes != "auto":
        return
    for name, node, size in zip(call.names, program.placeholders, _wanted(call, call.leaves), strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not size or not node.users:
            continue
        for dim in size:
            if static(value.shape[dim]) is not None:
                yield f"dimension {dim} of '{name}' is fixed to {value.shape[dim]}"


def _lost_backward(call: Call) -> CaptureError:
    name, line = next(iter(functions_of(call).items()), (None, None))
    suspect = (
        f"the backward of '{name}'" if name else "hooks on gradients, and the readers of a weight that is written under no_grad"
    )
    return CaptureError(
        f"the captured graph does not have the gradients of {type(call.model).__name__}: torch.export drops {suspect}",
        where=line,
        hint="torch.library.custom_op with register_autograd, which a graph keeps; model.eval() if it is only run",
    )


def _wrong(call: Call) -> CaptureError:
    return CaptureError(
        f"the captured graph does not compute what {type(call.model).__name__} computes in eager mode",
        hint="look for state the forward reads and changes, for randomness outside of torch, and for numpy in the forward",
    )


# -- parts ----------------------------------------------------------------------------------------------------


def _exportable(call: Call) -> list[str]:
    """The paths of the largest submodules that can be exported; for an error message, so nothing here raises."""
    try:
        return [path for path, _ in _descend(call) if path]
    except Exception:
        return []


def _descend(call: Call) -> Iterator[tuple[str, Call]]:
    recording = record(call.model, call.args, call.kwargs, keep_inputs=True)
    known: dict[Any, bool] = {}
    pending = [""]
    while pending:
        path = pending.pop(0)
        module = call.model.get_submodule(path)
        if path in recording.inputs:
            part = call if not path else _part(module, *recording.inputs[path])
            if part is not None and _can_export(part, known):
                yield path, part
                continue
        pending = [".".join(filter(None, (path, name))) for name, _ in module.named_children()] + pending


def _part(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    try:
        return call_of(module, args, kwargs, resolve=False)
    except (CaptureError, UsageError):
        return None


def _can_export(part: Call, known: dict[Any, bool]) -> bool:
    """Equal siblings (class, weights and inputs of equal shapes) are tried once."""
    shapes = [tuple(p.shape) for p in part.model.parameters()]
    inputs = [tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf) for leaf in part.leaves]
    key = (type(part.model), str(part.model), str(shapes), str(inputs))
    if key not in known:
        try:
            _attempt(part, _Plan(part.leaves, [None] * len(part.leaves)), both=False)
            known[key] = True
        except CaptureError:
            known[key] = False
    return known[key]
