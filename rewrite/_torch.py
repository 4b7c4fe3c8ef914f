"""Every private name of torch that tautomer uses, and nothing else. One test per name (tests/rewrite/test_torch.py)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "KernelObserver",
    "OperatorObserver",
    "ShapeEnv",
    "autocast_region",
    "below_autocast",
    "erased",
    "fake_mode_of",
    "guards_of",
    "no_new_guards",
    "oblivious_sizes",
    "pytree",
    "quiet_fakes",
    "quiet_triton",
    "set_grad_enabled_region",
    "size_functions",
    "statically_known_true",
    "storage_key",
    "unlifted_module",
]

set_grad_enabled_region: Any = torch.ops.higher_order.wrap_with_set_grad_enabled
autocast_region: Any = torch.ops.higher_order.wrap_with_autocast

# The functions that a condition of ``guards_of`` may call: floor division, modulus, maximum, ...
size_functions: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf}


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


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Inside, a fake op that fails raises without also logging its traceback."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextlib.contextmanager
def quiet_triton() -> Iterator[None]:
    """Inside, torch does not say that a ``triton_op`` finds no Triton: ours need none."""
    logger = logging.getLogger("torch._library.triton")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def below_autocast(device: str) -> Iterator[None]:
    """Inside a kernel of the autocast key, calls go on to the keys below it: "cpu" or "cuda"."""
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device]
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        yield


def erased(node: fx.Node) -> bool:
    """Whether ``node`` was erased from its graph."""
    return bool(node._erased)


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of the storage: equal for views of one buffer, distinct for meta and empty tensors."""
    return int(tensor.untyped_storage()._cdata)


def guards_of(exported: torch.export.ExportedProgram) -> list[str]:
    """The conditions on input sizes an export rests on, as Python over ``L['name'].size()[i]``."""
    return list(exported._guards_code)


class OperatorObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``before`` with every tensor that an operator, by its schema, is about to write."""

    def __init__(self, before: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, torch.Tensor):
                        self.before(tensor)
        return func(*args, **kwargs)


class KernelObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows ``after`` every kernel that runs, arguments and result: what a composite op or autocast is made of.

    ``after`` returns the result that the caller gets.
    """

    def __init__(self, after: Callable[[Any, Sequence[Any], Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.after = after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.after(func, args, func(*args, **(kwargs or {})))
