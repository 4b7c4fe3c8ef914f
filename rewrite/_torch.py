"""Every private name of torch that tautomer uses, and nothing else. One test per name (tests/rewrite/test_torch.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "erased",
    "fake_mode_of",
    "oblivious_sizes",
    "no_new_guards",
    "pytree",
    "set_grad_enabled_region",
    "autocast_region",
    "statically_known_true",
    "storage_key",
    "unlifted_module",
]

set_grad_enabled_region: Any = torch.ops.higher_order.wrap_with_set_grad_enabled
autocast_region: Any = torch.ops.higher_order.wrap_with_autocast


def unlifted_module(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The exported program as an fx graph whose weights are ``get_attr`` nodes, without input guards."""
    return exported.module(check_guards=False)  # type: ignore[return-value]


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that carries the symbolic sizes of a captured graph, if any tensor has one."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


@contextlib.contextmanager
def no_new_guards(mode: FakeTensorMode | None) -> Iterator[None]:
    """Inside, a comparison of symbolic sizes that would specialise the graph raises instead of answering."""
    if mode is None or mode.shape_env is None:
        yield
        return
    with mode.shape_env.error_on_new_guards():
        yield


@contextlib.contextmanager
def oblivious_sizes() -> Iterator[None]:
    """Inside, export does not specialise sizes of 0 and 1."""
    with symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


def erased(node: fx.Node) -> bool:
    """Whether ``node`` was erased from its graph."""
    return bool(node._erased)


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of the storage: equal for views of one buffer, distinct for meta and empty tensors."""
    return int(tensor.untyped_storage()._cdata)
