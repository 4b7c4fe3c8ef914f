"""Run a program's graph node by node, promoted to a dtype, forgetting every value after its last reader.

``model.double()`` is no float64 oracle: casts to float32 that the model hard-codes stay, and some models crash. The
oracle is the *captured graph promoted*: every floating dtype among the arguments becomes float64, every weight is
evaluated from float64 leaves, every floating input is cast. Weights are promoted when they are read and freed after
their last reader, so a float64 run of a float32 model needs the memory of its largest layer, not of a second model.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from .program import Program

aten = torch.ops.aten
Observer = Callable[[fx.Node, Any], None]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def interpret(
    program: Program,
    inputs: Sequence[Any],
    *,
    dtype: torch.dtype | None = None,
    weight: Callable[[str], Tensor] | None = None,
    observe: Observer | None = None,
    noise: bool = True,
) -> tuple[Any, ...]:
    """The flat outputs of ``program`` on flat ``inputs``.

    Args:
        dtype: promote the whole computation to this dtype; None runs it as captured.
        weight: gives the tensor of a weight by name; by default the table's value (in ``dtype``).
        observe: is called with every node and its value, in order.
        noise: False turns dropout off, and draws what a node draws from a seed of its own: two programs that draw in another
            order can then be compared.

    Buffers and inputs that the graph writes are copies: neither the user's model nor ``inputs`` change.
    """
    run = Interpretation(program, dtype, weight, noise)
    return run.all(inputs, observe)


_DRAWS = frozenset({
    aten.rand.default, aten.randn.default, aten.rand_like.default, aten.randn_like.default, aten.randint.default,
    aten.randint.low, aten.randperm.default, aten.bernoulli.default, aten.multinomial.default,
})  # fmt: skip
"""What draws random numbers that the model wants for themselves: a latent, a mask, an order."""


def _drawn(node: fx.Node, operand: Callable[[fx.Node], Any]) -> Any:
    """What ``node`` draws, in the dtype it was captured in: another one would draw other numbers from the same seed."""

    def as_captured(x: fx.Node) -> Any:
        value, captured = operand(x), x.meta.get("val")
        return value.to(captured.dtype) if isinstance(value, Tensor) and isinstance(captured, Tensor) else value

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), as_captured)
    with own_generators():
        seed_torch(zlib.crc32(str(node.meta.get("origin", node.name)).encode()))
        return node.target(*args, **kwargs)  # type: ignore[operator]


def own_generators() -> AbstractContextManager[None]:
    """Inside, torch's generators may be seeded and drawn from: afterwards those of every device in use are what they were."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if _has_gpu() else ())


def seed_torch(seed: int) -> None:
    """Start torch's generators from ``seed``; of a device that is not in use yet, nothing is kept for later."""
    torch.default_generator.manual_seed(seed)
    if _has_gpu():
        torch.cuda.manual_seed_all(seed)


