"""The front door: what is written to disk, or measured, of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tautomer.backends.files import staged, writable
from tautomer.backends.rewritten import Rewritten
from tautomer.backends.to_onnx import OnnxReport, refuse_unrolled, to_onnx
from tautomer.backends.to_package import PackageReport, to_package
from tautomer.backends.to_python import PythonReport
from tautomer.backends.to_python import to_python as write_python
from tautomer.passes.recipes import Recipe
from tautomer.rewrite.attention_drawing import draw_attentions
from tautomer.rewrite.drawing import draw as draw_program
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.measure import measure
from tautomer.rewrite.report import Report, Timing
from tautomer.rewrite.target import Target

from ._front import optimize
from ._given import Model, Progress, capture, progress_of, target_of


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
    where = target_of(target)
    original = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    fast = optimize(original, recipe=recipe, target=where, progress=progress)
    progress_of(progress)("measuring")
    before, after = measure(where.compile(original), where.compile(fast.program), original.example, rounds)
    return Timing(before / 1e3, after / 1e3, where.name)
