"""The code of a block as Python: the user's own signature, what must hold for the code to be right, and the code.

    def forward(self, hidden, mask=None):
        if not (isinstance(hidden, Tensor) and hidden.dim() == 3 and mask is None and …):
            return base.forward(self, hidden, mask)         the capture has not seen such a call
        …

Written from data alone (block_code.py) wherever a block is read back; nothing in the data is run but ``torch.ops``, and
arithmetic over sizes.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tautomer.rewrite._torch import size_functions
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.program import target_name

from .graph_data import decode, decode_graph
from .python.function import LONGEST, MOST
from .python.names import TAKEN, role
from .python.ops import SEMANTIC_NAMES, express
from .python.pieces import ATOM, Code, Number, Piece, call, code, listed, literal, plain, tuple_of, within, wrapped
from .python.statements import attribute
from .rewritten import function_of
from .signature_data import only_arithmetic

_SIMPLE = (type(None), bool, int, float, str)


def untouched(module: nn.Module, kind: str) -> bool:
    """Whether ``module`` computes what its class says: code may stand in its place."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    own = type(module)
    return not hooked and f"{own.__module__}.{own.__qualname__}" == kind and "forward" not in module.__dict__


_SEMANTIC = [getattr(getattr(tautomer, name), op.name.partition(".")[2]) for name, op in SEMANTIC_NAMES.items()]
_KNOWN: dict[str, Any] = {"torch": torch, "F": F, "math": math, "Tensor": Tensor, "untouched": untouched, "base": None}


def compiled(data: Mapping[str, Any], base: type[nn.Module]) -> Any:
    """The ``forward`` that ``source`` spells, for a subclass of ``base``."""
    text, defaults = source(data, base)
    operators = dict(zip(SEMANTIC_NAMES, _SEMANTIC, strict=True))
    return function_of(text, "forward", {**size_functions, **operators, **_KNOWN, "base": base, **defaults}, base.__name__)


def source(data: Mapping[str, Any], base: type[nn.Module]) -> tuple[str, dict[str, Any]]:
    """The text of ``forward``, and the defaults that have no text.

    Raises:
        UsageError, ExportError, TypeError: the data are not those of a block of this class, or have no text.
    """
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    defaults = {f"default_{p.name}": p.default for p in parameters if _has_default(p) and not isinstance(p.default, _SIMPLE)}
    if taken := {p.name for p in parameters} & (_KNOWN.keys() | SEMANTIC_NAMES.keys()):
        raise UsageError(f"'{min(taken)}' is an argument of {base.__name__}, and a name that its new code uses")
    call = _Call(data, parameters)
    again = f"return base.forward({', '.join(['self', *map(_passed, parameters)])})"
    shown = ["self", *(f"{_signed(p)}" for p in _starred(parameters))]
    guard = list(call.guard())
    lines = [*wrapped(f"def forward({', '.join(shown)}):", 0), "    if not ("]
    lines += [f"        {'and ' if index else ''}{condition}" for index, condition in enumerate(guard)]
    lines += ["    ):", *wrapped(again, 8), *_Body(data, call).lines()]
    return "\n".join(lines) + "\n", defaults


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not inspect.Parameter.empty


def _starred(parameters: list[inspect.Parameter]) -> Iterator[inspect.Parameter | str]:
    """The parameters, with the bare star before those that are given by name alone."""
    star = False
    for p in parameters:
        star |= p.kind is p.VAR_POSITIONAL
        if p.kind is p.KEYWORD_ONLY and not star:
            star = True
            yield "*"
        yield p


def _signed(p: inspect.Parameter | str) -> str:
    if isinstance(p, str):
        return p
    if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
        return f"{'*' if p.kind is p.VAR_POSITIONAL else '**'}{p.name}"
    if not _has_default(p):
        return p.name
    return f"{p.name}={_value(p.default) if isinstance(p.default, _SIMPLE) else f'default_{p.name}'}"


def _passed(p: inspect.Parameter) -> str:
    before = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**", "KEYWORD_ONLY": f"{p.name}="}
    return before.get(p.kind.name, "") + p.name


