"""An fx graph as plain data, and back: what is saved is read by people and by JSON, and runs nothing when it is read.

    add = aten.add.Tensor(x, 1)   ->   {"name": "add", "op": "call_function", "target": "aten.add.Tensor",
                                        "args": [{"node": "x"}, 1]}

A call may name an operator of ``torch.ops``, one of a short list of Python functions over sizes, or the one that checkpoints,
nothing else.
Metadata is not kept.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from tautomer.rewrite import checkpoints
from tautomer.rewrite.errors import UsageError

_MODULES: dict[str, Any] = {
    "operator": operator, "math": math, "torch": torch, "builtins": builtins, checkpoints.__name__: checkpoints
}  # fmt: skip
_BUILTINS = ("abs", "bool", "float", "int", "len", "max", "min", "pow", "round")
_TORCH = (torch.dtype, torch.layout, torch.memory_format)


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of ``graph`` in order, as data.

    Raises:
        UsageError: an argument or a target has no form as data.
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": encode_target(node.target),
            "args": [encode(a) for a in node.args],
            "kwargs": {k: encode(v) for k, v in node.kwargs.items()},
        }
        for node in graph.nodes
    ]


def decode_graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    """The graph that ``encode_graph`` wrote.

    Raises:
        UsageError: an operator is unknown here.
    """
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for entry in nodes:
        args = tuple(decode(a, known) for a in entry["args"])
        kwargs = {k: decode(v, known) for k, v in entry["kwargs"].items()}
        target = decode_target(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        known[entry["name"]] = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
    return graph


def encode_target(target: Callable[..., Any] | str) -> str:
    """``aten.add.Tensor`` for an operator, ``operator:getitem`` for a Python function, a name as it is."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target}"
    module, name = target.__module__.removeprefix("_"), target.__name__
    if _function(module, name) is not target:
        raise UsageError(f"the graph calls {module}.{name}, which cannot be saved", hint="register it with torch.library")
    return f"{module}:{name}"


def decode_target(text: str) -> Callable[..., Any]:
    """The function that ``encode_target`` named.

    Example:
        >>> decode_target("aten.add.Tensor") is torch.ops.aten.add.Tensor
        True
    """
    module, colon, name = text.partition(":")
    if colon:
        found = _function(module, name)
    else:
        found = torch.ops
        for part in text.split("."):
            found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"the saved graph calls '{text}', unknown here", hint="import the package that registers it")
    return found  # type: ignore[no-any-return]


def _function(module: str, name: str) -> Any:
    """A Python function, if the name is one that a graph may call."""
    allowed = module in ("operator", "math") or (module == "torch" and name.startswith("sym_"))
    allowed |= module == "builtins" and name in _BUILTINS
    allowed |= module == checkpoints.__name__ and name == checkpoints.checkpointed.__name__
    return getattr(_MODULES[module], name, None) if allowed and not name.startswith("_") else None


def encode(x: Any) -> Any:
    """An argument as data; what JSON has no form for is a dictionary of one entry that says what it is."""
    if x is None or isinstance(x, (bool, str)) or (isinstance(x, (int, float)) and math.isfinite(x)):
        return x
    if isinstance(x, fx.Node):
        return {"node": x.name}
    if isinstance(x, float):
        return {"float": str(x)}
    if isinstance(x, complex):
        return {"complex": [encode(x.real), encode(x.imag)]}
    if isinstance(x, tuple):
        return {"tuple": [encode(y) for y in x]}
    if isinstance(x, list):
        return [encode(y) for y in x]
    if isinstance(x, slice):
        return {"slice": [encode(x.start), encode(x.stop), encode(x.step)]}
    if isinstance(x, Mapping):
        return {"dict": [[encode(k), encode(v)] for k, v in x.items()]}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, _TORCH):
        return {"torch": str(x).removeprefix("torch.")}
    if x is Ellipsis:
        return {"ellipsis": True}
    raise UsageError(f"a value of type {type(x).__name__} cannot be saved: {x!r}")


def decode(x: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The argument that ``encode`` wrote, over the nodes read so far."""
    if isinstance(x, list):
        return [decode(y, nodes) for y in x]
    if not isinstance(x, dict):
        return x
    ((kind, value),) = x.items()
    inner = decode(value, nodes) if isinstance(value, list) else value
    match kind:
        case "node":
            return nodes[value]
        case "float":
            return float(value)
        case "complex":
            return complex(*inner)
        case "tuple":
            return tuple(inner)
        case "slice":
            return slice(*inner)
        case "dict":
            return dict(inner)
        case "device":
            return torch.device(value)
        case "torch" if isinstance(found := getattr(torch, value, None), _TORCH):
            return found
        case "ellipsis":
            return ...
    raise UsageError(f"the saved graph holds a value of unknown kind '{kind}'")
