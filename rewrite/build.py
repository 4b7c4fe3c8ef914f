"""An exported program becomes a ``Program``: a flat graph over a table of weights, every call spelled one way.

    wrap_with_set_grad_enabled(False, f, x…)  =  f(detach(x)…)
    wrap_with_set_grad_enabled(True, f, x…)   =  f(x…)

The second line holds because a capture is made with gradients enabled. Other higher-order calls stay one node, with
their body in ``Program.regions``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._torch import checkpoint_of, set_grad_enabled_region, unlifted_module
from .checkpoints import settle
from .errors import CaptureError
from .interpret import writes
from .ops import form_of
from .program import CHECKPOINT, Program
from .signature import Signature
from .weights import Weights

aten = torch.ops.aten

_TRACED = ("custom", "seq_nr", "original_aten")
"""Metadata that only the tracer needs."""

# Checks that export writes into the graph: extra readers of what they check, and no part of the computation.
_CHECKS = frozenset({
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
})  # fmt: skip


def build(
    exported: torch.export.ExportedProgram,
    model: nn.Module,
    prefix: str,
    signature: Signature,
    example: Sequence[Any],
    inference: Sequence[bool] = (),
) -> Program:
    """The program of an export of ``model``, which stands under ``prefix`` in the exported module.

    ``example`` are the flat inputs; the exported graph has one placeholder for each, in this order. ``inference`` says
    which outputs are computed in inference mode, of which an export shows nothing.
    """
    module = unlifted_module(exported)
    strip = _stripper(prefix)
    return translate(module, _weights(exported, module, model, strip), strip, signature, example, inference)


def translate(
    module: fx.GraphModule,
    weights: Weights,
    strip: Callable[[str], str],
    signature: Signature,
    example: Sequence[Any],
    inference: Sequence[bool] = (),
) -> Program:
    """The program of a graph of ATen calls over ``weights``; ``strip`` makes the paths in it those of the user's model."""
    translation = _Translation(module, weights, strip)
    graph = fx.Graph()
    mapped: dict[fx.Node, Any] = {}
    names = iter(signature.leaf_names)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            mapped[node] = _placeholder(graph, next(names))
            mapped[node].meta = dict(node.meta)
        elif node.op == "output":
            outputs = fx.node.map_arg(tuple(node.args[0]), mapped.__getitem__)
            marks = inference or [False] * len(outputs)
            if len(marks) != len(outputs):
                raise CaptureError(
                    f"the forward of {signature.owner} returns {len(marks)} tensors, {len(outputs)} when it is captured: "
                    "what it returns, such as a sliding-window cache, holds other parts then",
                    hint="use_cache=False, or a config without sliding_window",
                )
            graph.output(tuple(translation.cut(graph, *pair) for pair in zip(outputs, marks, strict=True)))
        else:
            translation.copy(node, graph, mapped)
    program = Program(graph, weights, signature, tuple(example), name=signature.owner)
    program.regions = translation.regions
    for node in graph.nodes:
        spell(node)
    drop_dead(graph)
    settle(graph)
    return program


def _placeholder(graph: fx.Graph, leaf: str) -> fx.Node:
    """The input named after a leaf. Its target is its name, which the graph keeps apart from every other name: the
    emitted code takes the targets as arguments, and computes with the names."""
    name = re.sub(r"\W+", "_", leaf).strip("_")
    node = graph.create_node("placeholder", name, name="self_" if name == "self" else name)
    node.target = node.name
    return node


def drop_dead(graph: fx.Graph) -> bool:
    """Remove what nothing reads; a node that writes memory, and randomness that others follow, stays."""
    return graph.eliminate_dead_code(lambda node: node.is_impure() or bool(writes(node)))


# -- weights --------------------------------------------------------------------------------------------------


def _stripper(prefix: str) -> Callable[[str], str]:
    return lambda name: "" if name == prefix else name.removeprefix(prefix + ".")


