"""Which calls of a graph are a layer of torch.nn with its own weights: ``self.proj(x)`` and ``nn.Linear(8, 32)``.

    linear(x, P.weight, P.bias)  =  P(x)    with P = nn.Linear(in, out)

if P has no other weights, and every call at P is the same layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tautomer.rewrite.program import Program, arguments, path_of, target_name

from .ops import collapsed
from .pieces import Code, Number, Option, call, literal, plain

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A layer of torch.nn.

    Attributes:
        path: the module that it is.
        made: how it is made, ``nn.Linear(8, 32, bias=False)``.
        operand: the value it is called with.
        silent: calls that belong to it and are not written: a counter of batches.
    """

    path: str
    made: Code
    operand: fx.Node
    silent: tuple[fx.Node, ...] = field(default=(), compare=False)


def layers(program: Program, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Layer]:
    """The calls that are layers, by node."""
    return _Search(program, tensors).found()


class _Search:
    def __init__(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        self.program, self.tensors = program, tensors
        self.below: dict[str, set[str]] = {}
        for name in tensors:
            path, _, last = name.rpartition(".")
            self.below.setdefault(path, set()).add(last)
            while path:
                path, _, inner = path.rpartition(".")
                self.below.setdefault(path, set()).add(inner)

    def found(self) -> dict[fx.Node, Layer]:
        layers = dict(self._candidates())
        made: dict[str, set[Code]] = {}
        home = {layer.path for node, layer in layers.items() if path_of(node) == layer.path}
        layers = {node: layer for node, layer in layers.items() if path_of(node) == layer.path or layer.path not in home}
        for layer in layers.values():
            made.setdefault(layer.path, set()).add(layer.made)
        return {node: layer for node, layer in layers.items() if len(made[layer.path]) == 1}

    def _candidates(self) -> Iterator[tuple[fx.Node, Layer]]:
        for node in self.program.graph.nodes:
            maker = _MAKERS.get(node.target) if node.op == "call_function" else None
            layer = maker(self, node, arguments(node)) if maker else None
            if layer is not None and layer.path:
                yield node, layer

    def home(self, node: fx.Node, **operands: Any) -> str | None:
        """The path whose weights are exactly these operands, each under its name; None if there is no such path."""
        given = {name: x for name, x in operands.items() if x is not None}
        if not all(isinstance(x, fx.Node) and x.op == "get_attr" and x.target in self.tensors for x in given.values()):
            return None
        for alias in sorted(self.names(given["weight"]), key=lambda name: (name.rpartition(".")[0] != path_of(node), name)):
            path, _, last = alias.rpartition(".")
            here = all(f"{path}.{name}" in self.names(x) for name, x in given.items())
            if last == "weight" and path and here and self.below[path] == set(given):
                return path
        return None

    def names(self, x: fx.Node) -> list[str]:
        return tied(self.tensors, str(x.target))

    def shape(self, x: fx.Node) -> list[int]:
        return list(self.tensors[str(x.target)].shape)

    def make(self, name: str, weight: str | None, *args: tuple[str, Any], **options: Any) -> Code:
        """``nn.name(…)``; an option that is None is left out."""
        shown = [literal(value, role) for role, value in args]
        named = {role: literal(value, role) for role, value in options.items() if value is not None}
        dtype = self.tensors[weight].dtype if weight is not None else torch.float32
        if dtype != torch.float32:
            named["dtype"] = plain(str(dtype))
        return call(f"nn.{name}", *shown, **named)


def tied(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """All names of one tensor of a module."""
    return [other for other, tensor in tensors.items() if tensor is tensors[name]]


def _linear(search: _Search, node: fx.Node, given: Mapping[str, Any]) -> Layer | None:
    path = search.home(node, weight=given["weight"], bias=given["bias"])
    if path is None or len(shape := search.shape(given["weight"])) != 2:
        return None
    sizes = ("in_features", shape[1]), ("out_features", shape[0])
    bias = False if given["bias"] is None else None
    return Layer(path, search.make("Linear", f"{path}.weight", *sizes, bias=bias), given["input"])


def _embedding(search: _Search, node: fx.Node, given: Mapping[str, Any]) -> Layer | None:
    path = search.home(node, weight=given["weight"])
    if path is None or given["scale_grad_by_freq"] or given["sparse"]:
        return None
    count, width = search.shape(given["weight"])
    padding = None if given["padding_idx"] == -1 else given["padding_idx"]
    sizes = ("count", count), ("width", width)
    return Layer(path, search.make("Embedding", f"{path}.weight", *sizes, padding_idx=padding), given["indices"])


def _norm(kind: str, default: float | None) -> Any:
    def maker(search: _Search, node: fx.Node, given: Mapping[str, Any]) -> Layer | None:
        path = None if given["weight"] is None else search.home(node, weight=given["weight"], bias=given.get("bias"))
        if path is None or search.shape(given["weight"]) != given["normalized_shape"]:
            return None
        shape = tuple(given["normalized_shape"])
        bias = False if kind == "LayerNorm" and given["bias"] is None else None
        size = ("width", shape[0] if len(shape) == 1 else shape)
        if default is None or len(shape) > 1:
            eps = None if given["eps"] == default else given["eps"]
            return Layer(path, search.make(kind, f"{path}.weight", size, eps=eps, bias=bias), given["input"])
        made = search.make(kind, f"{path}.weight", size, bias=bias)
        return Layer(path, _with(made, [_option("eps", given["eps"], default)], 2), given["input"])

    return maker


def _group_norm(search: _Search, node: fx.Node, given: Mapping[str, Any]) -> Layer | None:
    if given["weight"] is None or (path := search.home(node, weight=given["weight"], bias=given["bias"])) is None:
        return None
    if given["bias"] is None:
        return None
    sizes = ("groups", given["num_groups"]), ("channels", search.shape(given["weight"])[0])
    made = search.make("GroupNorm", f"{path}.weight", *sizes)
    return Layer(path, _with(made, [_option("eps", given["eps"], 1e-5)], 4), given["input"])


def _conv(kind: str, transposed: bool = False) -> Any:
    def maker(search: _Search, node: fx.Node, given: Mapping[str, Any]) -> Layer | None:
        path = search.home(node, weight=given["weight"], bias=given["bias"])
        if path is None:
            return None
        first, second, *kernel = search.shape(given["weight"])
        groups = given["groups"]
        inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
        sizes = ("in_channels", inputs), ("out_channels", outputs), ("kernel", collapsed(kernel))
        options = {}
        for option, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1), ("groups", 1)):
            value = collapsed(given.get(option, default))
            if not _static(value):
                return None
            options[option] = (value, default)
        bias = False if given["bias"] is None else None
        made = search.make(
            kind, f"{path}.weight", *sizes, **{n: v for n, (v, _) in options.items() if isinstance(v, (str, tuple))}, bias=bias
        )
        plain_ones = [_option(n, v, d) for n, (v, d) in options.items() if isinstance(v, int)]
        return Layer(path, _with(made, plain_ones, 2 * len(sizes)), given["input"])

    return maker


