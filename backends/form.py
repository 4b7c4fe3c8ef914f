"""The form that a model was rewritten to in place, as a file beside its weights: which modules have which code.

    model.save_pretrained("out"); save_form(model, "out")                 the user's own saver keeps the weights
    model = Its.from_pretrained("out"); load_form(model, "out")           and gives them back; the code follows

Without ``load_form`` the loaded model computes the same answers by its classes' own code. Reading runs nothing but
``torch.ops``.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tautomer.rewrite.errors import UsageError

from .exchange import exchange, exchanged, form_of
from .files import staged
from .guard import edits_of, guard
from .hugging_face import NAME, implementations, restore_attention, set_attention

FORM = "tautomer.json"
_FORMAT = 1


def save_form(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the form of a model that ``tautomer.optimize_`` rewrote to ``folder/tautomer.json``; returns the file.

    Raises:
        UsageError: no module of it was rewritten, or the folder cannot be written.

    Example: ``model.save_pretrained("out"); save_form(model, "out")``
    """
    modules = []
    for path, module in model.named_modules():
        if (form := form_of(module)) is None:
            continue
        base, code, mode = form
        data = None if code is None else json.loads(code)
        frozen = _frozen(module, data) if isinstance(data, list) else []
        modules.append({"path": path, "class": _name(base), "mode": mode, "frozen": frozen, "code": data})
    edits, attention = edits_of(model), NAME in {name for _, name in implementations(model)}
    if not modules and not edits and not attention:
        raise UsageError(f"no module of this {type(model).__name__} was rewritten", hint="tautomer.optimize_ it first")
    made = {"tautomer": version("tautomer"), "torch": torch.__version__}
    lines = ",\n".join(map(json.dumps, modules))
    head = f'"format": {_FORMAT}, "made by": {json.dumps(made)}, "edits": {json.dumps(edits)}'
    head += f', "attention": {json.dumps(attention)}'
    with staged(Path(folder), folder) as beside:
        (beside / FORM).write_text(f'{{{head}, "modules": [\n{lines}\n]}}\n')
    return Path(folder) / FORM


def _frozen(module: nn.Module, code: list[Any]) -> list[str]:
    """The parameters that the code of a leaf reads no more and that do not train."""
    read = {node["target"] for node in code if node["op"] == "get_attr"}
    own = module.named_parameters(recurse=False)
    return [name for name, parameter in own if name not in read and not parameter.requires_grad]


def load_form(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give ``model``, which has the weights of a rewritten one, the code of the rewritten one.

    Raises:
        UsageError: there is no such file, it is for other classes, or it calls an operator that is not here; the model is
            what it was.

    Example: ``model = GPT2LMHeadModel.from_pretrained("out"); load_form(model, "out")``
    """
    wanted: list[tuple[nn.Module, dict[str, Any], str | None]] = []
    base: Any
    modules, edits, attention = _read(Path(folder) / FORM)
    for path in (name.rpartition(".")[0] for name in edits):
        _module(model, path)
    for entry in modules:
        module = _module(model, entry["path"])
        base, _, _ = form_of(module) or (type(module), None, None)
        if _name(base) != entry["class"]:
            raise UsageError(f"'{entry['path']}' is a {_name(base)}; the saved form is for a {entry['class']}")
        code = None if entry["code"] is None else json.dumps(entry["code"])
        exchanged(base, code, entry["mode"])  # what cannot be read is said before anything changes
        wanted.append((module, entry, code))
    with ExitStack() as undo:
        undo.callback(restore_attention, implementations(model))
        if attention:
            set_attention(model)
        for module, entry, code in wanted:
            exchange(module, code, entry["mode"], undo)
            for parameter in map(module.get_parameter, entry["frozen"]):
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
        guard(model, edits, undo)
        undo.pop_all()


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UsageError(f"{type(model).__name__} has no module '{path}', which the saved form speaks of") from None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _read(file: Path) -> tuple[list[dict[str, Any]], dict[str, str], bool]:
    try:
        data = json.loads(file.read_text())
        if data["format"] != _FORMAT:
            raise UsageError(f"{file} has format {data['format']}; this tautomer reads format {_FORMAT}")
        return list(data["modules"]), dict(data["edits"]), bool(data["attention"])
    except FileNotFoundError:
        raise UsageError(f"there is no {file}", hint="tautomer.save_form(model, folder) writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} was not written by tautomer.save_form: {error}") from error
