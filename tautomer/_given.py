"""What the user gave, as the framework takes it: a model, passes, recipes, targets, places.

A wrong name gets the nearest right one.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from tautomer.backends.rewritten import Rewritten
from tautomer.backends.targets import TARGETS, resolve
from tautomer.passes.recipes import PASSES, RECIPES, Recipe
from tautomer.rewrite._torch import pytree
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture as capture_module
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.pass_base import Pass
from tautomer.rewrite.program import Program, path_of
from tautomer.rewrite.target import Target

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
        model = exported_of(Path(model))
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


def known() -> dict[str, Pass]:
    """Our passes by name, and those that installed packages add through the entry point group ``tautomer.passes``."""
    passes = {rewrite.name: rewrite for rewrite in (kind() for kind in PASSES)}
    for entry in importlib.metadata.entry_points(group="tautomer.passes"):
        rewrite = entry.load()()
        if not isinstance(rewrite, Pass):
            raise UsageError(f"the entry point '{entry.name}' of tautomer.passes is not a Pass", hint=f"mend {entry.value}")
        passes.setdefault(rewrite.name, rewrite)
    return passes


def passes_of(recipe: str | Recipe, passes: Sequence[str | Pass] | None) -> tuple[Pass, ...]:
    if passes is not None:
        if isinstance(passes, str):
            raise UsageError(f"passes takes a list, not the string {passes!r}", hint=f"passes=[{passes!r}]")
        return tuple(map(pass_of, passes))
    return recipe_of(recipe).passes()


def recipe_of(named: str | Recipe) -> Recipe:
    if isinstance(named, Recipe):
        return named
    if not isinstance(named, str):
        raise UsageError(f"recipe is a name or a Recipe, not {named!r}", hint="passes=[…] takes rewrites one by one")
    if named not in RECIPES:
        raise _unknown("recipe", named, RECIPES)
    return RECIPES[named]()


def pass_of(named: str | Pass) -> Pass:
    if isinstance(named, Pass):
        return named
    if isinstance(named, type) and issubclass(named, Pass):
        return named()
    passes = known()
    if named not in passes:
        raise _unknown("pass", str(named), passes)
    return passes[named]


def target_of(named: str | Target) -> Target:
    if isinstance(named, str):
        return resolve(named)
    if not hasattr(named, "gain"):
        raise UsageError(f"target is a name or a Target, not {named!r}", hint=f"one of {', '.join(TARGETS)}")
    return named


def progress_of(told: Progress | None) -> Progress:
    if told is None:
        return lambda phase: None
    if not callable(told):
        raise UsageError(f"progress is a function of the phase's name, not {told!r}", hint="progress=print")
    return told


def data_of(given: Iterable[Any] | Data | None, tell: Progress) -> Data | None:
    if given is None:
        return None
    return replace(given, tell=tell) if isinstance(given, Data) else Data(given, tell)


def entries_of(argument: str, entries: Iterable[str]) -> tuple[str, ...]:
    if isinstance(entries, str):
        raise UsageError(f"{argument} takes a list, not the string {entries!r}", hint=f"{argument}=[{entries!r}]")
    return tuple(entries)


def check_entry(entry: str, program: Program) -> None:
    """An entry of only=, skip= or at= names a pass, an application or a module that the program runs."""
    paths = {path_of(node) for node in program.graph.nodes}
    modules = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}
    if "@" not in entry and entry not in modules and entry not in known():
        nearest = difflib.get_close_matches(entry, sorted(modules | set(known())), 1)
        raise UsageError(
            f"'{entry}' is no pass, no application (name@place) and no module that {program.name} runs",
            hint=f"'{nearest[0]}'" if nearest else "a module path such as " + ", ".join(sorted(filter(None, modules))[:3]),
        )


def exported_of(path: Path) -> torch.export.ExportedProgram:
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    try:
        return torch.export.load(path)
    except Exception as failure:
        raise UsageError(f"{path} is not a .pt2 file that torch.export wrote: {failure}") from failure


def _unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, 1)
    return UsageError(f"there is no {kind} '{name}'", hint=f"'{nearest[0]}'" if nearest else f"one of {', '.join(names)}")