def _value(x: Any) -> str:
    return _text(literal(x, "value"))


def _text(piece: Code) -> str:
    return "".join(repr(part.value) if isinstance(part, Number) else str(part) for part in piece.parts)


class _Call:
    """The captured call: how each leaf of it is spelled, and what tells another call from it."""

    def __init__(self, data: Mapping[str, Any], parameters: list[inspect.Parameter]) -> None:
        self.data, self.parameters = data, parameters
        self.spelled: dict[int, str] = {}
        self.structure: list[str] = []
        named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self.rest = [name for name, _ in data["given"] if name not in named]
        if self.rest and rest is None:
            raise UsageError(f"the code of a block takes '{self.rest[0]}', which the forward of its class does not")
        if self.rest:
            self.structure.append(f"{rest}.keys() == {{{', '.join(map(_value, self.rest))}}}")
        for name, tree in data["given"]:
            self._walk(name if name in named else f"{rest}[{_value(name)}]", tree)

    def _walk(self, text: str, tree: Any) -> None:
        if isinstance(tree, int):
            self.spelled[tree] = text
            return
        ((kind, children),) = tree.items()
        if kind == "dict":
            self.structure.append(f"type({text}) is dict and {text}.keys() == {{{', '.join(_value(k) for k, _ in children)}}}")
            for key, child in children:
                self._walk(f"{text}[{_value(key)}]", child)
            return
        self.structure.append(f"type({text}) is {'tuple' if kind == 'tuple' else 'list'} and len({text}) == {len(children)}")
        for index, child in enumerate(children):
            self._walk(f"{text}[{index}]", child)

    @property
    def tensors(self) -> list[int]:
        return [index for index, leaf in enumerate(self.data["leaves"]) if "constant" not in leaf]

    def guard(self) -> Iterator[str]:
        """Conditions, of which each may rely on those before."""
        given = {name for name, _ in self.data["given"]}
        for p in self.parameters:
            if p.kind is p.VAR_POSITIONAL or (p.kind is p.VAR_KEYWORD and not self.rest):
                yield f"not {p.name}"
            elif p.kind is not p.VAR_KEYWORD and p.name not in given:
                yield _same(p.name, p.default) if isinstance(p.default, _SIMPLE) else f"{p.name} is default_{p.name}"
        yield from self.structure
        sizes: dict[str, list[str]] = {}
        for index, leaf in enumerate(self.data["leaves"]):
            text = self.spelled[index]
            if "constant" in leaf:
                yield _same(text, decode(leaf["constant"], {}))
                continue
            yield f"isinstance({text}, Tensor)"
            if "dtype" in leaf:
                yield f"{text}.dtype == {_value(decode(leaf['dtype'], {}))} and {text}.dim() == {len(leaf['shape'])}"
            for axis, size in enumerate(leaf.get("shape", ())):
                sizes.setdefault(str(size), []).append(f"{text}.shape[{axis}]")
        for size, places in sizes.items():
            if size.isdigit():
                yield from (f"{place} == {size}" for place in places)
            elif len(places) > 1:
                yield " == ".join(places)
        for condition in self.data["conditions"]:
            only_arithmetic(condition)
            if not re.fullmatch(r"leaves\[\d+\]\.size\(\)\[\d+\] == \d+", condition):  # a fixed size, and said above
                yield re.sub(r"leaves\[(\d+)\]", lambda found: self.spelled[int(found[1])], condition)
        yield from self._surroundings()

    def _surroundings(self) -> Iterator[str]:
        device = f"{self.spelled[self.tensors[0]]}.device.type" if self.tensors else '"cpu"'
        yield f"not torch.is_autocast_enabled({device})"
        inlined = [(_text(attribute(path)), kind) for path, kind in self.data["inlined"]]
        if self.data["mode"] != "both":
            training = "not " if self.data["mode"] == "eval" else ""
            yield from (f"{training}{owner}.training" for owner in ("self", *(owner for owner, _ in inlined)))
        yield from (f"untouched({owner}, {_value(kind)})" for owner, kind in inlined)


