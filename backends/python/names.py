"""Names for the values of a function: by what reads them, by what made them, and ``x`` for what simply flows."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import Tensor, fx

from tautomer.rewrite.program import arguments
from tautomer.rewrite.shapes import key, static

from .function import Functions
from .pieces import Code
from .statements import Function, Loop, Statement

TAKEN = {*keyword.kwlist, *dir(builtins), "self", "torch", "nn", "F", "Tensor", "math", "Path"}

_READERS: dict[str, dict[str, str]] = {
    "scaled_dot_product_attention": {"query": "q", "key": "k", "value": "v", "attn_mask": "mask"},
    "glu": {"gate": "gate", "up": "up"},
    "rotary": {"cos": "cos", "sin": "sin"},
    "masked_fill": {"mask": "mask"},
    "where": {"condition": "mask"},
    "embedding": {"indices": "ids"},
}
_MAKERS = {
    "scaled_dot_product_attention": "attention", "softmax": "weights", "cos": "cos", "sin": "sin", "arange": "positions",
    "mean": "mean", "var": "variance", "rsqrt": "scale", "cumsum": "total", "topk": "top", "argmax": "best",
}  # fmt: skip
_THROUGH = {
    "transpose",
    "reshape",
    "view",
    "unsqueeze",
    "expand",
    "contiguous",
    "rotary",
    "permute",
    "rms_norm",
    "to",
    "repeat_interleave",
}


def _op(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.split("::")[1].partition(".")[0]


def role(node: fx.Node, depth: int = 6) -> str | None:
    """What the readers of a value call it: ``q`` for the query of attention, also behind views."""
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            continue
        names = _READERS.get(_op(user), {})
        for argument, operand in arguments(user).items():
            if operand is node and argument in names:
                return names[argument]
    for user in node.users:
        if depth and _op(user) in _THROUGH and user.args and user.args[0] is node:
            found = role(user, depth - 1)
            if found is not None:
                return found
    return None


def _source(node: fx.Node) -> fx.Node:
    """What a value is a view of."""
    while _op(node) in ("unsqueeze", "expand", "transpose", "reshape", "contiguous", "slice") and isinstance(
        node.args[0], fx.Node
    ):
        node = node.args[0]
    return node


def size_names(functions: Functions, inputs: Mapping[fx.Node, str]) -> dict[Hashable, str]:
    """A name for every free size: where it is first met among the inputs."""
    found: dict[Hashable, str] = {}
    kinds = {1: ("batch",), 2: ("batch", "length"), 3: ("batch", "length", "width"), 4: ("batch", "channels", "height", "width")}
    for node, name in inputs.items():
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else ()
        for axis, size in enumerate(shape):
            if static(size) is not None or key(size) in found:
                continue
            flat = len(shape) == 4 and static(shape[-1]) is not None
            kind = ("batch", "heads", "length") if flat else kinds.get(len(shape), ())
            wanted = kind[axis] if axis < len(kind) else f"size_{axis}"
            if wanted in found.values():
                wanted = f"{re.sub(r'_(ids|values|features)$', '', name)}_{wanted}"
            found[key(size)] = wanted
    return found


class Names:
    """The names of the values of one function."""

    def __init__(
        self, function: Function, given: Mapping[fx.Node, str], sizes: Mapping[Hashable, str], reserved: set[str]
    ) -> None:
        self.function, self.given, self.sizes = function, given, sizes
        self.reserved = TAKEN | reserved
        self.names: dict[Hashable, str] = {}
        self.copies: dict[int, list[tuple[str, Hashable]]] = {}
        self._assign()

    def __getitem__(self, value: Hashable) -> str:
        return self.names[value]

    def _assign(self) -> None:
        steps = list(self._steps())
        last: dict[Hashable, int] = {}
        for position, (_, statement) in enumerate(steps):
            for v in statement.value.variables:
                last[v.value] = position
        ends = {id(part): max(i for i, (p, _) in enumerate(steps) if p is part) for part, _ in steps if part is not None}
        starts = {id(part): min(i for i, (p, _) in enumerate(steps) if p is part) for part, _ in steps if part is not None}
        born = {t: i for i, (_, statement) in enumerate(steps) for t in statement.targets if t is not None}
        results = {new: old for part, _ in steps if part is not None for old, new in part.carried}
        for part, statement in steps:
            if part is None:
                continue
            inner = {old for old, _ in part.carried}
            for v in statement.value.variables:
                if v.value not in inner and not (starts[id(part)] <= born.get(v.value, -1)):
                    last[v.value] = max(last[v.value], ends[id(part)])
            for _, new in part.carried:
                last[new] = max(last.get(new, 0), ends[id(part)])
        used = [v.value for v in self.function.result.variables] if self.function.result is not None else self.function.kept
        last.update(dict.fromkeys(used, len(steps)))
        for node in self.function.inputs:
            self.names[node] = self.given[node] if node in self.given else self._fresh(node, self.names.values(), True)
        self.last = last
        for position, (part, statement) in enumerate(steps):
            for target in statement.targets:
                if target is None:
                    continue
                alive = [self.names[v] for v in self.names if last.get(v, -1) > position]
                alive += [self.names[t] for t in statement.targets if t in self.names]
                if target in results:
                    old = results[target]
                    start = starts[id(part)]
                    foreign = not self.names[old].isidentifier()
                    if (
                        foreign
                        or last.get(old, -1) > ends[id(part)]
                        or self.names[old] in [self.names[v] for v in self.names if v != old and v in last and last[v] > position]
                    ):
                        copied = self._fresh(target, [self.names[v] for v in self.names if last.get(v, -1) >= start], False)
                        self.copies.setdefault(id(part), []).append((copied, old))
                        self.names[target] = copied
                    else:
                        self.names[target] = self.names[old]
                    continue
                self.names[target] = self._fresh(target, alive, False, statement.value)

    def _steps(self) -> Iterator[tuple[Loop | None, Statement]]:
        for part in self.function.body:
            if isinstance(part, Loop):
                yield from ((part, statement) for statement in part.body)
            else:
                yield None, part

    def _fresh(self, value: Hashable, alive: object, given: bool, text: Code | None = None) -> str:
        taken = {*alive, *self.reserved}  # type: ignore[misc]
        for name in self._wanted(value, given, text):
            if name not in taken:
                return name
        raise AssertionError("names are endless")

    def _wanted(self, value: Hashable, given: bool, text: Code | None) -> Iterator[str]:
        stem = "value"
        if isinstance(value, tuple) and value and value[0] == "size":
            stem = self.sizes.get(value[1], "size")
            yield stem
        elif isinstance(value, fx.Node):
            shown = value.meta.get("val")
            found = role(value)
            if found is None and value.op == "get_attr":
                found = str(value.target).rpartition(".")[2]
            if found is None and given and _op(value) in ("cos", "sin"):
                found = _op(value)
            made = _MAKERS.get(_op(_source(value)))
            if made is not None and (not given or made == "positions"):
                found = made if found in (None, "ids") else found
            source = _source(value)
            if source.op == "get_attr" and not given and found in (None, "ids"):
                found = str(source.target).rpartition(".")[2]
            if found is None and isinstance(shown, Tensor):
                if shown.dtype == torch.bool:
                    found = "mask"
                elif not shown.is_floating_point():
                    found = "index"
            if found is None and isinstance(shown, (int, torch.SymInt)):
                found = self.sizes.get(key(shown), "size")
            if found is not None:
                yield found
                stem = found
            else:
                yield "x"
                attribute = _attribute(text)
                if attribute is not None:
                    yield attribute
                yield from ("y", "z", "hidden")
                stem = attribute or "hidden"
        number = 2
        while True:
            yield f"{stem}_{number}"
            number += 1


def _attribute(text: Code | None) -> str | None:
    """``gate`` for ``self.gate_proj(x)``: the module whose call a text is."""
    start = str(text.parts[0]) if text is not None and text.parts else ""
    found = re.match(r"self\.(?:\w+(?:\[\d+\])?\.)*([a-zA-Z]\w*)\(", start)
    if found is None:
        return None
    name = re.sub(r"(_proj|_layer|_module|\d+)$", "", found[1].lower())
    dull = name in ("linear", "conv", "fc", "dense", "proj", "out") or hasattr(Tensor, name)
    return name if name.isidentifier() and len(name) > 1 and not keyword.iskeyword(name) and not dull else None
