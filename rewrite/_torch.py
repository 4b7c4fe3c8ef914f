"""Every private name of torch that tautomer uses, and nothing else. One test per name (tests/rewrite/test_torch.py)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._traceback
import torch.utils.checkpoint
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "KernelObserver",
    "OperatorObserver",
    "Replay",
    "ShapeEnv",
    "any_batch",
    "autocast_region",
    "backend_named",
    "below_autocast",
    "checkpoint_of",
    "compile_package",
    "copy_input",
    "cpp_compiler",
    "draws_numbers",
    "erased",
    "fake_mode_of",
    "fakes_made_once",
    "guards_of",
    "in_checkpoint",
    "known_translations",
    "load_package",
    "no_new_guards",
    "oblivious_sizes",
    "one_at_a_time",
    "plain_checkpoints",
    "plain_results",
    "pytree",
    "quick_export",
    "quiet_fakes",
    "quiet_triton",
    "restarts",
    "set_grad_enabled_region",
    "short_bodies",
    "size_functions",
    "source_of_input",
    "statically_known_true",
    "storage_key",
    "traced",
    "unlifted_module",
    "unread_lines",
    "values_unasked",
]

set_grad_enabled_region: Any = torch.ops.higher_order.wrap_with_set_grad_enabled
autocast_region: Any = torch.ops.higher_order.wrap_with_autocast
plain_results: Any = torch._C._disabled_torch_function_impl
"""As ``__torch_function__`` of a kind of tensor: what is computed from one is a plain tensor, as of a parameter."""

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


_export = threading.RLock()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, no other thread is inside. What an export is about torch keeps in globals, and what is patched meanwhile, muted or
    drawn is the process's too: of two that overlapped, the last to end would leave it as the other one had it.
    """
    with _export:
        yield


@contextlib.contextmanager
def quick_export() -> Iterator[None]:
    """Inside, ``torch.export`` leaves out what it does only to throw it away; what it returns is the same."""
    with fakes_made_once(), unread_lines():
        yield


_compared: set[Any] = set()


@contextlib.contextmanager
def fakes_made_once() -> Iterator[None]:
    """Inside, a fake mode that remembers a result does not make a second one out of what it remembers, only to see whether that
    has the same dispatch keys, which it does once for every kind of result: with symbolic sizes that takes as long as the op.
    """
    describe = FakeTensorMode._get_output_info_for_cache_entry

    def compared_once(self: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        keys = torch._C._dispatch_key_set(output) if isinstance(output, FakeTensor) else None
        marks = (output.device, output.layout, output.is_conj(), output.is_neg()) if keys else ()
        kind = (keys, *marks, getattr(func, "is_view", False))
        if kind not in _compared:
            found = describe(self, state, key, func, args, kwargs, output)
            if found.metadata is not None:
                _compared.add(kind)
            return found
        self._output_from_cache_entry = lambda *_: output
        try:
            return describe(self, state, key, func, args, kwargs, output)
        finally:
            del self._output_from_cache_entry

    with patch.object(FakeTensorMode, "_get_output_info_for_cache_entry", compared_once):
        yield


@contextlib.contextmanager
def unread_lines() -> Iterator[None]:
    """Inside, torch reads the source of a frame when it writes the frame down, and not of the hundred that it drops."""

    def frames(stack: Any, skip: int) -> traceback.StackSummary:
        summary = traceback.StackSummary()
        summary.extend(
            traceback.FrameSummary(frame["filename"], frame["line"], frame["name"], lookup_line=False)
            for frame in reversed(stack[skip:])
        )
        return summary

    with patch.object(torch.utils._traceback, "_extract_symbolized_tb", frames):
        yield


@contextlib.contextmanager
def any_batch() -> Iterator[None]:
    """Inside, a fake convolution asks for neither oneDNN nor NNPACK, which are chosen by the batch: a guard on a free size."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.nnpack.flags(enabled=False):  # type: ignore[no-untyped-call]
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


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


_short = False


@contextlib.contextmanager
def short_bodies() -> Iterator[None]:
    """Inside, an op that knows its result without the values need not be run for it; see ``values_unasked``."""
    global _short
    before, _short = _short, True
    try:
        yield
    finally:
        _short = before


def values_unasked(x: Any) -> bool:
    """Whether a call on ``x``, inside ``short_bodies``, is asked for a shape alone: ``x`` is fake, and nobody records the call's
    parts. ``torch.export`` asks three times for each call.
    """
    return _short and isinstance(x, FakeTensor) and get_proxy_mode() is None


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


def draws_numbers(overload: Any) -> None:
    """Say of an op that it draws random numbers; ``triton_op`` takes no tags."""
    overload.tags.append(torch.Tag.nondeterministic_seeded)
    overload._nondeterministic_seeded = True


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
    """Calls ``before`` with every tensor that an operator, by its schema, is about to write.

    A higher-order operator (``torch.cond``) has no schema; what its branches write cannot be an input of it.
    """

    supports_higher_order_operators = True

    def __init__(self, before: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
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


# -- torch.compile --------------------------------------------------------------------------------------------


def source_of_input(node: fx.Node) -> str:
    """Where dynamo took an input from, as Python over ``L``, the caller's locals: ``L['self']._parameters['weight']``."""
    source = getattr(node, "_dynamo_source", None)
    return str(source.name) if source is not None else ""


def copy_input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """An input of a graph of dynamo's in another graph, with all that the compilers behind it read of it."""
    copy = graph.node_copy(node)
    copy.meta = dict(node.meta)
    if hasattr(node, "_dynamo_source"):
        copy._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    return copy


class Replay(fx.Interpreter):
    """Runs a graph of dynamo's. Autocast that the graph enters is entered; the call alone is only recorded in a trace."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.entered: list[torch.autocast] = []

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        try:
            return super().run(*args)
        finally:
            while self.entered:
                self.leave()

    def leave(self) -> None:
        self.entered.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.amp.autocast_mode._exit_autocast:
            return self.leave()
        if target is not torch.amp.autocast_mode._enter_autocast:
            return super().call_function(target, args, kwargs)
        device, dtype, enabled, cached = args
        self.entered.append(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached))
        return self.entered[-1].__enter__()  # type: ignore[no-untyped-call]


def traced(run: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """``run`` on fake inputs as ATen calls, before autograd, autocast and decomposition; regions without gradients or with
    autocast are one node each, as ``torch.export`` writes them. Nodes keep the provenance of an interpreter in ``run``.
    """
    from torch._export.passes.replace_autocast_with_hop_pass import replace_autocast_with_hop_pass
    from torch._export.passes.replace_set_grad_with_hop_pass import replace_set_grad_with_hop_pass

    with fx_traceback.preserve_node_meta(), mode:
        graph_module = make_fx(run, pre_dispatch=True)(*inputs)
    for separate in (replace_set_grad_with_hop_pass, replace_autocast_with_hop_pass):
        graph_module, _ = separate(graph_module, None)
    return graph_module


def backend_named(name: Any, mode: str | None, options: Any) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A backend of torch.compile under its ``mode`` and ``options``."""
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-any-return,no-untyped-call]
    return torch._TorchCompileWrapper(name, mode, options, None)  # type: ignore[no-any-return,no-untyped-call]


