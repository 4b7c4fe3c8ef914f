"""Save an emitted module as a folder, and load it: weights as safetensors, the graph and the call as JSON. No pickle.

    module.json            the call, the mode, the table of weights
    graph.json             one entry per node
    weights.safetensors    every tensor once

Reading runs nothing but ``torch.ops`` and functions over sizes; the classes that the model takes and returns are imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Hashable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from tautomer.rewrite._torch import storage_key
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.expected import Expected

from .files import save_tensors, staged
from .graph_data import decode_graph, encode_graph
from .rewritten import Body, Rewritten
from .signature_data import decode_signature, encode_signature
from .to_torch import Stored, furnish

_FORMAT = 1
_MODULE, _GRAPH, _WEIGHTS = "module.json", "graph.json", "weights.safetensors"


def save(module: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a module that ``tautomer.optimize`` or ``load`` returned to ``folder``; returns the folder.

    Two names of one parameter stay one. What the module is made of is read back bit for bit; its report is not kept.

    Raises:
        UsageError: it is no such module, it holds what has no form as data, or the folder cannot be written.

    Example: ``save(fast, "fast"); again = load("fast")``
    """
    if not isinstance(module, Rewritten):
        made = type(module).__name__
        raise UsageError(f"only a module that tautomer made can be saved, not a {made}", hint="tautomer.optimize it first")
    table, tensors = _tabulate(module)
    bodies = {name: child for name, child in module.named_modules() if isinstance(child, Body)}
    about = {
        "format": _FORMAT,
        "made by": {"tautomer": version("tautomer"), "torch": torch.__version__},
        "signature": encode_signature(module._signature),
        "inputs": [None if x is None else dataclasses.asdict(x) for x in module._inputs],
        "mode": module._mode,
        "training": {name: x.training for name, x in module.named_modules()},
        "weights": table,
        "edits": module._edits,
    }
    graphs = {"": encode_graph(module.graph), **{name: encode_graph(body.graph) for name, body in bodies.items()}}
    with staged(Path(folder), folder) as beside:
        save_tensors(tensors, beside / _WEIGHTS)
        (beside / _GRAPH).write_text(_lines(graphs))
        (beside / _MODULE).write_text(json.dumps(about, indent=1))
    return Path(folder)


def load(folder: str | os.PathLike[str]) -> Rewritten:
    """The module that ``save`` wrote: the same call, the same bits, the same modes.

    Raises:
        UsageError: the folder is not one of ours, or needs an operator, a class or a device that is not here.

    Example: ``load("fast")(input_ids)``
    """
    source = Path(folder)
    about, graphs = _read(source / _MODULE), _read(source / _GRAPH)
    if about.get("format") != _FORMAT:
        raise UsageError(f"{folder} has format {about.get('format')}; this tautomer reads format {_FORMAT}")
    signature = decode_signature(about["signature"])
    inputs = [None if x is None else Expected(**{**x, "shape": tuple(x["shape"])}) for x in about["inputs"]]
    root, bodies = graphs.pop(""), {name: decode_graph(nodes) for name, nodes in graphs.items()}
    module = Rewritten(decode_graph(root), signature, inputs, about["mode"])
    furnish(module, _rebuilt(source / _WEIGHTS, about["weights"]), _bodies(bodies), about["training"])
    module._edits = dict(about.get("edits", {}))
    return module


# -- weights --------------------------------------------------------------------------------------------------


def _tabulate(module: Rewritten) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """What every name of the module is, and every tensor once under its first name."""
    kept = module.state_dict(keep_vars=True)
    first: dict[Hashable, str] = {}
    table: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        stored = first.setdefault(_view(tensor) if tensor.numel() else name, name)
        entry: dict[str, Any] = {"tensor": stored, "device": str(tensor.device)}
        if isinstance(tensor, nn.Parameter):
            entry["requires_grad"] = tensor.requires_grad
        else:
            entry["persistent"] = name in kept
        if not tensor.is_contiguous():
            entry["strides"] = list(tensor.stride())
        table[name] = entry
        if stored == name:
            tensors[name] = tensor.detach().contiguous()
    _refuse_overlaps({name: tensor for name, tensor in named if table[name]["tensor"] == name})
    return table, {name: x.clone() if x.untyped_storage().nbytes() != x.nbytes else x for name, x in tensors.items()}


def _rebuilt(file: Path, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    """The tensors of a saved module by name; one object for all names of one tensor."""
    try:
        tensors = load_file(file)
        made: dict[str, Tensor] = {}
        for name, entry in table.items():
            if entry["tensor"] == name:
                made[name] = _remade(tensors[name], entry)
    except (OSError, KeyError, SafetensorError) as error:
        raise UsageError(f"{file} does not hold the weights that {_MODULE} lists: {error}") from error
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the weights cannot be put on the device they were on: {error}") from error
    return {name: Stored(made[entry["tensor"]], entry.get("persistent", True)) for name, entry in table.items()}


def _remade(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    if "strides" in entry:
        tensor = torch.empty_strided(tensor.shape, entry["strides"], dtype=tensor.dtype).copy_(tensor)
    tensor = tensor.to(entry["device"])
    return nn.Parameter(tensor, requires_grad=entry["requires_grad"]) if "requires_grad" in entry else tensor


def _view(tensor: Tensor) -> Hashable:
    return storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _refuse_overlaps(tensors: Mapping[str, Tensor]) -> None:
    """Two different views of the same elements would come back as two tensors."""
    ends: dict[int, tuple[int, str]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].storage_offset()):
        start, size = int(tensor.storage_offset()) * tensor.element_size(), tensor.element_size()
        if not tensor.numel():
            continue
        end = start + size * (1 + sum((int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
        before, other = ends.get(storage_key(tensor), (0, ""))
        if start < before:
            raise UsageError(f"'{name}' and '{other}' are two views of the same elements; a folder cannot hold such a tie")
        ends[storage_key(tensor)] = max((end, name), (before, other))


# -- files ----------------------------------------------------------------------------------------------------


def _bodies(graphs: Mapping[str, fx.Graph]) -> dict[str, fx.GraphModule]:
    """The bodies of higher-order ops, each with the bodies inside it."""
    made: dict[str, fx.GraphModule] = {}
    for name in sorted(graphs, key=len, reverse=True):
        inner = {other.removeprefix(f"{name}."): made.pop(other) for other in list(made) if other.startswith(f"{name}.")}
        made[name] = Body(inner, graphs[name])
    return made


def _lines(graphs: Mapping[str, list[Any]]) -> str:
    """The graphs as JSON with one node per line; the root's name is ""."""
    parts = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, nodes)) + "\n]" for name, nodes in graphs.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"{file.parent} was not written by tautomer.save: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{file} was not written by tautomer.save")
    return data