def _weights(exported: torch.export.ExportedProgram, module: nn.Module, model: nn.Module, strip: Callable[[str], str]) -> Weights:
    """The user's own tensors under the user's names, and the constants that the capture lifted out of the code."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    transient = frozenset(buffers) - frozenset(model.state_dict(keep_vars=True))
    constants = {strip(name): value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in constants.items() if name not in buffers and name not in parameters}
    return Weights.of(parameters, buffers, constants, transient)


# -- nodes ----------------------------------------------------------------------------------------------------


class _Translation:
    """Copies nodes of an exported graph, inlining regions that only switch gradients."""

    def __init__(self, module: nn.Module, weights: Weights, strip: Callable[[str], str]) -> None:
        self.module = module
        self.weights = weights
        self.strip = strip
        self.regions: dict[str, fx.GraphModule] = {}

    def copy(self, node: fx.Node, graph: fx.Graph, mapped: dict[fx.Node, Any], prefix: str = "") -> None:
        if node.op == "call_function" and node.target in _CHECKS:
            return
        if node.target is set_grad_enabled_region and self._inline(node, graph, mapped, prefix):
            return
        if node.target is operator.getitem and isinstance(mapped[node.args[0]], tuple):  # type: ignore[index]
            mapped[node] = mapped[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        attribute = node.op == "get_attr"
        new = self._attribute(graph, prefix + str(node.target)) if attribute else graph.node_copy(node, mapped.__getitem__)
        new.meta = {**{key: value for key, value in node.meta.items() if key not in _TRACED}, **new.meta}
        if node.op == "call_function" and (part := checkpoint_of(node)) is not None:
            new.meta[CHECKPOINT] = part
        self._relocate(new)
        mapped[node] = new

    def _attribute(self, graph: fx.Graph, target: str) -> fx.Node:
        name = self.strip(target)
        new = graph.create_node("get_attr", name, name=name.replace(".", "_"))
        if name not in self.weights:
            region = self.module.get_submodule(target)
            assert isinstance(region, fx.GraphModule)
            self.regions[name] = region
            new.meta["region"] = region
        return new

    def _inline(self, node: fx.Node, graph: fx.Graph, mapped: dict[fx.Node, Any], prefix: str) -> bool:
        """Copy the body of a region in place of its call; False if gradients are switched again inside."""
        enabled, body_node, *inputs = node.args
        assert isinstance(body_node, fx.Node)
        target = prefix + str(body_node.target)
        body = self.module.get_submodule(target)
        assert isinstance(body, fx.GraphModule)
        if not enabled and any(inner.target is set_grad_enabled_region and inner.args[0] for inner in body.graph.nodes):
            return False
        inner_map: dict[fx.Node, Any] = {}
        outer = iter(inputs)
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                value = mapped[next(outer)]  # type: ignore[index]
                inner_map[inner] = value if enabled or not self._may_train(value) else self._detach(graph, value, node)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], inner_map.__getitem__)
                mapped[node] = tuple(result) if isinstance(result, (tuple, list)) else result
            else:
                self.copy(inner, graph, inner_map, target + ".")
        return True

    def _detach(self, graph: fx.Graph, value: fx.Node, origin: fx.Node) -> fx.Node:
        node = graph.call_function(aten.detach.default, (value,))
        node.meta = {key: origin.meta[key] for key in ("nn_module_stack", "stack_trace") if key in origin.meta}
        node.meta["val"] = value.meta["val"].detach()
        self._relocate(node)
        return node

    def cut(self, graph: fx.Graph, value: Any, inference: bool) -> Any:
        """An output that no gradient reaches is detached itself, so that no weight a rewrite puts in its way trains."""
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target is aten.detach.default:
            return value
        meta = value.meta.get("val")
        if not isinstance(meta, Tensor) or not (meta.is_floating_point() or meta.is_complex()):
            return value
        detaches = any(node.target is aten.detach.default for node in graph.nodes)
        return self._detach(graph, value, value) if inference or (detaches and not self._may_train(value)) else value

    def _may_train(self, value: Any) -> bool:
        """Whether a gradient could flow into ``value``: a buffer, a constant or an integer takes none."""
        seen: set[fx.Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if not isinstance(node, fx.Node) or node in seen or node.target is aten.detach.default:
                continue
            seen.add(node)
            meta = node.meta.get("val")
            if not isinstance(meta, (Tensor, tuple, list)):
                continue
            if isinstance(meta, Tensor) and not (meta.is_floating_point() or meta.is_complex()):
                continue
            if node.op == "placeholder" or (node.op == "get_attr" and self._is_parameter(node)):
                return True
            stack.extend(node.all_input_nodes)
        return False

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.target in self.weights and self.weights[str(node.target)].kind == "parameter"

    def _relocate(self, node: fx.Node) -> None:
        """Module paths as the user knows them: without the wrapper the model was exported in."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return
        entries = list(stack.items())
        if entries and entries[0][1][0] == "" and len(entries) > 1:
            entries = entries[1:]
        # Nodes that tracing added on its own carry a stack of one invented module.
        entries = [entry for entry in entries if not str(entry[1][0]).startswith("_empty_nn_module_stack")]
        node.meta["nn_module_stack"] = {key: (self.strip(path), kind) for key, (path, kind) in entries}


# -- one spelling of a call -----------------------------------------------------------------------------------


def spell(node: fx.Node) -> None:
    """Arguments that can stand by position do; those that change no value or repeat the schema's default are left out.

    layer_norm(x, [8], weight=w, bias=b, eps=1e-5, cudnn_enable=False)  =  layer_norm(x, [8], w, b)
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    positional = [a for a in node.target._schema.arguments if not a.kwarg_only]
    by_name = {a.name: a for a in node.target._schema.arguments}
    args, kwargs = list(node.args), dict(node.kwargs)
    last = max((i for i, a in enumerate(positional) if a.name in kwargs), default=-1)
    for argument in positional[len(args) : last + 1]:
        args.append(kwargs.pop(argument.name, argument.default_value))
    form = form_of(node.target)
    assert form is not None
    for position in form.ignored:
        args[position : position + 1] = [form.defaults[position]] if position < len(args) else []
        kwargs.pop(form.names[position], None)
    required = sum(not a.has_default_value() for a in positional)
    while len(args) > required and _is_default(args[-1], positional[len(args) - 1]):
        args.pop()
    kwargs = {name: value for name, value in kwargs.items() if not _is_default(value, by_name[name])}
    if tuple(args) != node.args:
        node.args = tuple(args)
    if kwargs != node.kwargs:
        node.kwargs = kwargs


def _is_default(value: Any, argument: Any) -> bool:
    default = argument.default_value
    return argument.has_default_value() and type(value) is type(default) and bool(value == default)
