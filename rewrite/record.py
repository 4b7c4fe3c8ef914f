"""One eager run of the user's model, which leaves the model as it was.

The run gives what a capture is compared with and what it must know beforehand: the outputs and their classes, which
submodules are called and how often, what the forward does besides computing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import OperatorObserver, one_at_a_time, pytree, storage_key
from .errors import CaptureError
from .interpret import own_generators, seed_torch

SEED = 0
_LEAVES = (Tensor, int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


@dataclass
class Recording:
    """What one eager run showed.

    Attributes:
        outputs: the flat leaves of the output.
        out_spec: the tree of the output.
        calls: how often each submodule was called, by path, in the order of the first call; the root is "".
        inputs: ``(args, kwargs)`` of the first call of each submodule, cloned; empty unless they were asked for.
        inference: which of the outputs the forward computes in inference mode.
        effects: what the forward changed besides buffers, ``self.last`` for an attribute of the root.
        remembers: whether a second call, after these changes, gives another output.
        replaced: buffers and parameters that the forward assigns anew, if a second call sees it.
    """

    outputs: tuple[Any, ...] = ()
    out_spec: Any = None
    calls: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    inference: tuple[bool, ...] = ()
    effects: tuple[str, ...] = ()
    remembers: bool = False
    replaced: tuple[str, ...] = ()


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, keep_inputs: bool = False) -> Recording:
    """Run ``model(*args, **kwargs)`` once, without gradients, on clones of the inputs.

    The model, the inputs and the random generators are afterwards what they were, whether the run succeeds or raises.

    Raises:
        CaptureError: the forward returns an object that is no tensor, container, dataclass or plain value.
    """
    recording = Recording()
    with undisturbed(model) as snapshot:
        with _counting(model, recording, keep_inputs):
            output = _call(model, args, kwargs, snapshot)
        register_classes(output)
        flat, recording.out_spec = pytree.tree_flatten(output)
        for leaf in flat:
            if not isinstance(leaf, _LEAVES):
                raise _unknown_class(type(model), type(leaf))
        recording.inference = tuple(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in flat)
        recording.effects = snapshot.changes()
        # An output may be a parameter or a buffer of the model, which is about to be put back.
        recording.outputs = clone_leaves(tuple(flat))
        replaced = snapshot.replaced()
        if replaced and not any(leaf.is_meta for leaf in flat if isinstance(leaf, Tensor)):
            snapshot.restore_memory()
            if not _same_leaves(recording.outputs, pytree.tree_leaves(_call(model, args, kwargs, snapshot))):
                recording.replaced = replaced
        if recording.effects and not any(leaf.is_meta for leaf in flat if isinstance(leaf, Tensor)):
            snapshot.restore_tensors()
            try:
                recording.remembers = not _same_leaves(
                    recording.outputs, pytree.tree_leaves(_call(model, args, kwargs, snapshot))
                )
            except Exception:  # the second call does not run at all
                recording.remembers = True
    return recording


def _same_leaves(a: Sequence[Any], b: Sequence[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return type(x) is type(y) and bool(x == y)
        return x.shape == y.shape and x.dtype == y.dtype and (torch.equal(x, y) or torch.allclose(x, y, equal_nan=True))

    return len(a) == len(b) and all(map(same, a, b))


def eager(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The flat outputs of ``model(*args, **kwargs)``; neither the model nor the inputs change."""
    with undisturbed(model) as snapshot:
        return tuple(clone_leaves(pytree.tree_leaves(_call(model, args, kwargs, snapshot))))


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], snapshot: Snapshot) -> Any:
    args, kwargs = clone_leaves((tuple(args), dict(kwargs)))
    with snapshot.guarding(), torch.no_grad():
        seed_generators()
        return model(*args, **kwargs)


