"""How the written model is called: the user's names, dicts and tuples; classes of others become named tuples.

A dataclass or an output of Hugging Face is a ``NamedTuple`` of the same fields, any other class of the pytree registry (a
cache of keys and values) a tuple of its tensors.
"""

from __future__ import annotations

import ast
import re
from collections import OrderedDict, namedtuple
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from tautomer.rewrite.errors import ExportError
from tautomer.rewrite.program import Program
from tautomer.rewrite.shapes import key, static

from ..spec_data import Plain, plain
from .pieces import WIDTH


@dataclass
class Record:
    """A named tuple of the file."""

    name: str
    fields: dict[str, str] = field(default_factory=dict)


class Called:
    """The call of a program as text.

    Attributes:
        given: how each flat input is spelled inside ``forward``.
        records: the named tuples it takes and returns.
        notes: sentences for the docstring.
        sizes: the names of the free sizes.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sizes: Mapping[Hashable, str] = {}
        self.records: dict[str, Record] = {}
        self.notes = list[str]()
        self.placeholders = program.placeholders
        self.given: dict[fx.Node, str] = {}
        self.parameters: dict[str, str] = {}
        self._inputs()
        out = plain(program.signature.out_spec)
        self.leaves = list(program.output.args[0])  # type: ignore[arg-type]
        self.output_type = self._type(out, iter([_kind(x) for x in self.leaves]))
        self.spec = out

    # -- inputs -----------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        signature = self.program.signature
        positional, keywords = plain(signature.in_spec)[2]  # type: ignore[index]
        names = [x.name for x in signature.arguments if not x.keyword_only]
        named = {x.name for x in signature.arguments}
        trees = [(names[i] if i < len(names) else f"argument_{i}", tree) for i, tree in enumerate(positional[2])]
        trees += list(zip(keywords[1], keywords[2], strict=True))
        position, dropped = 0, list[str]()
        for name, tree in trees:
            count = _count(tree)
            nodes = self.placeholders[position : position + count]
            constants = [signature.constants.get(i) for i in range(position, position + count) if i in signature.constants]
            position += count
            if len(constants) == count:
                value = constants[0] if tree is None else ...
                if value is not None and value is not ... and name in named:
                    dropped.append(f"{name}={value!r}")
                continue
            for node, text in zip(nodes, self._accesses(tree, name), strict=True):
                self.given[node] = text
            kinds = iter([_kind(node) for node in nodes])
            self.parameters[name] = self._type(tree, kinds)
        for node in self.placeholders:
            self.given.setdefault(node, "None")
        if dropped:
            self.notes.append(f"Captured with {', '.join(dropped)}.")

    def _accesses(self, tree: Plain, text: str) -> Iterator[str]:
        """How the leaves of a tree are read."""
        if tree is None:
            yield text
            return
        for child, (name, by) in zip(tree[2], _members(tree), strict=True):
            yield from self._accesses(child, f"{text}.{name}" if by == "field" else f"{text}[{_quoted(name)}]")

    def _type(self, tree: Plain, kinds: Iterator[str]) -> str:
        """The annotation of a tree; the named tuples in it are noted."""
        if tree is None:
            return next(kinds)
        inner = [self._type(child, kinds) for child in tree[2]]
        if tree[0] is type(None):
            return "None"
        members = _members(tree)
        if members and members[0][1] == "field":
            name = _record(tree)
            self.records[name] = Record(name, {str(m): kind for (m, _), kind in zip(members, inner, strict=True)})
            return name
        if tree[0] in (dict, OrderedDict):
            return f"dict[str, {_one(inner)}]"
        if tree[0] is list:
            return f"list[{_one(inner)}]"
        if tree[0] is not tuple:
            self.notes.append(f"A {tree[0].__name__} is the tuple of its tensors.")
            return "tuple[Tensor, ...]"
        return f"tuple[{', '.join(inner)}]" if len(inner) < 5 and inner else f"tuple[{_one(inner)}, ...]"

    def head(self) -> str:
        """``def forward(…)``"""
        keyword_only = {x.name for x in self.program.signature.arguments if x.keyword_only}
        shown, starred = ["self"], False
        for name, kind in sorted(self.parameters.items(), key=lambda x: x[0] in keyword_only):
            if name in keyword_only and not starred:
                shown.append("*")
                starred = True
            shown.append(f"{name}: {kind}")
        return f"def forward({', '.join(shown)}) -> {self.output_type}:"

    def shapes(self) -> list[str]:
        """One line per tensor input: its name and shape."""
        lines = list[str]()
        for node, text in self.given.items():
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                sizes = [str(static(s)) if static(s) is not None else self.sizes.get(key(s), "…") for s in value.shape]
                lines.append(f"{text}: [{', '.join(sizes)}]")
        return lines

    def guards(self) -> list[str]:
        """Statements that refuse the sizes that the model was not captured for."""
        found, fixed = list[str](), dict[int, dict[int, int]]()
        for condition in _needed(self.program.signature.conditions):
            single = re.fullmatch(r"leaves\[(\d+)\]\.size\(\)\[(\d+)\] == (\d+)", condition)
            if single:
                fixed.setdefault(int(single[1]), {})[int(single[2])] = int(single[3])
                continue
            text = re.sub(r"leaves\[(\d+)\]", lambda m: self.given[self.placeholders[int(m[1])]], condition)
            text = re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", text)
            if re.search(r"\b(?!max|min)\w+\(|\.(?!shape\b)\w+\(", text):
                self.notes.append(f"Only for sizes with {self.program.signature.describe(condition)}.")
                continue
            text = ast.unparse(ast.parse(text, mode="eval")).replace("'", '"')
            said = f"{_inside(text)} must hold" if len(text) < 80 else "the model was not captured for these sizes"
            found.extend([f"if {_opposite(text)}:", f'    raise ValueError("{said}")'])
        for index, node in enumerate(self.placeholders):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not node.users:
                continue
            axes = {i: size for i, s in enumerate(value.shape) if (size := static(s)) is not None} | fixed.get(index, {})
            if not axes:
                continue
            text, rank, last = self.given[node], value.dim(), sorted(axes)
            if last == list(range(last[0], rank)) and rank - last[0] > 1:
                start = "" if last[0] == 0 else f"[{last[0]}:]"
                wrong = f"{text}.shape{start} != ({', '.join(str(axes[i]) for i in last)})"
            else:
                wrong = " or ".join(f"{text}.shape[{axis}] != {axes[axis]}" for axis in last)
            shape = ", ".join(str(axes[i]) if i in axes else self.sizes.get(key(s), "*") for i, s in enumerate(value.shape))
            found.extend([f"if {wrong}:", f'    raise ValueError("{_inside(text)} must have shape [{shape}]")'])
        return found

    # -- output -----------------------------------------------------------------------------------------------

    def returned(self, value: Any) -> str:
        """The expression that is returned; ``value`` gives the text of a leaf."""
        return self._built(self.spec, iter([value(x) for x in self.leaves]), True)

    def size(self, node: fx.Node) -> str:
        """How a size that is returned is read off an input.

        Raises:
            ExportError: it is no size of an input.
        """
        value: Any = node.meta.get("val")
        if (fixed := static(value)) is not None:
            return repr(fixed)
        for given in self.placeholders:
            shape = given.meta["val"].shape if isinstance(given.meta.get("val"), Tensor) else ()
            for axis, size in enumerate(shape):
                if key(size) == key(value):
                    return f"{self.given[given]}.shape[{axis}]"
        raise ExportError(
            f"{self.program.name} returns the size {value}, which is computed from others and has no Python text",
            hint="return the tensor, and take the size of that",
        )

    def _built(self, tree: Plain, leaves: Iterator[str], top: bool = False) -> str:
        if tree is None:
            return next(leaves)
        if tree[0] is type(None):
            return "None"
        inner = [self._built(child, leaves) for child in tree[2]]
        members = _members(tree)
        if members and members[0][1] == "field":
            return f"{_record(tree)}({', '.join(f'{name}={text}' for (name, _), text in zip(members, inner, strict=True))})"
        if tree[0] in (dict, OrderedDict):
            return "{" + ", ".join(f"{_quoted(name)}: {text}" for (name, _), text in zip(members, inner, strict=True)) + "}"
        if tree[0] is list:
            return f"[{', '.join(inner)}]"
        shown = ", ".join(inner) + ("," if len(inner) == 1 else "")
        return shown if top and inner else f"({shown})"

    # -- for the check ----------------------------------------------------------------------------------------

    def call_text(self) -> str:
        """The keyword arguments of a call whose flat inputs are ``inputs[i]``."""
        signature = self.program.signature
        positional, keywords = plain(signature.in_spec)[2]  # type: ignore[index]
        names = [x.name for x in signature.arguments if not x.keyword_only]
        trees = [(names[i] if i < len(names) else f"argument_{i}", tree) for i, tree in enumerate(positional[2])]
        trees += list(zip(keywords[1], keywords[2], strict=True))
        position, shown = 0, list[str]()
        for name, tree in trees:
            count = _count(tree)
            leaves = iter([f"inputs[{i}]" for i in range(position, position + count)])
            position += count
            text = self._built(tree, leaves)
            if name in self.parameters:
                ours = re.sub(r"(?<![.\w])([A-Z]\w*)\(", r"model.\1(", text)
                shown.append(f"{name}={ours}")
        return ", ".join(shown)

    def result_texts(self) -> list[str]:
        """How the flat outputs are read from what a call returns."""
        return list(self._accesses(self.spec, "result"))


_SIZE = re.compile(r"leaves\[\d+\]\.size\(\)\[\d+\]")


def _needed(conditions: tuple[str, ...]) -> list[str]:
    """The conditions without those that always hold, given that sizes are equal which another condition wants equal."""
    equal = dict[str, str]()
    for condition in conditions:
        left, _, right = condition.partition(" == ")
        if _SIZE.fullmatch(left) and _SIZE.fullmatch(right):
            equal[left] = equal.get(right, right)
    found = list[str]()
    for condition in conditions:
        text = _SIZE.sub(lambda m: equal.get(m[0], m[0]), condition)
        names = list(dict.fromkeys(_SIZE.findall(text)))
        of_one = _SIZE.sub("size", text)
        defines = _SIZE.fullmatch(condition.partition(" == ")[0]) is not None
        known = len(names) == 1 and re.fullmatch(r"[\w\s(),*+/%=<>-]+", of_one) is not None
        if defines or not known or not _always(of_one):
            found.append(condition)
    return found


def _always(text: str) -> bool:
    """Whether a condition on one size holds at all of its first values."""
    return all(bool(eval(text, {"size": size, "min": min, "max": max, "__builtins__": {}})) for size in range(1, 200))


def _members(tree: Plain) -> list[tuple[Any, str]]:
    """The names of the children of a tree, and whether they are fields or keys."""
    assert tree is not None
    kind, context, children = tree
    if kind in (dict, OrderedDict):
        return [(name, "key") for name in context]
    if kind is namedtuple:
        return [(name, "field") for name in context._fields]
    if kind not in (list, tuple) and isinstance(context, list):
        names = context[0] if context and isinstance(context[0], list) else context
        if len(names) == len(children) and all(isinstance(name, str) and name.isidentifier() for name in names):
            return [(name, "field") for name in names]
    return [(index, "index") for index in range(len(children))]


def _record(tree: Plain) -> str:
    assert tree is not None
    cls = tree[1] if tree[0] is namedtuple else tree[0]
    return str(cls.__name__)


def _count(tree: Plain) -> int:
    return 1 if tree is None else sum(map(_count, tree[2]))


def _kind(x: Any) -> str:
    if not isinstance(x, fx.Node):
        return "None" if x is None else type(x).__name__
    value = x.meta.get("val")
    if value is None or isinstance(value, Tensor):
        return "Tensor"
    return "bool" if isinstance(value, bool) else "float" if isinstance(value, float) else "int"


def _one(kinds: list[str]) -> str:
    distinct = list(dict.fromkeys(kinds))
    return " | ".join(distinct) if distinct else "Tensor"


def _quoted(name: Any) -> str:
    return f'"{name}"' if isinstance(name, str) else repr(name)


def _inside(text: str) -> str:
    return text.replace('"', "'")


def _opposite(text: str) -> str:
    for sign, other in ((" == ", " != "), (" != ", " == "), (" <= ", " > "), (" >= ", " < "), (" < ", " >= "), (" > ", " <= ")):
        if text.count(sign) == 1 and not re.search(r"\b(and|or|not)\b", text):
            return text.replace(sign, other)
    return f"not ({text})"


def record_lines(record: Record) -> list[str]:
    lines = ["", "", f"class {record.name}(NamedTuple):"]
    lines += [f"    {name}: {kind}" for name, kind in record.fields.items()]
    assert all(len(line) <= WIDTH for line in lines)
    return lines