def restarts(failure: Exception) -> bool:
    """Whether a backend raised this to have dynamo begin anew: no failure, but a word to dynamo."""
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(failure, RestartAnalysis)


# -- AOTInductor ----------------------------------------------------------------------------------------------


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return None


def compile_package(exported: torch.export.ExportedProgram, file: Path) -> None:
    """Compile an exported program and write it with its weights to ``file``, whose name ends in ".pt2"."""
    torch._inductor.aoti_compile_and_package(exported, package_path=str(file))


def load_package(file: Path) -> Callable[..., Any]:
    """What ``compile_package`` wrote, as a function with the call that was exported."""
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(file))
    return loaded


# -- checkpoints in an export ---------------------------------------------------------------------------------

_PART = "tautomer_checkpoint"
_parts = itertools.count()


@contextlib.contextmanager
def in_checkpoint() -> Iterator[None]:
    """Calls that are traced inside say that they belong together; see ``checkpoint_of``. Of checkpoints in each other the
    outermost one counts."""
    inside = _PART in fx_traceback.current_meta.get("custom", {})
    with contextlib.nullcontext() if inside else fx_traceback.annotate({_PART: f"checkpoint {next(_parts)}"}):
        yield


def checkpoint_of(node: fx.Node) -> str | None:
    """The name of the checkpoint that a traced call was made in."""
    name: str | None = (node.meta.get("custom") or {}).get(_PART)
    return name


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Inside, a checkpoint that is not reentrant is a plain call that ``in_checkpoint`` marks, and an export keeps the marks."""

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        with in_checkpoint():
            yield

    marked = patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", generator)
    with fx_traceback.preserve_node_meta(), marked:
        yield


# -- ONNX -----------------------------------------------------------------------------------------------------

_translations: dict[Any, Any] = {}


@contextlib.contextmanager
def known_translations() -> Iterator[None]:
    """Inside, ``torch.onnx.export`` takes the translations of an opset as it made them for the last file: it reads the
    signatures of all of them, which takes longer than a small model does. Nor does it walk the dispatcher again for each
    namespace of operators.
    """
    import torch._export.utils as export_utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make = vars(ONNXRegistry)["from_torchlib"]

    def remembered(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # An operator exists once what brings it is imported: of quantization, of torchvision.
        key = (args, *sorted(kwargs.items()), len(torch._C._dispatch_get_all_op_names()))
        if key not in _translations:
            _translations[key] = make.__func__(cls, *args, **kwargs)
        registry = copy.copy(_translations[key])
        registry.functions = {op: list(known) for op, known in registry.functions.items()}
        return registry

    walk, walked = export_utils._materialize_cpp_cia_ops, list[int]()

    def once() -> None:
        operators = len(torch._C._dispatch_get_all_op_names())
        if walked[-1:] != [operators]:
            walk()
            walked.append(operators)

    ONNXRegistry.from_torchlib = classmethod(remembered)  # type: ignore[method-assign,assignment]
    try:
        with patch.object(export_utils, "_materialize_cpp_cia_ops", once):
            yield
    finally:
        ONNXRegistry.from_torchlib = make  # type: ignore[method-assign]
