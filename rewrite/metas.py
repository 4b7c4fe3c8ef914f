"""The metadata of a call is what the call gives on the metadata of its operands.

Nothing here may narrow the sizes the program is valid for: a call whose shape rule would have to know a symbolic size
gives None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import FakeTensorMode, no_new_guards
from .shapes import tensor_key


def meta_of(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mode: FakeTensorMode | None) -> Any:
    """The fake result of ``target(*args, **kwargs)`` over nodes, or None if it cannot be told without new guards."""
    if mode is None:
        return None
    read = lambda node: node.meta.get("val")  # noqa: E731
    args, kwargs = fx.node.map_arg(tuple(args), read), fx.node.map_arg(dict(kwargs), read)
    with contextlib.suppress(Exception), no_new_guards(mode), mode, torch.no_grad():
        return target(*args, **kwargs)
    return None


def same_meta(a: Any, b: Any) -> bool:
    """Whether two metadata agree in everything a reader looks at, strides included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # Not through detach(): that is a fake op, and its cache asks whether a size is 1.
        return tensor_key(a)[:-1] == tensor_key(b)[:-1]
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_meta, a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def refresh(nodes: Sequence[fx.Node], mode: FakeTensorMode | None) -> dict[fx.Node, Any] | None:
    """New metadata of ``nodes`` and of everything downstream that changes with it, not yet written.

    None if some of it cannot be told, or changes shape or dtype: then the rewrite that asked must not happen.
    """
    fresh: dict[fx.Node, Any] = {}
    queue = list(nodes)
    while queue:
        node = queue.pop(0)
        if node.op != "call_function":
            continue
        old = node.meta.get("val")
        new = _with(node, fresh, mode)
        if new is None and old is not None:
            return None
        if same_meta(old, new):
            continue
        if not _same_shape_and_type(old, new):
            return None
        fresh[node] = new
        queue.extend(node.users)
    return fresh


def _with(node: fx.Node, fresh: Mapping[fx.Node, Any], mode: FakeTensorMode | None) -> Any:
    read = lambda operand: fresh.get(operand, operand.meta.get("val"))  # noqa: E731
    with contextlib.suppress(Exception), no_new_guards(mode), mode or contextlib.nullcontext(), torch.no_grad():
        assert callable(node.target)
        return node.target(*fx.node.map_arg(node.args, read), **fx.node.map_arg(node.kwargs, read))
    return None


def _same_shape_and_type(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        mine, other = tensor_key(old), tensor_key(new)
        return bool(mine[0] == other[0] and mine[2:5] == other[2:5])
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(map(_same_shape_and_type, old, new))
    return type(old) is type(new)
