"""What the backward keeps of the forward: which storages, in which node they arise, and which nodes need them.

    kept  =  union over nodes n of saved(n),   by storage, without parameters and buffers

No table of derivative formulas: the graph runs node by node on fake tensors, which have sizes and storages and no memory,
under ``torch.autograd.graph.saved_tensors_hooks``, so autograd itself says what each node saves. A storage that two nodes save is
counted once, and goes only if both let go of it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn
from torch.func import functional_call

from ._torch import FakeTensorMode, KernelObserver, pytree, quiet_fakes, storage_key
from .checkpoints import parts
from .flops import flops_of
from .interpret import Interpretation
from .lean import LEAN
from .printed import printed
from .program import Program, arguments, path_of, source_of, target_name
from .record import undisturbed
from .shapes import show

aten = torch.ops.aten

Kind = Literal["input", "value", "inside", "cast"]


@dataclass(frozen=True)
class SavedTensor:
    """One storage that the backward keeps.

    Attributes:
        node: the node whose value it is, or in which it arises.
        kind: "input" of the model; "value" of a node; "inside" an op: statistics, probabilities, a dropout mask; "cast" that
            autocast makes of an operand.
        made_by: the op of ``node``; for what arises inside, the kernel that made it.
        shape, dtype: of the tensor that was made (its views share the storage).
        bytes: of the storage.
        needed_by: the nodes whose backward reads it, in the order of the forward.
        readers: their ops.
        path: the module path of ``node``.
        source: the user's source line of ``node``, or None.
    """

    node: str
    kind: Kind
    made_by: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    needed_by: tuple[str, ...]
    readers: tuple[str, ...]
    path: str = ""
    source: str | None = None


@dataclass(frozen=True)
class SavedTensors:
    """What the backward of one call keeps, at the sizes of that call.

    Attributes:
        model: the user's class.
        tensors: one per storage, in the order they arise.
        notes: what a reader must know, one sentence each.
        at: the kept storage of a node's value, by the node's name; views of one storage have one.
        values: the storages of a node's value, by the node's name, kept or not (then nothing needs them); not those of weights.
        flops: what each call of the forward costs, by the node's name (flops.py).
        again: what the backward computes again of it.
    """

    model: str
    tensors: tuple[SavedTensor, ...]
    notes: tuple[str, ...] = field(default=())
    at: Mapping[str, SavedTensor] = field(default_factory=dict, repr=False)
    values: Mapping[str, tuple[SavedTensor, ...]] = field(default_factory=dict, repr=False)
    flops: Mapping[str, int] = field(default_factory=dict, repr=False)
    again: Mapping[str, int] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def recomputed(self) -> int:
        """The FLOPs that the backward computes again."""
        return sum(self.again.values())

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by kind, largest first."""
        return _largest_first((tensor.kind, tensor.bytes) for tensor in self.tensors)

    @property
    def by_need(self) -> dict[tuple[str, ...], int]:
        """Bytes by the ops that need them: all of these must let go before the bytes are free. Largest first."""
        return _largest_first((tuple(sorted(set(tensor.readers))), tensor.bytes) for tensor in self.tensors)

    def freed(self, nodes: Collection[str]) -> int:
        """The bytes that go if the backward of ``nodes`` needs nothing: those that nothing else needs."""
        return sum(tensor.bytes for tensor in self.tensors if set(tensor.needed_by) <= set(nodes))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.model}: the backward keeps {self.bytes:,} bytes in {len(self.tensors)} tensors", style="bold")
        yield from (Text(f"  {note}", style="dim") for note in self.notes)
        if self.again:
            yield Text(f"  {self.recomputed:,} FLOPs are computed again, where the forward has {sum(self.flops.values()):,}")
        if not self.tensors:
            return
        table = Table("bytes", "times", "made by", "tensor", "kind", "needed by", "source", box=None, pad_edge=True)
        for (where, tensor, kind, readers, source), group in _alike(self.tensors).items():
            total = sum(x.bytes for x in group)
            table.add_row(*map(Text, (f"{total:,}", str(len(group)), where, tensor, kind, readers, source)))
        yield table
        shares = Table("share", "bytes", "needed by", box=None, pad_edge=True)
        for ops, size in self.by_need.items():
            shares.add_row(f"{size / max(self.bytes, 1):.1%}", f"{size:,}", " + ".join(ops))
        yield shares
        yield Text("  " + ", ".join(f"{kind} {size / max(self.bytes, 1):.1%}" for kind, size in self.by_kind.items()))

    def __str__(self) -> str:
        return printed(self, 160)


