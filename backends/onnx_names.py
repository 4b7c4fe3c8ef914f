"""The names of an ONNX file's inputs and outputs: the arguments of the user's forward, the fields of what it returns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import onnx_ir
import torch
from torch import Tensor

from tautomer.rewrite.signature import Signature


def rename(model: Any, signature: Signature, inputs: Sequence[int], outputs: Sequence[int]) -> list[str]:
    """Name the inputs and outputs of an ``onnx_ir`` model after the leaves of the signature; returns the outputs' names.

    Args:
        inputs, outputs: which leaves of the call and of the output the model has.
    """
    leaves = [f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name for name in fields(signature.out_spec)]
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


def name_sizes(model: Any) -> list[list[int | str]]:
    """Name every free size of an ``onnx_ir`` model after the input and axis it is first met at: ``input_ids_dim0``.

    Returns:
        The sizes of each input, as numbers and names.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and str(size.value).isidentifier():
                names.setdefault(str(size.value), f"{value.name}_dim{axis}")
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
    left = []
    for condition in dict.fromkeys(signature.conditions):
        met = [sizes.get(int(leaf), ())[int(axis) : int(axis) + 1] for leaf, axis in re.findall(_SIZE, condition)]
        numbers = all(size and isinstance(size[0], int) for size in met)
        equal = re.fullmatch(f"{_SIZE} == {_SIZE}", condition) and met[0] and met[0] == met[1]
        if not numbers and not equal:
            left.append(signature.describe(condition))
    return tuple(left)


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
    for index in range(spec.num_children):
        child = _names(spec)[index]
        for rest in fields(spec.child(index)):
            yield f"{child}_{rest}" if rest else child


def _names(spec: Any) -> list[str]:
    """The names of the children of one node of a tree; their positions where it has none."""
    context = spec.context
    if dataclasses.is_dataclass(spec.type) and isinstance(context, list) and context and isinstance(context[0], list):
        context = context[0]
    if isinstance(context, type):
        context = getattr(context, "_fields", None)
    if isinstance(context, (list, tuple)) and len(context) == spec.num_children:
        return [str(name) for name in context]
    return [str(i) for i in range(spec.num_children)]


def identifier(name: str) -> str:
    """``name`` as an ONNX identifier.

    Example:
        >>> identifier("past['keys'][0]")
        'past_keys_0'
    """
    cleaned = re.sub(r"\W+", "_", name).strip("_")
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
