"""The command line: the front door's verbs on ``module:factory``, ``.pt2`` and ``hf:DIRECTORY``.

Exit code 0, or 1 with one clear sentence on bad input or a broken claim; a traceback only with ``--debug``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.table import Table

import tautomer
from tautomer.rewrite.errors import TautomerError

from ._models import load_model

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The same PyTorch model in another, provably equal form.")
_out, _err = Console(), Console(stderr=True)

Spec = Annotated[str, typer.Argument(help="package.module:factory, a .pt2 file, or hf:DIRECTORY")]
Json = Annotated[bool, typer.Option("--json", help="print data instead of text")]
Target = Annotated[str, typer.Option(help="where it should pay: eager, inductor, onnxruntime")]
Recipe = Annotated[str, typer.Option(help="which rewrites, by the name of a recipe")]
Passes = Annotated[list[str] | None, typer.Option("--pass", help="exactly this rewrite (repeatable), paying or not")]
Static = Annotated[bool, typer.Option("--static", help="fix every size to the example's")]


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="show tracebacks")] = False) -> None:
    _settings["debug"] = debug


_settings = {"debug": False}


@app.command()
def optimize(
    model: Spec,
    recipe: Recipe = "inference",
    passes: Passes = None,
    target: Target = "eager",
    save: Annotated[Path | None, typer.Option(help="write the result to this folder")] = None,
    static: Static = False,
    as_json: Json = False,
) -> None:
    """Rewrite a model, check it, and print the report."""
    loaded = load_model(model)
    with _progress(as_json) as tell:
        fast = tautomer.optimize(
            loaded.model, loaded.args, loaded.kwargs, recipe=recipe, passes=passes, target=target,
            dynamic_shapes="static" if static else "auto", progress=tell,
        )  # fmt: skip
    _show(fast.report, fast.report.as_dict(), as_json)
    if save is not None:
        _err.print(f"saved to {tautomer.save(fast, save)}")


@app.command()
def export(
    model: Spec,
    path: Annotated[Path, typer.Argument(help="the ONNX file to write")],
    rewrite: Annotated[bool, typer.Option(help="optimize for ONNX Runtime first")] = True,
    provider: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    opset: int = 23,
    static: Static = False,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, run it on ONNX Runtime and compare."""
    target = "onnxruntime" if provider == "cpu" else f"onnxruntime-{provider}"
    write = partial(tautomer.export_onnx, provider=provider, opset=opset)
    _write(write, "exporting and running the file", model, path, {"target": target} if rewrite else None, static, as_json)


@app.command()
def python(
    model: Spec,
    folder: Annotated[Path, typer.Argument(help="the package to write")],
    rewrite: Annotated[bool, typer.Option(help="optimize first")] = True,
    recipe: Recipe = "inference",
    target: Target = "eager",
    overwrite: Annotated[bool, typer.Option(help="replace a package that was written before")] = False,
    static: Static = False,
    as_json: Json = False,
) -> None:
    """Write a model as readable Python that needs no tautomer, and compare."""
    write = partial(tautomer.to_python, overwrite=overwrite)
    settings: Mapping[str, Any] | None = {"recipe": recipe, "target": target} if rewrite else None
    _write(write, "writing and running the package", model, folder, settings, static, as_json)


@app.command()
def package(
    model: Spec,
    path: Annotated[Path, typer.Argument(help="the .pt2 file to write")],
    rewrite: Annotated[bool, typer.Option(help="optimize for Inductor first")] = True,
    static: Static = False,
    as_json: Json = False,
) -> None:
    """Compile a model ahead of time with AOTInductor, reload the package and compare."""
    settings = {"target": "inductor"} if rewrite else None
    _write(tautomer.export_package, "compiling and running the package", model, path, settings, static, as_json)


def _write(
    write: Callable[..., Any],
    doing: str,
    model: str,
    place: Path,
    settings: Mapping[str, Any] | None,
    static: bool,
    as_json: bool,
) -> None:
    """Write a model to ``place``; with ``settings`` of ``optimize``, rewritten first."""
    loaded = load_model(model)
    sizes = "static" if static else "auto"
    subject: Any = loaded.model
    with _progress(as_json) as tell:
        if settings is not None:
            subject = tautomer.optimize(subject, loaded.args, loaded.kwargs, **settings, dynamic_shapes=sizes, progress=tell)
        tell(doing)
        report = write(subject, place, loaded.args, loaded.kwargs, dynamic_shapes=sizes)
    _show(report, dataclasses.asdict(report), as_json)


