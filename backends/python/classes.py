"""The modules of a program as classes: equal ones are one class, numbers that differ are arguments of its constructor."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from .function import Functions
from .names import TAKEN
from .nesting import SEQUENTIAL, Call
from .pieces import Code, Instance, Number, Option, Part, Var, call, code, number, plain, tuple_of
from .statements import Function, Loop, Statement, attribute
from .torch_layers import Layer, activation


@dataclass
class Module:
    """A module of the written model.

    Attributes:
        path: where it is.
        children: its submodules by name.
        calls: the calls of it that have a function.
        layer: what it is, if it is a layer of torch.nn.
    """

    path: str
    children: dict[str, Module] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    layer: Code | None = None
    weights: list[str] = field(default_factory=list)
    code: Code | None = None

    def walk(self) -> Iterator[Module]:
        for child in self.children.values():
            yield from child.walk()
        yield self

    @property
    def numbered(self) -> bool:
        return bool(self.children) and all(name.isdigit() for name in self.children)


@dataclass(frozen=True)
class Weight:
    """A tensor of the written model.

    Attributes:
        tensor: its value, or a tensor of its shape and dtype.
        kind: "parameter", or "buffer".
        persistent: whether it is in the state dict.
    """

    tensor: Tensor
    kind: str
    persistent: bool


@dataclass
class Class:
    """A class of the file: a representative, and the numbers in which its instances differ."""

    number: int
    wanted: str
    path: str
    kind: str
    made: list[Code]
    function: Function | None
    base: str
    numbers: list[tuple[Number, ...]]
    name: str = ""
    arguments: list[tuple[str, tuple[int | float, ...]]] = field(default_factory=list)
    slots: dict[int, str] = field(default_factory=dict)


class Split(Exception):
    """Two calls of one module are not the same function: the module cannot have a class."""

    def __init__(self, path: str) -> None:
        self.path = path


class Classes:
    """The classes of a model, those that others need first."""

    def __init__(
        self,
        functions: Functions,
        weights: Mapping[str, Weight],
        ties: Mapping[str, str],
        training: Mapping[str, bool],
        taken: Iterable[str] = (),
    ) -> None:
        self.functions, self.weights, self.ties = functions, weights, ties
        self.found: dict[Hashable, Class] = {}
        self.instances: dict[str, tuple[Class, int]] = {}
        self.root = self._tree(training)
        for module in self.root.walk():
            module.code = self._module(module)
        self._name(taken)

    def __iter__(self) -> Iterator[Class]:
        return iter(self.found.values())

    # -- the tree ---------------------------------------------------------------------------------------------

    def _tree(self, training: Mapping[str, bool]) -> Module:
        root = Module("")
        for name in self.weights:
            owner = _at(root, name.rpartition(".")[0])
            owner.weights.append(name)
        for node, layer in self.functions.graph.layers.items():
            if node in self.functions.home:
                _at(root, layer.path).layer = layer.made
        for path in training:
            _at(root, path)
        for made in self.functions.root.calls():
            _at(root, made.path).calls.append(made)
        for made in self.functions.root.calls():
            if made.kind == SEQUENTIAL and self.sequential(made) is not None:
                for item in made.items:
                    if isinstance(item, fx.Node) and item not in self.functions.graph.layers:
                        _at(root, _stack_path(item)).layer = activation(item)
        for module in root.walk():
            if module.weights and not module.children and not module.calls and module.layer is None:
                module.layer = self._twin(root, module)
            module.children = (
                dict(sorted(module.children.items(), key=lambda x: int(x[0]))) if module.numbered else module.children
            )
        return root

    def _twin(self, root: Module, module: Module) -> Code | None:
        """The layer that has the same tensors under other names: an embedding that two modules share."""
        for name, first in self.ties.items():
            if first in module.weights:
                other = _find(root, name.rpartition(".")[0])
                pairs = {f"{module.path}.{x.rpartition('.')[2]}": x for x in other.weights}
                if set(pairs) == set(module.weights) and all(self.ties.get(x) == y for y, x in pairs.items()):
                    return other.layer
        return None

    def sequential(self, made: Call) -> list[int] | None:
        return sequential(self.functions.graph.layers, made, self.functions.made)

    # -- what makes a module ----------------------------------------------------------------------------------

    def _module(self, module: Module) -> Code:
        """The text that makes a module."""
        if self._has_class(module):
            return self._class(module)
        if module.layer is not None:
            return module.layer
        return call("nn.Sequential", *self._members(module)) if module.calls else self._list(module)

    def _has_class(self, module: Module) -> bool:
        """Whether a module is of a class of the file: no layer, no plain sequence, no list."""
        if not module.path:
            return True
        if module.calls:
            return module.calls[0].kind != SEQUENTIAL or self.sequential(module.calls[0]) is None
        return module.layer is None and (not module.numbered or bool(module.weights))

    def _members(self, module: Module) -> list[Code]:
        count = max(map(int, module.children), default=-1) + 1
        children = (module.children.get(str(i)) for i in range(count))
        return [plain("nn.Identity()") if child is None or child.code is None else child.code for child in children]

    def _list(self, module: Module) -> Code:
        members = self._members(module)
        first = members[0]
        if all(x == first for x in members):
            return code("nn.ModuleList(", first, " for _ in range(", number(len(members), "depth"), "))")
        if len({_open(x) for x in members}) == 1:
            columns = list(zip(*map(numbers_of, members), strict=True))
            varying = dict.fromkeys(tuple(n.value for n in column) for column in columns if len({n.value for n in column}) > 1)
            roles = [next(c[0].role for c in columns if tuple(n.value for n in c) == values) for values in varying]
            names = dict(zip(varying, _distinct(roles), strict=True))
            shown = iter([names.get(tuple(n.value for n in column), column[0]) for column in columns])
            parts = tuple(_filled(part, shown) for part in first.parts)
            rows = [tuple_of([number(v[i], r) for v, r in zip(varying, roles, strict=True)]) for i in range(len(members))]
            if len(names) == 1:
                rows = [number(next(iter(varying))[i], roles[0]) for i in range(len(members))]
            return code("nn.ModuleList(", Code(parts), f" for {', '.join(names.values())} in ", tuple_of(rows), ")")
        return code("nn.ModuleList([", *[x for y in members for x in (", ", y)][1:], "])")

    def _class(self, module: Module) -> Code:
        functions = [self.functions.made[c] for c in module.calls]
        kind = module.calls[0].kind if module.calls else ""
        base, made = "nn.Module", list[Code]()
        if module.numbered and not module.weights:
            base = "nn.Sequential"
            made.append(call("super().__init__", *self._members(module)))
            if (
                module.calls
                and module.calls[0].kind == SEQUENTIAL
                and self.sequential(module.calls[0]) is not None
                and module.path == ""
            ):
                functions = []
        if base != "nn.Sequential":
            base = "nn.Sequential" if any(name.isdigit() for name in module.children) else base
            made += self._assignments(module)
        made += self._ties(module) + self._frozen(module)
        keys = {(_template(made, function, base)) for function in functions} or {_template(made, None, base)}
        if len(keys) > 1:
            raise Split(module.path)
        if module.path == "":
            keys = {("root",)}
        numbers = tuple(n for text in _texts(made, functions[0] if functions else None) for n in numbers_of(text))
        wanted = _class_name(kind, module.path)
        name = (wanted, *keys)
        found = self.found.get(name)
        if found is None:
            function = functions[0] if functions else None
            found = self.found[name] = Class(len(self.found), wanted, module.path, kind, made, function, base, [])
        found.numbers.append(numbers)
        self.instances[module.path] = found, len(found.numbers) - 1
        return Code((Instance(found.number, numbers),))

    def _assignments(self, module: Module) -> list[Code]:
        made = list[Code]()
        for name in module.weights:
            last = name.rpartition(".")[2]
            made.append(self._weight(last, self.weights[name]))
        for name, child in sorted(module.children.items(), key=lambda x: int(x[0]) if x[0].isdigit() else len(module.children)):
            assert child.code is not None
            if name.isidentifier():
                made.append(code(f"self.{name} = ", child.code))
            else:
                made.append(code(f'self.add_module("{name}", ', child.code, ")"))
        return made

    def _weight(self, last: str, weight: Weight) -> Code:
        tensor = weight.tensor
        dtype = {} if tensor.dtype == torch.float32 else {"dtype": plain(str(tensor.dtype))}
        maker = "torch.empty" if tensor.dim() and tensor.is_floating_point() else "torch.zeros"
        roles = ("width",) if tensor.dim() == 1 else ("rows", "columns") if tensor.dim() == 2 else ("size",) * tensor.dim()
        sizes = [number(int(n), role) for n, role in zip(tensor.shape, roles, strict=True)] or [plain("()")]
        empty = call(maker, *sizes, **dtype)
        if weight.kind == "parameter":
            return code(f"self.{last} = nn.Parameter(", empty, ")")
        persistent = {} if weight.persistent else {"persistent": plain("False")}
        return call("self.register_buffer", plain(f'"{last}"'), empty, **persistent)

    def _ties(self, module: Module) -> list[Code]:
        """The ties whose two names meet in this module."""
        found = list[Code]()
        for name, first in self.ties.items():
            path = _meet(name, first)
            while path and not self._has_class(_find(self.root, path)):
                path = path.rpartition(".")[0]
            if path == module.path:
                prefix = f"{module.path}." if module.path else ""
                found.append(code(attribute(name.removeprefix(prefix)), " = ", attribute(first.removeprefix(prefix)), cost=0))
        return found

    def _frozen(self, module: Module) -> list[Code]:
        """What no gradient is for, said of the whole model: the largest modules, and parameters on their own."""
        if module.path:
            return []
        trains = {n: w.tensor.requires_grad for n, w in self.weights.items() if w.kind == "parameter"}
        frozen = dict[str, str]()
        for name in [n for n, requires in trains.items() if not requires]:
            parts = name.split(".")
            paths = [".".join(parts[:depth]) for depth in range(len(parts))]
            whole = (path for path in paths if not any(trains[n] for n in trains if n.startswith(f"{path}." if path else "")))
            found = next(whole, None)
            frozen[name if found is None else found] = "parameter" if found is None else "submodule"
        if "" in frozen:
            return [plain("self.requires_grad_(False)")]
        return [plain(f'self.get_{kind}("{path}").requires_grad_(False)') for path, kind in frozen.items()]

    # -- names ------------------------------------------------------------------------------------------------

    def paths(self, cls: Class) -> list[str]:
        return [path for path, (found, _) in self.instances.items() if found is cls]

    def _name(self, reserved: Iterable[str]) -> None:
        taken = {"Path", "Tensor", "NamedTuple", *TAKEN, *reserved}
        order = [*[c for c in self if not c.path], *[c for c in self if c.path]]
        for cls in order:
            name = cls.wanted
            others = [c for c in order if c.wanted == cls.wanted and c is not cls]
            if others:
                starts = (
                    f"{part}{cls.wanted}" for part in _different(self.paths(cls), [p for c in others for p in self.paths(c)])
                )
                name = name if name not in taken else next((n for n in starts if n not in taken), name)
            number, stem = 2, name
            while name in taken:
                name, number = f"{stem}{number}", number + 1
            taken.add(name)
            cls.name = name
        for cls in self:
            cls.numbers = [tuple(n) for n in cls.numbers]
            columns = list(zip(*cls.numbers, strict=True))
            vectors: dict[tuple[int | float, ...], str] = {}
            for column in columns:
                values = tuple(n.value for n in column)
                if len(set(values)) > 1:
                    vectors.setdefault(values, column[0].role)
            attributes = {*dir(torch.nn.Module), *re.findall(r"self\.(\w+) = ", " ".join(str(x.parts[0]) for x in cls.made))}
            names = dict(zip(vectors, _distinct(list(vectors.values()), attributes), strict=True))
            cls.arguments = [(name, values) for values, name in names.items()]
            for index, column in enumerate(columns):
                values = tuple(n.value for n in column)
                if values in names:
                    cls.slots[index] = names[values]


def sequential(layers: Mapping[fx.Node, Layer], made: Call, functions: Mapping[Call, Function]) -> list[int] | None:
    """The numbers of the modules that a chain runs, if a call of an ``nn.Sequential`` is one."""
    function = functions[made]
    data = [x for x in function.inputs if x.op != "get_attr"]
    if len(function.inputs) != 1 or len(data) != 1:
        return None
    value: fx.Node = data[0]
    numbers = list[int]()
    for item in made.items:
        if isinstance(item, Call):
            path = item.path
            reads, given = functions[item].inputs, functions[item].outputs
            if len(given) != 1:
                return None
            result = given[0]
        else:
            layer = layers.get(item)
            if layer is None and activation(item) is None:
                return None
            path = layer.path if layer is not None else _stack_path(item)
            reads = [layer.operand] if layer is not None else list(item.all_input_nodes)
            result = item
        prefix = f"{made.path}." if made.path else ""
        last = path.removeprefix(prefix)
        if not path.startswith(prefix) or not last.isdigit() or reads != [value] or (numbers and int(last) <= numbers[-1]):
            return None
        numbers.append(int(last))
        value = result
    return numbers if numbers else None


def _stack_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _at(root: Module, path: str) -> Module:
    module = root
    for part in path.split(".") if path else []:
        inner = f"{module.path}.{part}" if module.path else part
        module = module.children.setdefault(part, Module(inner))
    return module


def _find(root: Module, path: str) -> Module:
    return _at(root, path)


def _meet(a: str, b: str) -> str:
    """The innermost module that two weights are in."""
    common = list[str]()
    for x, y in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if x != y:
            break
        common.append(x)
    while common and common[-1].isdigit():
        common.pop()
    return ".".join(common)


def _different(paths: list[str], others: list[str]) -> Iterator[str]:
    """The parts that all paths have and some others do not, as the start of a class name."""
    for part in paths[0].split("."):
        shared = all(part in path.split(".") for path in paths)
        if shared and not part.isdigit() and any(part not in other.split(".") for other in others):
            yield camel(part)


def camel(text: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[_\W]+", text) if part)


def _class_name(kind: str, path: str) -> str:
    module, _, name = kind.rpartition(".")
    if name in ("", "Sequential", "ModuleList", "GraphModule"):
        last = [p for p in path.split(".") if p and not p.isdigit()][-1:]
        name = camel(last[0]) if last else "Block" if path else "Model"
        return f"{name}Weights" if not kind and path else name
    name = re.sub(r"\W", "", name.rpartition(">")[2] or name)
    if path and module.startswith("torch.nn"):
        return f"Edited{name}" if hasattr(torch.nn, name) and name != "MultiheadAttention" else name
    return name if name.isidentifier() else "Model"


def _distinct(names: list[str], taken: Iterable[str] = ()) -> list[str]:
    found = list[str]()
    for name in names:
        other, count = name, 2
        while other in found or other in taken:
            other, count = f"{name}_{count}", count + 1
        found.append(other)
    return found


# -- templates -------------------------------------------------------------------------------------------------


def _texts(made: list[Code], function: Function | None) -> Iterator[Code]:
    yield from made
    if function is None:
        return
    for part in function.body:
        for statement in part.body if isinstance(part, Loop) else [part]:
            yield statement.value
    if function.result is not None:
        yield function.result


def numbers_of(text: Code) -> list[Number]:
    found = list[Number | str]()
    for part in text.parts:
        if isinstance(part, (Number, Option)):
            found.append(part if isinstance(part, Number) else part.number)
        elif isinstance(part, Instance):
            found.extend(part.numbers)
    return [x for x in found if isinstance(x, Number)]


def _filled(part: Part, shown: Iterator[Number | str]) -> Part:
    """A part with other numbers, or names, in the place of its own."""
    if isinstance(part, Number):
        return next(shown)
    if isinstance(part, Option):
        return replace(part, number=next(shown))
    if isinstance(part, Instance):
        return replace(part, numbers=tuple(next(shown) if isinstance(x, Number) else x for x in part.numbers))
    return part


def _opened(part: Part) -> Hashable:
    if isinstance(part, Number):
        return "#"
    if isinstance(part, Option):
        return "#", part.name
    return (part.number, tuple(x if isinstance(x, str) else "#" for x in part.numbers)) if isinstance(part, Instance) else part


def _open(text: Code) -> tuple[Hashable, ...]:
    return tuple(map(_opened, text.parts))


def _template(made: list[Code], function: Function | None, base: str) -> Hashable:
    """What two modules of one class share."""
    seen: dict[Hashable, int] = {}

    def opened(text: Code) -> Hashable:
        return tuple(
            ("var", seen.setdefault(part.value, len(seen))) if isinstance(part, Var) else _opened(part) for part in text.parts
        )

    def statement(x: Statement) -> Hashable:
        return opened(x.value), x.spread, tuple(None if t is None else seen.setdefault(t, len(seen)) for t in x.targets)

    if function is None:
        return base, tuple(map(opened, made)), None
    head = tuple(seen.setdefault(x, len(seen)) for x in function.inputs)
    types = tuple(type_of(x) for x in function.inputs)
    body = list[Hashable]()
    for part in function.body:
        if isinstance(part, Loop):
            turns = (part.path, part.start, None if part.whole else part.stop)
            body.append((turns, tuple(map(statement, part.body)), tuple((seen.get(a), seen.get(b)) for a, b in part.carried)))
        else:
            body.append(statement(part))
    result = None if function.result is None else opened(function.result)
    return base, tuple(map(opened, made)), head, types, tuple(body), result, len(function.outputs)


def type_of(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return "int"
    if isinstance(value, (float, torch.SymFloat)):
        return "float"
    if isinstance(value, (bool, torch.SymBool)):
        return "bool"
    if isinstance(value, (list, tuple)):
        return "tuple[Tensor, ...]"
    return "Tensor"