def _has_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class Interpretation:
    """One run of a graph, step by step."""

    def __init__(
        self, program: Program, dtype: torch.dtype | None, weight: Callable[[str], Tensor] | None = None, noise: bool = True
    ) -> None:
        self.program = program
        self.noise = noise
        self.dtype = dtype
        self.weight = weight or self._weight
        self.written = written(program.graph)
        self.values: dict[fx.Node, Any] = {}

    def all(self, inputs: Sequence[Any], observe: Observer | None = None) -> tuple[Any, ...]:
        last = last_readers(self.program.graph)
        feed = iter(inputs)
        for node in self.program.graph.nodes:
            if node.op == "output":
                return tuple(fx.node.map_arg(node.args[0], self.operand))
            if node.op == "get_attr" and node not in self.written:
                continue  # weights are made when they are read: all of them at once would be a second model
            value = self.input(node, next(feed)) if node.op == "placeholder" else self.step(node)
            self.values[node] = value
            if observe is not None:
                observe(node, value)
            for dead in last.get(node, ()):
                self.values.pop(dead, None)
        return ()

    def input(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        promoted = self.promote(value)
        return promoted.clone() if node in self.written and promoted is value else promoted

    def _weight(self, name: str) -> Tensor:
        """An untouched weight as it is (``step`` promotes what it is given), an edited one computed in the wanted dtype."""
        return self.program.weights.value(name, self.dtype if self.program.weights[name].edited else None)

    def step(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.attribute(node)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        if not self.noise and node.target in _DRAWS:
            return self.promote(_drawn(node, self.operand))
        given = fx.node.map_arg(node.args, self.operand)
        if self.dtype is not None and node.target in _IN_PIECES and _is_large(given):
            return _IN_PIECES[node.target](self.dtype, *given)
        args = fx.node.map_aggregate(given, self.promote)
        kwargs = fx.node.map_aggregate(fx.node.map_arg(node.kwargs, self.operand), self.promote)
        assert callable(node.target)
        if not self.noise:
            args, kwargs = _without_noise(node.target, args, kwargs)
        value = node.target(*args, **kwargs)  # type: ignore[misc]
        # ones([n]) has torch's own dtype; promoted at each reader it would lose what is written into it.
        made = not any(isinstance(x.meta.get("val"), Tensor) for x in node.all_input_nodes)
        return self.promote(value) if made else value

    def operand(self, node: fx.Node) -> Any:
        """The value of a node that is read. A weight is made anew for each reader, unless the graph writes it."""
        return self.values[node] if node in self.values else self.attribute(node)

    def attribute(self, node: fx.Node) -> Any:
        name = str(node.target)
        if name in self.program.weights:
            value = self.weight(name)
            return value.clone() if node in self.written else value
        if name in self.program.regions:
            region = self.program.regions[name]
            return region if self.dtype is None else promoted_region(region, self.dtype)
        return self.program.training[name.removesuffix("training").removesuffix(".")]

    def promote(self, x: Any) -> Any:
        if self.dtype is None:
            return x
        if isinstance(x, Tensor):
            return x.to(self.dtype) if x.is_floating_point() else x
        return self.dtype if isinstance(x, torch.dtype) and x in _FLOATS else x


_LARGE = 2**22


def _is_large(args: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.numel() > _LARGE and x.dtype is not torch.float64 for x in args)


def _linear_in_pieces(dtype: torch.dtype, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """A head over a vocabulary, promoted some rows at a time: its float64 copy alone would outweigh the rest."""
    rows = max(1, _LARGE // W.shape[1])
    biases = [None] * -(-len(W) // rows) if b is None else [c.to(dtype) for c in torch.split(b, rows)]
    x = x.to(dtype)

    def piece(w: Tensor, c: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, w.to(dtype), c)

    # The backward promotes each piece again instead of keeping it.
    pieces = [checkpoint(piece, w, c, use_reentrant=False) for w, c in zip(torch.split(W, rows), biases, strict=True)]
    return torch.cat(pieces, -1)


def _embedding_in_pieces(dtype: torch.dtype, W: Tensor, index: Tensor, *options: Any) -> Tensor:
    """Only the rows that are read are promoted."""
    return torch.nn.functional.embedding(index, W).to(dtype)


_IN_PIECES: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.linear.default: _linear_in_pieces,
    torch.ops.aten.embedding.default: _embedding_in_pieces,
}


def _without_noise(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False)) | kwargs
        if "train" in given:  # a dropout
            return (), {**given, "train": False}
    if target is torch.ops.aten.scaled_dot_product_attention.default:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        return (), {**dict(zip(names, args, strict=False)), **kwargs, "dropout_p": 0.0}
    return args, kwargs


def promoted_region(region: fx.GraphModule, dtype: torch.dtype) -> Callable[..., Any]:
    """The body of a higher-order op with its floating dtypes replaced."""

    class Promoting(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            change = lambda x: dtype if isinstance(x, torch.dtype) and x in _FLOATS else x  # noqa: E731
            return super().call_function(target, fx.node.map_aggregate(args, change), fx.node.map_aggregate(kwargs, change))

    return lambda *args: Promoting(region).run(*args)


def last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the operands that nobody reads after it (and itself, if nobody reads it at all)."""
    seen: set[fx.Node] = set()
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for operand in (node, *node.all_input_nodes):
            if operand not in seen:
                seen.add(operand)
                dead.setdefault(node, []).append(operand)
    return dead


def writes(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory a call writes, by its schema; a batch or instance norm in training writes its statistics.

    A higher-order call writes what its body writes (``meta["region"]`` of the node that reads the body).
    """
    if node.op != "call_function":
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        return _written_inside(node)
    if node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
        statistics = node.args[3:5]
        training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
        return [x for x in statistics if isinstance(x, fx.Node)] if training is not False else []
    written = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        operand = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        written.extend([operand] if isinstance(operand, fx.Node) else [x for x in operand or () if isinstance(x, fx.Node)])  # type: ignore[union-attr]
    return written


def _written_inside(node: fx.Node) -> list[fx.Node]:
    bodies = [index for index, x in enumerate(node.args) if isinstance(x, fx.Node) and "region" in x.meta]
    if not bodies:
        return []
    body, operands = node.args[bodies[0]], node.args[bodies[0] + 1 :]
    assert isinstance(body, fx.Node)
    region: fx.Graph = body.meta["region"].graph
    inside = written(region)
    pairs = zip(region.find_nodes(op="placeholder"), operands, strict=False)
    return [operand for inner, operand in pairs if inner in inside and isinstance(operand, fx.Node)]


def written(graph: fx.Graph) -> set[fx.Node]:
    """The inputs and weights whose memory some node writes, directly or through a view."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        for operand in writes(node):
            found.update(roots(operand))
    return found


def roots(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory ``node`` may share: itself, and what it is a view of."""
    found, stack = {node}, [node]
    while stack:
        for source in may_alias(stack.pop()):
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


_MAY_ALIAS = {"reshape", "contiguous", "to", "dropout", "flatten", "clone_if_needed", "feature_dropout", "alpha_dropout"}


def may_alias(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory the result of ``node`` may share: by schema, and ops that return a view when they can."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return node.all_input_nodes[:1]
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    schema = node.target._schema
    if schema.name.split("::")[1] in _MAY_ALIAS:
        return node.all_input_nodes[:1]
    if not any(result.alias_info is not None for result in schema.returns):
        return []
    shared = []
    for index, argument in enumerate(schema.arguments):
        operand = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and isinstance(operand, fx.Node):
            shared.append(operand)
    return shared