def _option(name: str, value: int | float, default: int | float) -> Option:
    return Option(name, Number(value, name), default)


def _with(made: Code, options: list[Option], position: int) -> Code:
    """``made`` with options after its sizes."""
    parts = [*made.parts[:position], *options, *made.parts[position:]]
    return Code(tuple(parts), made.level, made.cost)


def _static(value: Any) -> bool:
    return isinstance(value, (int, str)) or all(isinstance(x, int) for x in value)


def _batch_norm(search: _Search, node: fx.Node, given: Mapping[str, Any]) -> Layer | None:
    affine = {name: given[name] for name in ("weight", "bias")}
    statistics = {name: given[name] for name in ("running_mean", "running_var")}
    value = given["input"].meta.get("val")
    if any(x is None for x in (*affine.values(), *statistics.values(), value)) or value.dim() not in (2, 3, 4, 5):
        return None
    mean = str(statistics["running_mean"].target) if statistics["running_mean"].op == "get_attr" else ""
    counter = f"{mean.rpartition('.')[0]}.num_batches_tracked"
    adds = [
        reader
        for read in search.program.graph.find_nodes(op="get_attr")
        if read.target == counter
        for reader in read.users
        if reader.target is aten.add_.Tensor and not reader.users
    ]
    flag = given["training"]
    moved = [add for add in adds if add.args[1] is flag or (flag is True and add.args[1] == 1)]
    calls = [
        n
        for n in search.program.graph.nodes
        if n.target is node.target and arguments(n)["running_mean"] is statistics["running_mean"]
    ]
    if counter not in search.tensors or moved != adds or (flag is not False and len(moved) != len(calls)):
        return None
    path = mean.rpartition(".")[0]
    own = isinstance(flag, fx.Node) and flag.op == "get_attr" and flag.target == f"{path}.training"
    reads = {name: x.op == "get_attr" and f"{path}.{name}" in search.names(x) for name, x in (affine | statistics).items()}
    whole = {*reads, "num_batches_tracked"} == search.below.get(path)
    if not path or not all(reads.values()) or not whole or not (own or isinstance(flag, bool)):
        return None
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[value.dim()]
    options = [_option("eps", given["eps"], 1e-5), _option("momentum", given["momentum"], 0.1)]
    size = ("channels", search.shape(affine["weight"])[0])
    silent = tuple(moved[calls.index(node) : calls.index(node) + 1]) if moved else ()
    return Layer(path, _with(search.make(kind, f"{path}.weight", size), options, 2), given["input"], silent)


