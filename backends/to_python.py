"""Write a program as Python that a person reads: a package of its own, checked in a fresh process before it is put in place.

    program  ->  calls of modules  ->  functions  ->  classes  ->  model.py, with the weights beside it

What is written imports torch and safetensors alone. It computes the emitted module bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tautomer.rewrite.errors import ExportError, UsageError
from tautomer.rewrite.program import Program

from .files import save_tensors, staged
from .python.called import Called
from .python.check import Agreement, compare
from .python.classes import Classes, Split, Weight, sequential
from .python.function import Functions
from .python.names import size_names
from .python.nesting import SEQUENTIAL, Graph, nested
from .python.text import CONSTANTS, WEIGHTS, Text, file_text
from .python.torch_layers import layers
from .rewritten import Rewritten
from .to_torch import as_run, to_torch

MODEL = "model.py"


@dataclass(frozen=True)
class PythonReport:
    """What was written and how well it agrees.

    Attributes:
        path: the folder.
        model: the class of the model.
        classes: how many instances every class of the file has.
        lines: the lines of ``model.py``.
        bytes: the size of the weights.
        sizes: the input sizes it was run at; empty if it was not checked. Outputs had the same bits at each.
        gradients: the worst relative error of a gradient; 0.0 means the same bits, None that there are none.
    """

    path: Path
    model: str
    classes: Mapping[str, int]
    lines: int
    bytes: int
    sizes: tuple[str, ...] = ()
    gradients: float | None = None

    def __str__(self) -> str:
        most = ", ".join(f"{count} {name}" for name, count in self.classes.items())
        lines = [f"{self.path}: {self.model} in {self.lines} lines ({most}), weights {self.bytes / 1e6:.1f} MB"]
        if not self.sizes:
            return "\n".join([*lines, "not run"])
        lines.append(f"run without tautomer: the same bits at {'; '.join(self.sizes)}")
        if self.gradients is not None:
            lines.append("gradients: the same bits" if self.gradients == 0 else f"gradients: {self.gradients:.1e} (relative)")
        return "\n".join(lines)

    def __rich__(self) -> str:
        return str(self).replace("[", r"\[")


@dataclass(frozen=True)
class Source:
    """A model as text.

    Attributes:
        text: ``model.py``.
        name: the class of the model.
        called: how it is called.
        classes: how many instances every class has.
    """

    text: str
    name: str
    called: Called
    classes: Mapping[str, int]


def to_python(
    program: Program,
    folder: str | os.PathLike[str],
    *,
    module: Rewritten | None = None,
    check: bool = True,
    overwrite: bool = False,
    rewrites: Sequence[str] = (),
) -> PythonReport:
    """Write ``program`` as a Python package; nothing is left behind if it cannot be written or does not agree.

    ``__init__.py`` exports the model and ``load``, ``model.py`` has the classes, ``weights.safetensors`` every parameter and
    buffer once, under the names of the emitted module's state dict. What is not in a state dict is in
    ``constants.safetensors``, if there is any.

    Args:
        module: the emitted module, if it is not that of ``program`` as it is: trained since, say.
        check: import it in a process that has no tautomer, and compare outputs and gradients with the emitted module.
        overwrite: replace ``folder`` if this function wrote it before.
        rewrites: the rewrites that were applied, with their claims, for the docstring.

    Raises:
        UsageError: the folder cannot be written, or exists and is not to be replaced; before any work.
        ExportError: the program holds what has no Python text, or what was written does not agree.

    Example: ``print(to_python(capture(model, args), "readable"))``
    """
    target = _writable(folder, overwrite)
    emitted = module if module is not None else to_torch(program)
    source = write(program, emitted, rewrites)
    with staged(target.parent, folder) as beside:
        made = beside / target.name
        made.mkdir(mode=0o777)
        (made / MODEL).write_text(source.text, encoding="utf-8")
        (made / "__init__.py").write_text(_exports(source), encoding="utf-8")
        size = _save(emitted, made)
        agreement = compare(program, emitted, source.called, made) if check else Agreement()
        shutil.rmtree(made / "__pycache__", ignore_errors=True)
    lines = source.text.count("\n")
    return PythonReport(target, source.name, source.classes, lines, size, agreement.sizes, agreement.gradients)


def write(program: Program, emitted: Rewritten, rewrites: Sequence[str] = ()) -> Source:
    """The text of a program, over the tensors that its emitted module holds."""
    twin = as_run(program)
    if any(node.target in twin.regions and node.users for node in twin.graph.find_nodes(op="get_attr")):
        raise ExportError(
            f"{program.name} holds a region of its own (torch.cond, autocast), which has no plain Python text",
            hint="save the module instead (tautomer.save), or capture a model without it",
        )
    held = dict(emitted.named_parameters(remove_duplicate=False)) | dict(emitted.named_buffers(remove_duplicate=False))
    graph = Graph(twin, layers(twin, held))
    persistent = emitted.state_dict(keep_vars=True)
    weights = {
        name: Weight(x, "parameter" if isinstance(x, torch.nn.Parameter) else "buffer", name in persistent)
        for name, x in held.items()
    }
    called = Called(twin)
    classes, functions = _classes(graph, weights, _ties(held), called.records)
    tensors = {x: text for x, text in called.given.items() if isinstance(x.meta.get("val"), Tensor)}
    called.sizes = size_names(functions, {x: re.sub(r"\W+", "_", text).strip("_") for x, text in tensors.items()})
    text = file_text(Text(classes, called.sizes, called), twin, emitted.training, rewrites)
    name = next(cls.name for cls in classes if cls.path == "")
    return Source(text, name, called, {cls.name: len(cls.numbers) for cls in classes})


def _classes(
    graph: Graph, weights: Mapping[str, Weight], ties: Mapping[str, str], taken: Iterable[str]
) -> tuple[Classes, Functions]:
    """Classes of the module tree; a module that cannot be one is dissolved, and it starts anew."""
    dissolved = _without_weights(graph, weights)
    held = {name: weight.tensor for name, weight in weights.items()}
    while True:
        root = nested(graph, dissolved)
        functions = Functions(graph, root, held, _lists(weights, graph))
        single = {layer.path for layer in graph.layers.values()}
        broken = set[str]()
        for call in root.calls():
            chain = call.kind == SEQUENTIAL and sequential(graph.layers, call, functions.made) is not None
            if call.path and (call.path in single or (not chain and (call.kind == SEQUENTIAL or _numbered(call.path, weights)))):
                broken.add(call.path)
        if broken:
            dissolved |= broken
            continue
        try:
            return Classes(functions, weights, ties, graph.program.training, taken), functions
        except Split as split:
            if not split.path:
                raise
            dissolved.add(split.path)


def _numbered(path: str, weights: Mapping[str, Weight]) -> bool:
    """Whether a module has numbered submodules."""
    return any(name.startswith(f"{path}.") and name.removeprefix(f"{path}.").split(".")[0].isdigit() for name in weights)


def _without_weights(graph: Graph, weights: Mapping[str, Weight]) -> set[str]:
    """The modules without weights that are a few calls: an activation is no class."""
    counts: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for node in graph.steps:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            counts[str(path)] = counts.get(str(path), 0) + 1
            kinds[str(path)] = str(kind)
    flags = set(graph.program.training)
    return {
        path
        for path, count in counts.items()
        if path
        and not any(name.startswith(f"{path}.") for name in (*weights, *(f"{flag}." for flag in flags)))
        and (count <= 4 or kinds[path].startswith("torch.nn"))
        and not (kinds.get(path.rpartition(".")[0]) == SEQUENTIAL and count > 1)
    }


def _lists(weights: Mapping[str, Weight], graph: Graph) -> dict[str, int]:
    """The modules whose submodules are numbered from zero, and how many those are."""
    names: dict[str, set[str]] = {}
    for name in (
        *weights,
        *(f"{layer.path}.weight" for layer in graph.layers.values()),
        *(f"{p}.training" for p in graph.program.training),
    ):
        path, _, _ = name.rpartition(".")
        while path:
            path, _, last = path.rpartition(".")
            names.setdefault(path, set()).add(last)
    return {path: max(map(int, inner)) + 1 for path, inner in names.items() if all(x.isdigit() for x in inner)}


def _ties(held: Mapping[str, Tensor]) -> dict[str, str]:
    """Every further name of a tensor, and its first."""
    first: dict[int, str] = {}
    return {name: first[id(x)] for name, x in held.items() if first.setdefault(id(x), name) != name}


# -- the folder ------------------------------------------------------------------------------------------------


def _exports(source: Source) -> str:
    names = sorted([source.name, "load", *source.called.records])
    listed = ", ".join(f'"{name}"' for name in names)
    return f"from .model import {', '.join(names)}\n\n__all__ = [{listed}]\n"


def _save(emitted: Rewritten, folder: Path) -> int:
    """The tensors of a module, each once: those of its state dict, and the others."""
    persistent = emitted.state_dict(keep_vars=True)
    held = dict(emitted.named_parameters(remove_duplicate=False)) | dict(emitted.named_buffers(remove_duplicate=False))
    ties = _ties(held)
    kept, rest = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in held.items():
        if name not in ties:
            (kept if name in persistent else rest)[name] = tensor.detach().contiguous().clone()
    for file, tensors in ((WEIGHTS, kept), (CONSTANTS, rest)):
        if tensors or file == WEIGHTS:
            save_tensors(tensors, folder / file)
    return sum(x.nbytes for x in (*kept.values(), *rest.values()))


def _writable(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    target = Path(folder).absolute()
    if not target.name.isidentifier():
        raise UsageError(f"'{target.name}' is no name of a Python package", hint="letters, digits and underscores")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{folder} cannot be written")
    if target.exists():
        if not overwrite:
            raise UsageError(f"{folder} exists", hint="overwrite=True replaces it, or name another folder")
        if not (target / MODEL).is_file() or not (target / WEIGHTS).is_file():
            raise UsageError(f"{folder} was not written by to_python, it is not replaced", hint="name another folder")
    return target