@app.command()
def verify(
    reference: Spec,
    candidate: Spec,
    gradients: Annotated[bool, typer.Option(help="compare gradients too")] = False,
    as_json: Json = False,
) -> None:
    """Check that two models agree on the reference's example inputs and at other sizes."""
    ours, theirs = load_model(reference), load_model(candidate)
    with _progress(as_json):
        evidence = tautomer.verify(ours.model, theirs.model, ours.args, ours.kwargs, gradients=gradients)  # type: ignore[arg-type]
    _show(f"they agree: {evidence}", dataclasses.asdict(evidence), as_json)


@app.command()
def explain(
    model: Spec,
    rewrite: Annotated[str, typer.Argument(help="the rewrite, by name")],
    at: Annotated[str | None, typer.Option(help="only below this module path")] = None,
    as_json: Json = False,
) -> None:
    """Say where a rewrite fires and why it does not fire elsewhere."""
    loaded = load_model(model)
    with _progress(as_json):
        explanation = tautomer.explain(loaded.model, rewrite, loaded.args, loaded.kwargs, at=at)
    _show(str(explanation), dataclasses.asdict(explanation), as_json)


@app.command()
def draw(
    model: Spec,
    path: Annotated[Path, typer.Argument(help="the SVG file to write")],
    rewrite: Annotated[bool, typer.Option(help="optimize first, and mark what was rewritten")] = False,
    target: Target = "eager",
    at: Annotated[str | None, typer.Option(help="only below this module path, call by call")] = None,
    as_json: Json = False,
) -> None:
    """Draw a model in layers, repeated blocks in one box."""
    loaded = load_model(model)
    subject: Any = loaded.model
    with _progress(as_json) as tell:
        if rewrite:
            subject = tautomer.optimize(subject, loaded.args, loaded.kwargs, target=target, progress=tell)
        written = tautomer.draw(subject, path, loaded.args, loaded.kwargs, at=at)
    _show(f"drawn in {written}", {"path": str(written)}, as_json)


@app.command()
def saved(
    model: Spec,
    mode: Annotated[str, typer.Option(help="train, eval, or auto for the mode the model is in")] = "train",
    autocast: Annotated[str | None, typer.Option(help="bfloat16 or float16: run in mixed precision")] = None,
    as_json: Json = False,
) -> None:
    """Show what the backward keeps of the forward, and which nodes need it."""
    loaded = load_model(model)
    with _progress(as_json):
        dtype: Any = getattr(torch, autocast, autocast) if autocast else None
        found = tautomer.saved_tensors(loaded.model, loaded.args, loaded.kwargs, autocast=dtype, mode=mode)
    _show(found, dataclasses.asdict(found), as_json)


@app.command()
def catalogue(as_json: Json = False) -> None:
    """List the rewrites, recipes and targets there are, and what becomes which ONNX operator."""
    found = tautomer.catalogue()
    table = Table("rewrite", "claim", "for", "what it does", box=None)
    for row in found.passes:
        table.add_row(row["name"], row["claim"], row["purpose"], row["summary"])
    operators = Table("op", "becomes in ONNX", box=None)
    for row in found.operators:
        where = f"{row['op']}\n  {row['provider']}, opset {row['opset']}"
        operators.add_row(where, f"{row['form']}\n  {row['runs in']}; {row['measured']}")
    names = f"recipes: {', '.join(found.recipes)}; targets: {', '.join(found.targets)}"
    _show(Group(table, "", operators, "", names), dataclasses.asdict(found), as_json)


@app.command()
def bench(
    model: Spec,
    recipe: Recipe = "inference",
    target: Target = "eager",
    rounds: Annotated[int, typer.Option(help="alternating rounds")] = 20,
    as_json: Json = False,
) -> None:
    """Time a model before and after, alternating in one run, on the target."""
    loaded = load_model(model)
    with _progress(as_json) as tell:
        timing = tautomer.bench(
            loaded.model, loaded.args, loaded.kwargs, recipe=recipe, target=target, rounds=rounds, progress=tell
        )
    text = f"{timing.before_ms:.3f} ms → {timing.after_ms:.3f} ms on {timing.target} ({timing.ratio:.3f} of it, {rounds} rounds)"
    _show(text, dataclasses.asdict(timing), as_json)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error that names the phase; silent with ``--json``."""
    if quiet:
        yield lambda phase: None
        return
    with _err.status("capturing …") as status:
        yield lambda phase: status.update(f"{phase} …")


def _show(text: Any, data: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(data, default=str))
    else:
        _out.print(text)


def main() -> None:
    """The entry point of the command ``tautomer``."""
    try:
        app(standalone_mode=False)
    except TautomerError as error:
        if _settings["debug"]:
            raise
        _err.print(f"tautomer: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except Exception as error:
        if _settings["debug"]:
            raise
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        _err.print(f"tautomer: {str(message).splitlines()[0]} (--debug shows where)", style="red", markup=False, highlight=False)
        sys.exit(getattr(error, "exit_code", 1) or 1)


if __name__ == "__main__":
    main()