def _unknown_class(owner: type, found: type) -> CaptureError:
    return CaptureError(
        f"the forward of {owner.__name__} returns a {found.__name__}, which torch.export does not know",
        hint=f"return tensors, tuples, dicts or a dataclass, or register the class: "
        f"torch.utils._pytree.register_pytree_node({found.__name__}, ...)",
    )


# -- leaves and their classes ---------------------------------------------------------------------------------


def clone_leaves(tree: Any) -> Any:
    """``tree`` with a fresh tensor for every tensor leaf: the same tensor given twice becomes two."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def register_classes(tree: Any) -> None:
    """Make the dataclasses inside ``tree`` known to torch, so that a capture sees through them."""
    known: set[type] = set()
    while True:
        found = {type(leaf) for leaf in pytree.tree_leaves(tree) if dataclasses.is_dataclass(leaf)} - known
        if not found:
            return
        for kind in found:
            torch.export.register_dataclass(kind)
        known |= found


def register_caches(model: nn.Module) -> None:
    """Make the cache classes of Hugging Face models known to torch, if the model has such a part."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    parts = {type(m): m for m in model.modules() if isinstance(m, modeling.PreTrainedModel)}
    if not parts:
        return
    with contextlib.suppress(ImportError):  # a transformers without exporters registers its caches itself
        exporter = importlib.import_module("transformers.exporters.exporter_dynamo")
        for part in parts.values():
            exporter.register_cache_pytrees_for_model(part)