def _dropout(search: _Search, node: fx.Node, given: Mapping[str, Any]) -> Layer | None:
    flag = given["train"]
    if not isinstance(flag, fx.Node) or flag.op != "get_attr":
        return None
    path = str(flag.target).removesuffix(".training")
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = str(stack[-1][1]) if stack and stack[-1][0] == path else ""
    if path in search.below or not module.startswith("torch.nn.modules.dropout.Dropout"):
        return None
    return Layer(path, search.make("Dropout", None, ("dropout", given["p"])), given["input"])


_MAKERS: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _norm("LayerNorm", 1e-5),
    aten.rms_norm.default: _norm("RMSNorm", None),
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
    aten.dropout.default: _dropout,
    aten.conv1d.default: _conv("Conv1d"),
    aten.conv2d.default: _conv("Conv2d"),
    aten.conv3d.default: _conv("Conv3d"),
    aten.conv1d.padding: _conv("Conv1d"),
    aten.conv2d.padding: _conv("Conv2d"),
    aten.conv3d.padding: _conv("Conv3d"),
    aten.conv_transpose1d.default: _conv("ConvTranspose1d", True),
    aten.conv_transpose2d.input: _conv("ConvTranspose2d", True),
    aten.conv_transpose3d.input: _conv("ConvTranspose3d", True),
}


def activation(node: fx.Node) -> Code | None:
    """A layer without weights as torch.nn makes it, for its place in an ``nn.Sequential``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = str(stack[-1][1]).rpartition(".")[2] if stack and str(stack[-1][1]).startswith("torch.nn.modules") else ""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    given = arguments(node)
    match name:
        case "ReLU" | "SiLU" | "Sigmoid" | "Tanh" | "Hardswish" | "Hardsigmoid" | "Mish" if (
            target_name(node) == f"aten.{name.lower()}"
        ):
            return plain(f"nn.{name}()")
        case "ReLU6" if target_name(node) == "aten.hardtanh" and (given["min_val"], given["max_val"]) == (0, 6):
            return plain("nn.ReLU6()")
        case "GELU" if node.target is aten.gelu.default:
            options = {} if given["approximate"] == "none" else {"approximate": literal(given["approximate"], "approximate")}
            return call("nn.GELU", **options)
        case "Flatten" if node.target is aten.flatten.using_ints:
            ends = [] if (given["start_dim"], given["end_dim"]) == (1, -1) else [given["start_dim"], given["end_dim"]]
            return call("nn.Flatten", *(literal(x, "axis") for x in ends))
        case "AdaptiveAvgPool2d" if node.target is aten.adaptive_avg_pool2d.default:
            return call("nn.AdaptiveAvgPool2d", literal(collapsed(given["output_size"]), "size"))
        case "MaxPool2d" if node.target is aten.max_pool2d.default:
            shown = {"kernel_size": collapsed(given["kernel_size"]), "stride": collapsed(given["stride"])}
            extra = {name: collapsed(given[name]) for name in ("padding", "dilation", "ceil_mode")}
            plainest = extra == {"padding": 0, "dilation": 1, "ceil_mode": False}
            if not plainest and (extra["dilation"] != 1 or extra["ceil_mode"]):
                return None
            stride = [] if shown["stride"] in ((), shown["kernel_size"]) else [literal(shown["stride"], "stride")]
            padding = {} if extra["padding"] == 0 else {"padding": literal(extra["padding"], "padding")}
            return call("nn.MaxPool2d", literal(shown["kernel_size"], "kernel"), *stride, **padding)
    return None