def _same(text: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"{text} is {value}"
    return f"type({text}) is {type(value).__name__} and {text} == {_value(value)}"


class _Body:
    """The code, one statement a line; what is read once, by the next statement, is written inside it."""

    def __init__(self, data: Mapping[str, Any], call: _Call) -> None:
        self.data, self.call, self.graph = data, call, decode_graph(data["graph"])
        self.pending: dict[fx.Node, Code] = {}
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = TAKEN | {p.name for p in call.parameters} | {*SEMANTIC_NAMES, *_KNOWN, *size_functions}

    def lines(self) -> list[str]:
        lines, leaves = list[str](), 0
        calls = [node for node in self.graph.nodes if node.op in ("call_function", "call_module") and not _is_size(node)]
        following = dict(zip(calls, [*calls[1:], self.graph.output_node()], strict=True))
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = self.call.spelled[leaves]
                leaves += 1
            elif node in following:
                value = self.value(node)
                lines += self.flushed()
                short = value.cost < MOST and len(_text(value)) <= LONGEST
                if list(node.users) == [following[node]] and short:
                    self.pending[node] = value
                else:
                    lines += self.statement(node, value)
        results: Any = self.graph.output_node().args[0]
        if any(node not in results for node in self.pending):
            lines += self.flushed()
        returned = self.returned(self.data["returned"], iter(results))
        return [*lines, *wrapped(f"return {_text(returned)}", 4)]

    def statement(self, node: fx.Node, value: Code) -> list[str]:
        stem = role(node) or (node.name if node.op == "call_module" else target_name(node).rpartition(".")[2])
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in self.taken)
        self.taken.add(name)
        self.names[node] = name
        return wrapped(f"{name} = {_text(value)}" if node.users else _text(value), 4)

    def flushed(self) -> list[str]:
        pending, self.pending = self.pending, {}
        return [line for node, value in pending.items() for line in self.statement(node, value)]

    def value(self, node: fx.Node) -> Code:
        if node.op == "call_module":
            return code(attribute(str(node.target)), "(", *listed(map(self, node.args)), ")")
        target: Any = node.target
        ours = isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")
        if ours and not (
            target.namespace == "tautomer" and target._schema.name.split("::")[1].partition(".")[0] in SEMANTIC_NAMES
        ):
            named = {name: self(value) for name, value in node.kwargs.items() if name.isidentifier()}
            return call(plain(f"torch.ops.{target}"), *map(self, node.args), **named)
        return express(node, self)

    def __call__(self, x: Any, role: str = "value") -> Code:
        if isinstance(x, (list, tuple)):
            return tuple_of([self(y, role) for y in x])
        if not isinstance(x, fx.Node):
            return literal(x, role)
        if x in self.pending:
            return self.pending.pop(x)
        if x.op == "get_attr":
            return attribute(str(x.target))
        if _is_size(x):
            shape = x.target is torch.ops.aten.sym_size.int
            return code(within(self(x.args[0]), ATOM), ".shape[", self(x.args[1]), "]", cost=0) if shape else express(x, self)
        return plain(self.names[x])

    def device(self, node: fx.Node) -> Code:
        tensors = self.call.tensors
        if not tensors:
            raise TypeError("a device that no argument tells")
        return plain(f"{self.call.spelled[tensors[0]]}.device")

    def returned(self, tree: Any, results: Iterator[Any]) -> Code:
        if tree is None:
            return self(next(results))
        ((kind, children),) = tree.items()
        if kind == "dict":
            pairs: list[Piece] = [code(literal(name, "key"), ": ", self.returned(child, results)) for name, child in children]
            return code("{", *listed(pairs), "}")
        inner = [self.returned(child, results) for child in children]
        return tuple_of(inner) if kind == "tuple" else code("[", *listed(inner), "]")


def _is_size(node: fx.Node) -> bool:
    """Whether a call computes with sizes alone: it is spelled where it is read."""
    if node.target is torch.ops.aten.sym_size.int:
        return True
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
        return False
    return all(x.op == "get_attr" or _is_size(x) for x in node.all_input_nodes)
