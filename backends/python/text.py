"""The text of the written module: imports, semantic ops, classes, how it is loaded."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from tautomer.rewrite.program import Program
from tautomer.rewrite.shapes import key, static

from .called import Called, record_lines
from .classes import Class, Classes, numbers_of, type_of
from .names import Names
from .ops import SEMANTIC_NAMES
from .pieces import WIDTH, Code, Instance, Number, Option, Var, wrapped
from .statements import LOOP, Function, Loop, Statement


class Text:
    """The classes of a model as lines of Python.

    Args:
        sizes: the names of the free sizes.
        called: how the whole model is called.
    """

    def __init__(self, classes: Classes, sizes: Mapping[Hashable, str], called: Called) -> None:
        self.classes, self.sizes, self.called = classes, sizes, called
        self.guards = called.guards()
        self.by_number = {c.number: c for c in classes}
        self.reserved = {c.name for c in classes} | set(SEMANTIC_NAMES)

    def lines(self, cls: Class) -> list[str]:
        slots = iter([cls.slots.get(index) for index in range(len(cls.numbers[0]))])
        names = self._names(cls)
        made = [self._text(text, None, slots) for text in cls.made]
        lines = [f"class {cls.name}({cls.base}):", *self._doc(cls)]
        lines += [f"    {name}: Tensor" for name in _buffers(made)]
        if _buffers(made):
            lines.append("")
        types = {name: "float" if any(isinstance(v, float) for v in values) else "int" for name, values in cls.arguments}
        if made or cls.arguments:
            head = ", ".join(["self", *(f"{name}: {kind}" for name, kind in types.items())])
            lines += wrapped(f"def __init__({head}) -> None:", 4)
            start = made.pop(0) if made and made[0].startswith("super()") else "super().__init__()"
            first = sum(len(numbers_of(text)) for text in cls.made)
            kept = dict.fromkeys(name for index, name in cls.slots.items() if index >= first)
            lines += wrapped_all([start, *(f"self.{name} = {name}" for name in kept), *made], 8)
        if cls.path == "" and cls.function is None and self.guards:
            (name, *_) = self.called.given.values()
            lines += [
                "",
                *wrapped(self.called.head(), 4),
                *wrapped_all(self.guards, 8),
                f"        return super().forward({name})",
            ]
        if cls.function is not None:
            lines += (
                ["", *self._forward(cls, cls.function, names, slots)]
                if lines[-1]
                else self._forward(cls, cls.function, names, slots)
            )
        return lines

    # -- parts ------------------------------------------------------------------------------------------------

    def _names(self, cls: Class) -> Names | None:
        if cls.function is None:
            return None
        reserved = self.reserved | {name for name, _ in cls.arguments}
        return Names(cls.function, self.called.given if cls.path == "" else {}, self.sizes, reserved)

    def _text(self, text: Code, names: Names | None, slots: Iterator[str | None], loop: str = "") -> str:
        shown = list[str]()
        for part in text.parts:
            if isinstance(part, Instance):
                inner = self.by_number[part.number]
                chosen = dict[str, str]()
                for column, x in enumerate(part.numbers):
                    argument = x if isinstance(x, str) else next(slots) or repr(x.value)
                    if column in inner.slots:
                        chosen.setdefault(inner.slots[column], argument)
                shown.append(f"{inner.name}({', '.join(chosen[name] for name, _ in inner.arguments)})")
            elif isinstance(part, Option):
                slot = part.number if isinstance(part.number, str) else next(slots)
                value = slot if slot is not None or isinstance(part.number, str) else repr(part.number.value)
                shown.append("" if value == str(part.default) else f", {part.name}={value}")
            elif isinstance(part, Number):
                name = next(slots)
                shown.append(repr(part.value) if name is None else name if names is None else f"self.{name}")
            elif isinstance(part, Var):
                assert names is not None
                shown.append(loop if part == LOOP else names[part.value])
            else:
                shown.append(part)
        return "".join(shown)

    def _doc(self, cls: Class) -> list[str]:
        if cls.path == "":
            return [f'    """The model: ``model({", ".join(self.called.parameters)})``."""', ""]
        if cls.function is None:
            return [f'    """The weights of ``{cls.path}``, read by the module around it."""', ""]
        many = len(cls.numbers)
        where, times = _general(self.classes.paths(cls)), f", {many} of them" if many > 1 else ""
        return [f'    """``{where}``{times}."""', ""]

    def _forward(self, cls: Class, function: Function, names: Names | None, slots: Iterator[str | None]) -> list[str]:
        assert names is not None
        if cls.path == "":
            lines = wrapped(self.called.head(), 4)
            body = [*wrapped_all(self.guards, 8), *self._body(function, names, slots)]
            final = self._result(function, names)
            found = re.fullmatch(r"        (\w+) = (.*)", body[-1]) if body else None
            if found and len(re.findall(rf"\b{found[1]}\b(?!=)", final)) == 1 and len(final) + len(found[2]) < WIDTH - 12:
                body.pop()
                final = re.sub(rf"\b{found[1]}\b(?!=)", lambda _: found[2], final)
            return lines + body + wrapped(final, 8)
        args = ", ".join(["self", *(f"{names[x]}: {type_of(x)}" for x in function.inputs)])
        outputs = [type_of(x) for x in function.outputs]
        kind = "None" if not outputs else outputs[0] if len(outputs) == 1 else f"tuple[{', '.join(outputs)}]"
        lines = wrapped(f"def forward({args}) -> {kind}:", 4)
        shapes = self._shapes(cls, function, names)
        lines += [f'        """{shapes}"""'] if shapes and len(shapes) < WIDTH - 14 else []
        lines += self._body(function, names, slots)
        if function.result is not None:
            lines += wrapped(f"return {self._text(function.result, names, slots)}", 8)
        return lines

    def _result(self, function: Function, names: Names) -> str:
        shown = {**names.names, **_last(function, names)}

        def value(x: Any) -> str:
            if not isinstance(x, fx.Node):
                return repr(x)
            return shown.get(x) or self.called.given.get(x) or self.called.size(x)

        return f"return {self.called.returned(value)}"

    def _shapes(self, cls: Class, function: Function, names: Names) -> str:
        if cls.arguments:
            return ""
        given = [self._shape(x) for x in function.inputs if isinstance(x.meta.get("val"), Tensor)]
        made = [self._shape(x) for x in function.outputs if isinstance(x.meta.get("val"), Tensor)]
        if not given or not made or None in given or None in made:
            return ""
        shown = (
            [f"{names[x]}: {s}" for x, s in zip(function.inputs, given, strict=False)]
            if len(given) == len(function.inputs)
            else []
        )
        return f"{', '.join(shown)} → {', '.join(map(str, made))}" if shown else ""

    def _shape(self, node: fx.Node) -> str | None:
        sizes = list[str]()
        for size in node.meta["val"].shape:
            fixed = static(size)
            name = str(fixed) if fixed is not None else self.sizes.get(key(size))
            if name is None:
                return None
            sizes.append(name)
        return f"[{', '.join(sizes)}]"

    def _body(self, function: Function, names: Names, slots: Iterator[str | None]) -> list[str]:
        lines = list[str]()
        for part in function.body:
            if isinstance(part, Loop):
                for copied, old in names.copies.get(id(part), ()):
                    lines.append(f"        {copied} = {names[old]}")
                variable = _loop_name(part.path, {*names.names.values(), *self.reserved})
                span = "" if part.whole else f"[{part.start or ''}:{part.stop}]"
                owner = "self" + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in part.path.split(".") if p)
                lines.append(f"        for {variable} in {owner}{span}:")
                for statement in part.body:
                    lines += wrapped(self._statement(statement, names, slots, variable), 12)
            else:
                lines += wrapped(self._statement(part, names, slots), 8)
        return lines

    def _statement(self, statement: Statement, names: Names, slots: Iterator[str | None], loop: str = "") -> str:
        value = self._text(statement.value, names, slots, loop)
        if not statement.targets:
            return value
        targets = ", ".join("_" if t is None else names[t] for t in statement.targets)
        return f"{targets}{',' if statement.spread and len(statement.targets) == 1 else ''} = {value}"


def _last(function: Function, names: Names) -> dict[Hashable, str]:
    """The names of the values that a loop leaves behind."""
    return {
        value: names[kept]
        for part in function.body
        if isinstance(part, Loop)
        for value, kept in part.last.items()
        if kept in names.names
    }


def _buffers(made: Iterable[str]) -> list[str]:
    return [found[1] for line in made if (found := re.match(r'self\.register_buffer\("(\w+)"', line))]


def _loop_name(path: str, taken: set[str]) -> str:
    last = [p for p in path.split(".") if p and not p.isdigit()][-1:] or ["module"]
    singular = {"layers": "layer", "blocks": "block", "h": "block", "stages": "stage", "encoder": "layer", "features": "feature"}
    name = singular.get(last[0], last[0].removesuffix("s") if last[0].endswith("s") else last[0])
    while name in taken or not name.isidentifier():
        name = "block" if name != "block" and "block" not in taken else f"{name}_"
    return name


def _general(paths: list[str]) -> str:
    """``h.*.attn`` for ``h.0.attn`` and ``h.1.attn``."""
    parts = [path.split(".") for path in paths]
    if len({len(p) for p in parts}) > 1:
        return f"{paths[0]}``, ``{paths[1]}" + ("``, ``…" if len(paths) > 2 else "")
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))


def wrapped_all(lines: Iterable[str], indent: int) -> list[str]:
    return [line for text in lines for line in wrapped(text, indent)]


def semantic(used: Iterable[str]) -> list[str]:
    """The functions of the semantic ops that a text uses, as their library has them, and those that they call."""
    lines = list[str]()
    for source in dict.fromkeys(source for name in used for source in SEMANTIC_NAMES[name].sources):
        lines += ["", ""]
        for line in source.rstrip().splitlines():
            indent = " " * (len(line) - len(line.lstrip()))
            lines += textwrap.wrap(line, WIDTH, subsequent_indent=indent) if len(line) > WIDTH else [line]
    return lines


# -- the file ----------------------------------------------------------------------------------------------------

WEIGHTS, CONSTANTS = "weights.safetensors", "constants.safetensors"
_MODES = {
    "both": "train() and eval() as usual.",
    "eval": "Eval mode, whatever train() says.",
    "train": "Train mode, whatever eval() says.",
}


def file_text(text: Text, program: Program, training: bool, rewrites: Sequence[str]) -> str:
    """The whole of ``model.py``; ``training`` is the mode that the model is loaded in."""
    classes, called = text.classes, text.called
    code = "\n".join(line for cls in classes for line in ["", "", *text.lines(cls)])
    functions = semantic(name for name in SEMANTIC_NAMES if re.search(rf"(?<![.\w]){name}\(", code))
    name = next(cls.name for cls in classes if cls.path == "")
    constants = any(not weight.persistent for weight in classes.weights.values())
    whole = "\n".join([*functions, code])
    imports = ["from __future__ import annotations", ""]
    imports += ["import math"] if re.search(r"\bmath\.", whole) else []
    imports += ["from collections.abc import Sequence"] if "Sequence[" in whole else []
    imports += ["from pathlib import Path"]
    imports += ["from typing import NamedTuple"] if called.records else []
    imports += ["", "import torch"] if re.search(r"\btorch\.", whole) else [""]
    imports += [f"from safetensors.torch import {'load_file, ' if constants else ''}load_model", "from torch import Tensor, nn"]
    imports += ["from torch.nn import functional as F"] if re.search(r"\bF\.", whole) else []
    lines = [*_doc(name, called, program, rewrites), "", *imports, "", "HERE = Path(__file__).parent", *functions]
    for record in called.records.values():
        lines += record_lines(record)
    return "\n".join([*lines, code, *_load(name, training, constants), ""])


def _doc(name: str, called: Called, program: Program, rewrites: Sequence[str]) -> list[str]:
    lines = [f'"""{name}.', "", "Inputs:", *(f"    {line}" for line in called.shapes()), ""]
    lines += textwrap.wrap(" ".join([_MODES[program.mode], *dict.fromkeys(called.notes)]), WIDTH)
    if rewrites:
        lines += ["", "Rewritten by tautomer from the original model, each step checked:"]
        lines += [x for line in rewrites for x in textwrap.wrap(line, WIDTH, initial_indent="    ", subsequent_indent="        ")]
    return [line.replace("\\", "/").rstrip() for line in [*lines, '"""']]


def _load(name: str, training: bool, constants: bool) -> list[str]:
    lines = [
        "",
        "",
        f"def load(folder: Path = HERE) -> {name}:",
        '    """The model with its weights."""',
        f"    model = {name}()",
    ]
    lines += [f'    load_model(model, folder / "{WEIGHTS}")']
    if constants:
        lines += [f'    for name, value in load_file(folder / "{CONSTANTS}").items():']
        lines += ["        model.get_buffer(name).copy_(value)"]
    return [*lines, "    return model" if training else "    return model.eval()"]