def saved_tensors(
    program: Program,
    inputs: Sequence[Any] | None = None,
    *,
    trains: Callable[[str], bool] | None = None,
    autocast: torch.dtype | None = None,
) -> SavedTensors:
    """What the backward of ``program`` keeps.

    Args:
        inputs: flat inputs, by default the example. Nothing is computed: their sizes count, and whether they require gradients.
        trains: whether a weight requires a gradient, by name; by default what the user's tensor says.
        autocast: run under autocast to this dtype, as mixed-precision training does.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = _weights(program, mode, trains)
    watch = _Watch(program, weights)
    feed = [_fake(mode, x) for x in (program.example if inputs is None else inputs)]
    device = next((x.device.type for x in (*weights.values(), *feed) if isinstance(x, Tensor)), "cpu")
    hooks = torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda x: x)
    with torch.enable_grad(), quiet_fakes(), mode, KernelObserver(watch.kernel), _autocast(device, autocast), hooks:
        watch.all(feed, watch.value)
    made = watch.storages()
    tensors = tuple(tensor for tensor in made.values() if tensor.needed_by)
    values = {name: tuple(made[key] for key in keys if key in made) for name, keys in watch.values_at.items()}
    at = {name: kept[-1] for name, found in values.items() if (kept := [tensor for tensor in found if tensor.needed_by])}
    trainable = any(x.requires_grad for x in (*weights.values(), *feed) if isinstance(x, Tensor))
    notes = () if trainable else ("nothing requires a gradient: there is no backward",)
    return SavedTensors(program.name, tensors, notes, at, values, watch.flops, watch.again)


def saved_in_training(program: Program, autocast: torch.dtype | None = None) -> SavedTensors:
    """The same with every module of a program for both modes in training."""
    question = ("saved in training", autocast, program.spelled())
    if question not in program.facts:
        twin = program.copy()
        twin.training = dict.fromkeys(twin.training, True)
        program.facts[question] = saved_tensors(twin, autocast=autocast)
    found: SavedTensors = program.facts[question]
    return found


class _Watch(Interpretation):
    """A run that knows of every storage who made it and whose backward needs it."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        super().__init__(program, None, weights.__getitem__)
        self.node: fx.Node = program.output
        self.owned = {storage_key(weight) for weight in weights.values()}
        # The tensors stay alive: a storage that is freed could pass its identity on.
        self.made: dict[int, tuple[fx.Node, Kind, str, Tensor]] = {}
        self.needed: dict[int, dict[fx.Node, None]] = {}
        self.values_at: dict[str, tuple[int, ...]] = {}
        self.part = {node: name for name, block in parts(program.graph).items() for node in block.nodes}
        self.flops: dict[str, int] = {}
        self.again: dict[str, int] = {}

    def input(self, node: fx.Node, value: Any) -> Any:
        self.node = node
        return super().input(node, value)

    def step(self, node: fx.Node) -> Any:
        self.node = node
        if node in self.part:
            self.enter(node)
        result = super().step(node)
        if node in self.part:
            self.again[node.name] = self.flops.get(node.name, 0)
        elif (own := _OWN.get(node.target)) is not None and any(x.requires_grad for x in _tensors(result)):
            self.again[node.name] = own.again(*fx.node.map_arg(tuple(arguments(node).values()), self.operand))
        return result

    def enter(self, node: fx.Node) -> None:
        """A checkpoint keeps all that it is given, whatever comes of it."""
        for x in node.all_input_nodes:
            if x.op != "get_attr" and self.part.get(x) != self.part[node]:
                for tensor in _tensors(self.operand(x)):
                    self.keep(tensor)

    def kernel(self, op: Any, args: Sequence[Any], result: Any) -> Any:
        """A kernel has run inside the current node; what it made may be the node's value, which ``value`` finds out."""
        result = _as_computed(op, args, result)
        self.flops[self.node.name] = self.flops.get(self.node.name, 0) + flops_of(op, args, result)
        kind: Kind = "cast" if op is aten._to_copy.default else "inside"
        for tensor in _tensors(result):
            self.made.setdefault(storage_key(tensor), (self.node, kind, op._schema.name.replace("::", "."), tensor))
        return result

    def value(self, node: fx.Node, value: Any) -> None:
        kind: Kind = "input" if node.op == "placeholder" else "value"
        for tensor in _tensors(value):
            key = storage_key(tensor)
            self.values_at[node.name] = (*self.values_at.get(node.name, ()), key)
            if node.op == "get_attr":
                self.owned.add(key)  # statistics that the graph writes: a copy of the user's
            elif key not in self.made or self.made[key][0] is node:
                self.made[key] = (node, kind, target_name(node) if node.op == "call_function" else "", tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        if self.node not in self.part:  # a checkpoint keeps nothing of what it computes
            self.keep(tensor)
        return tensor

    def keep(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key not in self.owned:
            self.made.setdefault(key, (self.node, "inside", target_name(self.node), tensor))
            self.needed.setdefault(key, {})[self.node] = None

    def storages(self) -> dict[int, SavedTensor]:
        """All that were made, in order, by identity."""
        found = {}
        for key, (node, kind, made_by, tensor) in self.made.items():
            if key in self.owned:
                continue
            readers = self.needed.get(key, {})
            found[key] = SavedTensor(
                node.name,
                kind,
                made_by,
                tuple(tensor.shape),
                tensor.dtype,
                tensor.untyped_storage().nbytes(),
                tuple(reader.name for reader in readers),
                tuple(target_name(reader) for reader in readers),
                path_of(node),
                source_of(node),
            )
        return found


_OWN = {own.overload: own for own in LEAN}
_NORMS = {aten.native_layer_norm.default, aten.native_group_norm.default, aten.native_batch_norm.default}


def _as_computed(op: Any, args: Sequence[Any], result: Any) -> Any:
    """The fake norms of a CPU have statistics in the dtype of the input; the kernels have them in that of the weights."""
    if op not in _NORMS or args[0].device.type != "cpu":
        return result
    dtype = next((x.dtype for x in args[1:] if isinstance(x, Tensor)), args[0].dtype)
    return result[0], result[1].to(dtype), result[2].to(dtype)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _fake(mode: FakeTensorMode, x: Any) -> Any:
    return mode.from_tensor(x) if isinstance(x, Tensor) else x


def _weights(program: Program, mode: FakeTensorMode, trains: Callable[[str], bool] | None) -> dict[str, Tensor]:
    """Every weight as a fake: names of one storage share one, an edited weight has its own."""
    weights = {}
    for name in program.weights:
        weight = program.weights[name]
        if weight.edited:
            with mode:
                fake = torch.empty(weight.meta.shape, dtype=weight.meta.dtype, device=weight.meta.device)
            fake.requires_grad_(weight.requires_grad)
        else:
            fake = mode.from_tensor(program.weights.leaves[name])
        weights[name] = fake if trains is None else fake.requires_grad_(trains(name))
    return weights


def _autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def _largest_first(sizes: Iterator[tuple[Any, int]]) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for key, size in sizes:
        total[key] += size
    return dict(total.most_common())


def _alike(tensors: Sequence[SavedTensor]) -> dict[tuple[str, ...], list[SavedTensor]]:
    """The rows of the table: what is the same in every layer is one."""
    rows: dict[tuple[str, ...], list[SavedTensor]] = {}
    for x in tensors:
        where = re.sub(r"(?<![^.])\d+(?![^.])", "*", x.path)
        made = f"{where}/{x.made_by}".strip("/") or x.node
        tensor = f"{show(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        source = re.sub(r"^.*?([^/\\]+:\d+: )", r"\1", x.source or "")
        rows.setdefault((made, tensor, x.kind, ", ".join(dict.fromkeys(x.readers)), source), []).append(x)
    return rows


def kept_as_written(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, training: bool, autocast: torch.dtype | None
) -> int | None:
    """The bytes that the backward of the user's own forward keeps; None if it reads values, which fake tensors do not have."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in named}
    fake_args, fake_kwargs = pytree.tree_map(lambda x: _fake(mode, x), (tuple(args), dict(kwargs)))
    owned = {storage_key(tensor) for tensor in state.values()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(storage_key(tensor), tensor.untyped_storage())
        return tensor

    device = next((x.device.type for x in pytree.tree_leaves((state, fake_args, fake_kwargs)) if isinstance(x, Tensor)), "cpu")
    with undisturbed(model), quiet_fakes():
        if model.training != training:
            model.train(training)
        try:
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
            with mode, KernelObserver(_as_computed), _autocast(device, autocast), hooks:
                functional_call(model, state, fake_args, fake_kwargs)
        except Exception:
            return None
    return sum(int(storage.nbytes()) for key, storage in kept.items() if key not in owned)