# -- counting calls -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counting(model: nn.Module, recording: Recording, keep_inputs: bool) -> Iterator[None]:
    def observe(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recording.calls[path] = recording.calls.get(path, 0) + 1
            if keep_inputs and path not in recording.inputs:
                recording.inputs[path] = clone_leaves((args, kwargs))

        return hook

    handles = [m.register_forward_pre_hook(observe(path), with_kwargs=True) for path, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Torch prints whole graphs and tracebacks when a question fails, through several channels; inside, none of it shows."""
    with one_at_a_time():
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        sink = io.StringIO()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)


# -- the model stays what it was ------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[Snapshot]:
    """Whatever happens inside, the model, the random generators and the ambient modes are restored afterwards.

    Inside there is no autocast and no inference mode, and gradients are enabled.
    """
    with one_at_a_time():
        snapshot = Snapshot(model)
        numpy_random = getattr(sys.modules.get("numpy"), "random", None)
        numpy_state = numpy_random.get_state() if numpy_random else None
        python_state = random.getstate()
        try:
            with own_generators(), torch.inference_mode(False), torch.enable_grad(), no_autocast():
                yield snapshot
        finally:
            snapshot.restore()
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)


def seed_generators() -> None:
    """Start every generator from one seed, so that two runs draw the same numbers."""
    seed_torch(SEED)
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Without this, a capture under the user's autocast has metadata in bfloat16 and a graph without casts."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Snapshot:
    """Everything a forward can change about a model: attributes, containers in them, and the memory of tensors.

    Buffers are copied at once. Parameters are copied when an operator is about to write them, which is rare: a
    snapshot of a large model costs little.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.contents: list[tuple[Any, Any]] = []
        self.tensors: dict[int, Tensor] = {}
        self.copies: dict[int, tuple[Tensor, bool, Any]] = {}
        self._remember(model)
        for buffer in model.buffers():
            self._keep(buffer)

    def _remember(self, root: Any) -> None:
        seen: set[int] = set()
        stack: list[tuple[Any, int]] = [(root, 0)]
        while stack:
            item, depth = stack.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                if item.layout is torch.strided and not item.is_meta:
                    self.tensors.setdefault(storage_key(item), item)
                continue
            children = _children(item)
            if children is None or depth > 6:
                continue
            self.contents.append((item, children))
            values = children.values() if isinstance(children, dict) else children
            # The depth is counted in objects that are no modules: a chain of modules is never cut.
            stack.extend((value, 0 if isinstance(value, nn.Module) else depth + 1) for value in values)

    def _keep(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.is_meta:
            return
        key = storage_key(tensor)
        if key not in self.copies:
            memory = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
            self.copies[key] = (tensor, tensor.is_leaf, memory)

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Inside, a tensor of the model is copied before an operator writes it."""

        def before(tensor: Tensor) -> None:
            if tensor.layout is torch.strided and storage_key(tensor) in self.tensors:
                self._keep(self.tensors[storage_key(tensor)])

        with OperatorObserver(before):
            yield

    def changes(self) -> tuple[str, ...]:
        """The attributes that are not what they were (buffers apart: a program writes them too)."""
        names = {id(module): path for path, module in self.model.named_modules()}
        changed: list[str] = []
        for item, before in self.contents:
            now = _children(item)
            if _identical(now, before):
                continue
            if isinstance(item, nn.Module) and isinstance(now, dict):
                path = names.get(id(item), "")
                keys = [k for k in {**before, **now} if before.get(k, _NOTHING) is not now.get(k, _NOTHING) and k != "training"]
                changed.extend(".".join(filter(None, ("self", path, str(key)))) for key in keys)
            elif not _is_table(item, self.contents):
                changed.extend(self._owners(item, names))
        return tuple(dict.fromkeys(changed))

    def restore(self) -> None:
        """Put back what changed."""
        for item, before in self.contents:
            if not _identical(_children(item), before):
                _put_back(item, before)
        self.restore_tensors()

    def replaced(self) -> tuple[str, ...]:
        """The buffers and parameters that the forward has assigned anew (``self.g = self.g + 1``), by name."""
        tables = {id(item): before for item, before in self.contents}
        found = []
        for path, module in self.model.named_modules():
            for table in (module._buffers, module._parameters):
                for name, before in tables.get(id(table), {}).items():
                    if isinstance(before, Tensor) and table.get(name) is not before:
                        found.append(f"{path}.{name}" if path else str(name))
        return tuple(found)

    def restore_tensors(self) -> None:
        """Put back the parameters and the buffers, and leave other attributes as they are."""
        for item, before in self.contents:
            if not _identical(_children(item), before) and _is_table(item, self.contents):
                _put_back(item, before)
        self.restore_memory()

    def restore_memory(self) -> None:
        """Put back what was written into tensors, and leave those that took their place."""
        for tensor, leaf, memory in self.copies.values():
            tensor.untyped_storage().copy_(memory)
            if leaf and not tensor.is_leaf:  # a buffer that a value with a gradient was added to
                tensor.detach_()

    def _owners(self, item: Any, names: Mapping[int, str]) -> list[str]:
        """The attributes that hold a container, for the note about it."""
        return [
            ".".join(filter(None, ("self", names.get(id(owner), ""), str(key))))
            for owner, before in self.contents
            if isinstance(owner, nn.Module)
            for key, value in before.items()
            if value is item
        ]


_NOTHING = object()
_TABLES = ("_parameters", "_buffers", "_modules")


def _is_table(item: Any, contents: Sequence[tuple[Any, Any]]) -> bool:
    """Whether a dict is one of the tables of a module: a buffer that is assigned anew is part of the graph."""
    return any(isinstance(owner, nn.Module) and any(before.get(t) is item for t in _TABLES) for owner, before in contents)


def _children(item: Any) -> Any:
    """A shallow copy of what ``item`` holds, if it can change: containers, modules, plain objects."""
    if isinstance(item, dict):
        return dict(item)
    if isinstance(item, (list, set)):
        return list(item)
    opaque = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, tuple)
    if isinstance(item, opaque) or not hasattr(item, "__dict__"):
        return None
    return dict(vars(item))


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _put_back(item: Any, before: Any) -> None:
    if isinstance(item, list):
        item[:] = before
    elif isinstance(item, set):
        item.clear()
        item.update(before)
    else:
        target = item if isinstance(item, dict) else vars(item)
        target.clear()
        target.update(before)
