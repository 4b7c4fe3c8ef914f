"""Capture a model as a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._torch import pytree, unlifted_module
from .program import Program
from .signature import Signature
from .weights import Weights


def capture(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    kwargs = dict(kwargs or {})
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), kwargs))
    dim = torch.export.Dim.AUTO
    shapes = pytree.tree_map(
        lambda x: {i: dim for i in range(x.dim() if not x.is_floating_point() else 1)} if isinstance(x, Tensor) else None,
        (args, kwargs),
    )
    import inspect
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    exported = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes={**dict(zip(bound.arguments, shapes[0])), **shapes[1]})
    module = unlifted_module(exported)
    weights = Weights.of(dict(module.named_parameters(remove_duplicate=False)), dict(module.named_buffers(remove_duplicate=False)), {})
    graph = fx.Graph()
    mapped: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(tuple(mapped[n] for n in node.args[0]))
            continue
        if node.op == "call_function" and "_assert_tensor_metadata" in str(node.target):
            continue
        mapped[node] = graph.node_copy(node, mapped.__getitem__)
        mapped[node].meta = dict(node.meta)
    graph.eliminate_dead_code()
    flat, _ = pytree.tree_flatten((args, kwargs))
    signature = Signature.of(model.forward, type(model).__name__, args, kwargs, exported.call_spec.out_spec)
    return Program(graph, weights, signature, tuple(flat), "eval", name=type(model).__name__)
