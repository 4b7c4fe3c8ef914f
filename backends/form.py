"""The form that a model was rewritten to in place, as a file beside its weights: which modules have which code.

    model.save_pretrained("out"); save_form(model, "out")                 the user's own saver keeps the weights
    model = Its.from_pretrained("out"); load_form(model, "out")           and gives them back; the code follows

Weights that a module holds over its class (two factors in the place of a matrix) are read from the safetensors files of the
folder; ``save_form`` writes those that no other file there has.

Without ``load_form`` the loaded model computes the same answers by its own code, if no module holds such weights. Reading
runs nothing but ``torch.ops``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tautomer.rewrite.errors import UsageError

from .exchange import exchange, exchanged, form_of
from .factored import exchange_weights, exchanged_weights
from .files import save_tensors, staged
from .guard import edits_of, guard
from .hugging_face import NAME, implementations, restore_attention, set_attention

FORM = "tautomer.json"
_OWN = "tautomer.safetensors"
_FORMAT = 2


def save_form(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the form of a model that ``tautomer.optimize_`` rewrote to ``folder/tautomer.json``; returns the file.

    Raises:
        UsageError: no module of it was rewritten, the folder cannot be written, or has another model's weights: save those first.

    Example: ``model.save_pretrained("out"); save_form(model, "out")``
    """
    modules, tensors = [], dict[str, Tensor]()
    for path, module in model.named_modules():
        if (form := form_of(module)) is None:
            continue
        base, code, mode = form
        data = None if code is None else json.loads(code)
        frozen = _frozen(module, data) if isinstance(data, list) else []
        own = exchanged_weights(module)
        added = {name: module.get_parameter(name) for name in own.added}
        tensors |= {f"{path}.{name}" if path else name: x.detach() for name, x in added.items()}
        held = {"added": {name: x.requires_grad for name, x in added.items()}, "dropped": list(own.dropped)}
        modules.append({"path": path, "class": _name(base), "mode": mode, "frozen": frozen, **held, "code": data})
    edits, attention = edits_of(model), NAME in {name for _, name in implementations(model)}
    if not modules and not edits and not attention:
        raise UsageError(f"no module of this {type(model).__name__} was rewritten", hint="tautomer.optimize_ it first")
    made = {"tautomer": version("tautomer"), "torch": torch.__version__}
    lines = ",\n".join(map(json.dumps, modules))
    head = f'"format": {_FORMAT}, "made by": {json.dumps(made)}, "edits": {json.dumps(edits)}'
    head += f', "attention": {json.dumps(attention)}'
    with staged(Path(folder), folder) as beside:
        missing = _missing(Path(folder), tensors)
        if missing:
            save_tensors(missing, beside / _OWN)
        (beside / FORM).write_text(f'{{{head}, "modules": [\n{lines}\n]}}\n')
    if not missing:  # only now: until here, what was saved before can be loaded
        (Path(folder) / _OWN).unlink(missing_ok=True)
    return Path(folder) / FORM


def _missing(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``tensors`` that no file of the folder has but the one that ``save_form`` writes."""
    there = _stored(folder, tensors, own=False)
    other = next((name for name, x in there.items() if not _same(x, tensors[name].cpu())), None)
    if other is not None:
        raise UsageError(f"{folder} has another '{other}'", hint="save the weights there first: model.save_pretrained(folder)")
    return {name: x.cpu().contiguous() for name, x in tensors.items() if name not in there}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _stored(folder: Path, wanted: Collection[str], own: bool = True) -> dict[str, Tensor]:
    """Those of the wanted tensors that safetensors files of the folder have; what ``save_form`` wrote counts last."""
    found = dict[str, Tensor]()
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.name == _OWN) if wanted else []
    for file in files:
        if file.name == _OWN and not own:
            continue
        try:
            with safe_open(file, "pt") as data:  # type: ignore[no-untyped-call]
                here = set(wanted).intersection(data.keys()) - set(found)
                found |= {name: data.get_tensor(name) for name in here}
        except SafetensorError as error:
            raise UsageError(f"{file} is damaged: {error}") from error
    return found


def _frozen(module: nn.Module, code: list[Any]) -> list[str]:
    """The parameters that the code of a leaf reads no more and that do not train."""
    read = {node["target"] for node in code if node["op"] == "get_attr"}
    own = module.named_parameters(recurse=False)
    return [name for name, parameter in own if name not in read and not parameter.requires_grad]


def load_form(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give ``model``, which has the weights of a rewritten one, the code of the rewritten one.

    Raises:
        UsageError: there is no such file, it is for other classes, calls an operator that is not here, or the folder lacks a
            weight that the form needs; the model is what it was.

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
    names = {_path(entry, name) for _, entry, _ in wanted for name in entry.get("added", ())}
    tensors = _stored(Path(folder), names)
    if missing := sorted(names - set(tensors)):
        raise UsageError(
            f"{folder} has no '{missing[0]}'", hint="save the weights there: model.save_pretrained(folder), then save_form"
        )
    with ExitStack() as undo:
        undo.callback(restore_attention, implementations(model))
        if attention:
            set_attention(model)
        for module, entry, code in wanted:
            exchange(module, code, entry["mode"], undo)
            _take(module, entry, tensors, undo)
            for parameter in map(module.get_parameter, entry["frozen"]):
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
        guard(model, edits, undo)
        undo.pop_all()


def _path(entry: Mapping[str, Any], name: str) -> str:
    """The name in the model of a weight that a saved module has."""
    return f"{entry['path']}.{name}" if entry["path"] else name


def _take(module: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], undo: ExitStack) -> None:
    """Let a module hold the weights that its saved form has over its class, of the dtype and on the device of the others."""
    if not entry.get("added"):
        return
    like = next(module.parameters(recurse=False))
    made = {
        name: nn.Parameter(tensors[_path(entry, name)].to(like.device, like.dtype), trains)
        for name, trains in entry["added"].items()
    }
    undo.callback(exchange_weights(module, made, [name for name in entry["dropped"] if name in module._parameters]))


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
        if data["format"] not in (1, _FORMAT):
            raise UsageError(f"{file} has format {data['format']}; this tautomer reads format {_FORMAT}")
        return list(data["modules"]), dict(data["edits"]), bool(data["attention"])
    except FileNotFoundError:
        raise UsageError(f"there is no {file}", hint="tautomer.save_form(model, folder) writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} was not written by tautomer.save_form: {error}") from error
