"""The names of an ONNX file's inputs and outputs: the arguments of the user's forward, the fields of what it returns.

A tensor inside an object, such as a cache, is named by its place there, without the list it is in: the second key of
``past_key_values`` is ``past_key_values.1.key``. What comes back as a field ``past…`` is ``present.1.key``: it is fed to
``past_key_values.1.key`` in the next call.
"""

from __future__ import annotations

import dataclasses
import re
from collections import namedtuple
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import onnx_ir
import sympy
import torch
from torch import Tensor

from tautomer.rewrite._torch import pytree
from tautomer.rewrite.signature import Signature, holds


def named(signature: Signature) -> Signature:
    """The signature with a file's names for its leaves: ``batch_x``, ``past_key_values.0.key``."""
    args, kwargs = signature.in_spec.children()
    given = [argument.name for argument in signature.arguments if not argument.keyword_only]
    extra = [f"args_{i}" for i in range(len(given), args.num_children)]
    roots = [*given[: args.num_children], *extra, *map(str, kwargs.context)]
    trees = [*args.children(), *kwargs.children()]
    names = [_join(root, rest) for root, tree in zip(roots, trees, strict=True) for rest in fields(tree)]
    return dataclasses.replace(signature, leaf_names=tuple(map(identifier, names)))


def rename(model: Any, signature: Signature, inputs: Sequence[int], outputs: Sequence[int]) -> list[str]:
    """Name the inputs and outputs of an ``onnx_ir`` model after the leaves of the signature; returns the outputs' names.

    Args:
        signature: as ``named`` gives it.
        inputs, outputs: which leaves of the call and of the output the model has.
    """
    leaves = [name if name and name[0].isalpha() else _join("output", name) for name in fields(signature.out_spec)]
    leaves = [_PAST.sub("present", name) if name in signature.leaf_names else name for name in leaves]
    named_inputs = [(value, signature.leaf_names[i]) for value, i in zip(model.graph.inputs, inputs, strict=True)]
    named_outputs = [(value, leaves[i]) for value, i in zip(model.graph.outputs, outputs, strict=True)]
    taken: set[str] = set()
    wanted: list[tuple[Any, str]] = []
    for value, name in named_inputs + named_outputs:
        wanted.append((value, unique(identifier(name), taken)))
    for value in inner_values(model):
        if value.name in taken and all(value is not other for other, _ in wanted):
            value.name = unique(f"{value.name}_inner", taken)
    for value, name in wanted:
        value.name = name
    return [name for _, name in wanted[len(named_inputs) :]]


_PAST = re.compile(r"^past(_key_values?)?(?![a-z])")


def name_sizes(model: Any) -> list[list[int | str]]:
    """Name every free size of an ``onnx_ir`` model after the input and axis it is first met at: ``input_ids_dim0``.

    Returns:
        The sizes of each input, as numbers and names.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and str(size.value).isidentifier():
                names.setdefault(str(size.value), re.sub(r"\W", "_", f"{value.name}_dim{axis}"))
    if names:
        met = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
        for value in [*model.graph.inputs, *inner_values(model)]:
            if value.shape is not None:
                sizes = [x if isinstance(x, int) else x.value for x in value.shape]
                value.shape = onnx_ir.Shape([met.sub(lambda m: names[m[1]], x) if isinstance(x, str) else x for x in sizes])
    return [[x if isinstance(x, int) else str(x.value) for x in value.shape or ()] for value in model.graph.inputs]


_SIZE = r"leaves\[(\d+)\]\.size\(\)\[(\d+)\]"


def fixed_sizes(signature: Signature) -> dict[tuple[int, int], int]:
    """The sizes that the conditions of a call fix, by leaf and axis."""
    found = (re.fullmatch(rf"{_SIZE} == (\d+)", condition) for condition in signature.conditions)
    return {(int(m[1]), int(m[2])): int(m[3]) for m in found if m}


def unsaid(signature: Signature, sizes: Mapping[int, Sequence[int | str]]) -> tuple[str, ...]:
    """The conditions on a call that a file with these input sizes does not state itself, for a person.

    Args:
        sizes: the sizes of the file's inputs, as numbers and names, by leaf.
    """
    symbols = {x: sympy.Symbol(x, integer=True, nonnegative=True) for axes in sizes.values() for x in axes if isinstance(x, str)}
    leaves = {leaf: _Sized([x if isinstance(x, int) else symbols[x] for x in axes]) for leaf, axes in sizes.items()}
    return tuple(signature.describe(x) for x in dict.fromkeys(signature.conditions) if not _always(x, leaves))


@dataclasses.dataclass(frozen=True)
class _Sized:
    """A tensor of which only the sizes are known."""

    sizes: Sequence[Any]

    def size(self) -> Sequence[Any]:
        return self.sizes


def _always(condition: str, leaves: Mapping[int, _Sized]) -> bool:
    """Whether a condition holds at any sizes of these names; symbols that differ are unequal to sympy, which proves nothing."""
    met = [leaves[int(leaf)].sizes[int(axis)] for leaf, axis in re.findall(_SIZE, condition) if int(leaf) in leaves]
    numbers = all(isinstance(size, int) for size in met)
    try:
        return (numbers or not re.search(r"!=|\bnot\b|\bNe\b", condition)) and holds(condition, leaves)
    except (TypeError, KeyError):  # undecided
        return False


def name_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give the initializers that the exporter transposed, and so numbered, the names of their weights: ``head.weight.T``."""
    known: dict[Hashable, list[tuple[str, Any]]] = {}
    for name, weight in weights.items():
        if weight.dim() == 2:
            array = weight.detach().cpu().to(torch.float64 if weight.dtype is torch.float64 else torch.float32).numpy()
            for label, form in ((name, array), (f"{name}.T", array.T)):
                known.setdefault(_sight(form), []).append((label, form))
    taken = {str(value.name) for value in inner_values(model)}
    for value in list(model.graph.initializers.values()):
        if value.name in weights or value.const_value is None or len(value.const_value.shape) != 2:
            continue
        array = value.const_value.numpy()
        array = array if array.dtype == numpy.float64 else array.astype(numpy.float32)
        found = [label for label, form in known.get(_sight(array), ()) if numpy.array_equal(form, array)]
        if found:
            value.name = unique(found[0], taken)


def _sight(array: Any) -> Hashable:
    """What two equal matrices have in common at first sight."""
    return array.shape, array.dtype, array[:1, :8].tobytes()


def fields(spec: Any) -> Iterator[str]:
    """One name per leaf of a tree: ``logits``, ``hidden_states_0``; "" for a lone leaf.

    Example:
        >>> from tautomer.rewrite._torch import pytree
        >>> list(fields(pytree.tree_structure({"logits": 0, "states": (0, 0)})))
        ['logits', 'states_0', 'states_1']
    """
    if spec.is_leaf():
        yield ""
        return
    for child, tree in zip(_names(spec), spec.children(), strict=True):
        for rest in fields(tree):
            yield _join(child, rest)


def _join(name: str, rest: str) -> str:
    return name + rest if not rest or rest.startswith(".") else f"{name}_{rest}"


def _names(spec: Any) -> list[str]:
    """The names of the children of one node of a tree; their positions where it has none."""
    context = spec.context
    if dataclasses.is_dataclass(spec.type) and isinstance(context, list) and context and isinstance(context[0], list):
        context = context[0]
    if isinstance(context, type):
        context = getattr(context, "_fields", None)
    if isinstance(context, (list, tuple)) and len(context) == spec.num_children:
        return [str(name) for name in context]
    return _places(spec) or [str(i) for i in range(spec.num_children)]


def _places(spec: Any) -> list[str] | None:
    """Where the children of an object lie in it, ``.0.key`` for ``.layers[0].keys``; None where it does not show."""
    if issubclass(spec.type, (tuple, list, dict)) or spec.num_children != spec.num_leaves:
        return None
    marks = [object() for _ in range(spec.num_children)]
    found: dict[int, str] = {}
    seen: set[int] = set()

    def walk(x: Any, path: str) -> None:
        if any(x is mark for mark in marks):
            found.setdefault(id(x), path)
        elif id(x) not in seen and (isinstance(x, (dict, list, tuple)) or hasattr(x, "__dict__")):
            seen.add(id(x))
            if isinstance(x, (dict, list, tuple)):
                for key, entry in x.items() if isinstance(x, dict) else enumerate(x):
                    walk(entry, f"{path}.{key}")
                return
            for name, entry in vars(x).items():
                # The parts of an object are told apart by their position alone, its tensors also by their names.
                parts = isinstance(entry, (list, tuple)) and any(hasattr(part, "__dict__") for part in entry)
                walk(entry, path if parts else f"{path}.{_SINGULAR.get(name, name)}")

    try:
        walk(pytree.tree_unflatten(marks, spec), "")
    except Exception:  # a class that looks at what it is made of
        return None
    return [found[id(mark)] for mark in marks] if len(found) == len(marks) else None


_SINGULAR = {"keys": "key", "values": "value"}


def moved_counts(signature: Signature) -> list[str]:
    """The Python integers inside an object with tensors that comes back with others, ``cumulative_length 9 → 10``.

    A graph has them as constants: a file of it is right for one call, and wrong when it is fed what it returned.
    """
    given, returned = ({spec.type: spec.context for spec in _objects(tree)} for tree in (signature.in_spec, signature.out_spec))
    found = (pair for kind in given.keys() & returned.keys() for pair in _integers(given[kind], returned[kind]))
    return list(dict.fromkeys(found))


def _objects(spec: Any) -> Iterator[Any]:
    """The nodes of a tree that hold tensors and are no plain containers."""
    if not spec.is_leaf() and spec.num_leaves:
        if spec.type is not namedtuple and not issubclass(spec.type, (tuple, list, dict)):
            yield spec
        for child in spec.children():
            yield from _objects(child)


def _integers(a: Any, b: Any, name: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        # The place of a tensor among the leaves is no number of the object.
        for key in a.keys() & b.keys() if a.get("_t") != "tensor" else ():
            yield from _integers(a[key], b[key], str(key))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        for x, y in zip(a, b, strict=False):
            yield from _integers(x, y, name)
    elif type(a) is type(b) is int and a != b:
        yield f"{name} {a} → {b}"


def identifier(name: str) -> str:
    """``name`` as an ONNX identifier.

    Example:
        >>> identifier("past['keys'][0]"), identifier("past.0.key")
        ('past_keys_0', 'past.0.key')
    """
    cleaned = re.sub(r"[^\w.]+", "_", name).strip("_.")
    return f"_{cleaned}" if not cleaned or cleaned[0].isdigit() else cleaned


def unique(name: str, taken: set[str]) -> str:
    """``name``, numbered if it is taken already; it is taken afterwards."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def inner_values(model: Any) -> Iterator[Any]:
    """Every value an ``onnx_ir`` model computes or holds."""
    yield from list(model.graph.initializers.values())
    for node in model.graph.all_nodes():
        yield from node.outputs
