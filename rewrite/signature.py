"""The call of a captured model: its own signature, bound by name, flattened to the graph's inputs.

The graph was captured from one call. ``bind`` accepts every call that means the same: arguments by position or by
name, in any order, defaults spelled or left out. Anything else gets one sentence.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._torch import pytree, size_functions
from .errors import UsageError

_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """One parameter of the user's ``forward``: its name, its default, and whether it is given by name alone."""

    name: str
    default: Any = _REQUIRED
    keyword_only: bool = False


@dataclass(frozen=True)
class Signature:
    """How a call becomes graph inputs, and graph outputs become the user's output classes.

    Attributes:
        owner: the name of the user's class, for messages.
        arguments: the named parameters of ``forward``, in order.
        positional: how many arguments the captured call gave by position.
        keywords: the names the captured call gave by keyword, in order.
        in_spec: the tree of ``(args, kwargs)`` as captured.
        out_spec: the tree of the output; it rebuilds dataclasses and Hugging Face outputs.
        constants: the captured leaves that are no tensors (index to value); a call must repeat them.
        leaf_names: one name per leaf, for messages.
        conditions: what the sizes of a call must satisfy, as Python over ``leaves[i].size()[k]``: the branches the
            forward took, and the sizes that are fixed.
    """

    owner: str
    arguments: tuple[Argument, ...]
    positional: int
    keywords: tuple[str, ...]
    in_spec: Any
    out_spec: Any
    constants: Mapping[int, Any]
    leaf_names: tuple[str, ...]
    conditions: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, forward: Callable[..., Any], owner: str, args: Sequence[Any], kwargs: Mapping[str, Any], out_spec: Any
    ) -> Signature:
        """The signature of the captured call ``forward(*args, **kwargs)``."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = [p for p in inspect.signature(forward).parameters.values() if p.kind not in variadic]
        arguments = tuple(Argument(p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY) for p in parameters)
        paths, in_spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        by_position = [argument.name for argument in arguments if not argument.keyword_only]
        names = tuple(_leaf_name(path, by_position) for path, _ in paths)
        constants = {i: leaf for i, (_, leaf) in enumerate(paths) if not isinstance(leaf, torch.Tensor)}
        return cls(owner, arguments, len(args), tuple(kwargs), in_spec, out_spec, constants, names)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph inputs of a call.

        Raises:
            UsageError: an argument is missing, unknown, was not given when the model was captured, has another
                structure, or is a constant with another value.
        """
        names = [argument.name for argument in self.arguments if not argument.keyword_only]
        given = dict(zip(names, args, strict=False))
        extra = list(args[len(names) :])
        for name, value in kwargs.items():
            if name in given:
                raise UsageError(f"{self.owner} got the argument '{name}' twice")
            given[name] = value
        captured = names[: self.positional]
        values = []
        for name in captured:
            values.append(self._take(name, given))
        values.extend(extra)
        if len(values) != self.positional:
            takes = max(self.positional, len(names))
            raise UsageError(f"{self.owner} takes {takes} positional arguments, {len(args)} were given")
        keywords = {name: self._take(name, given) for name in self.keywords}
        self._refuse_new(given)
        flat, spec = pytree.tree_flatten((tuple(values), keywords))
        if spec != self.in_spec:
            flat, spec = pytree.tree_flatten(_in_order((tuple(values), keywords), self.in_spec))
        if spec != self.in_spec:
            raise UsageError(
                f"the inputs of {self.owner} have another structure than when it was captured",
                hint="capture the model again with inputs of this structure",
            )
        for index, constant in self.constants.items():
            if flat[index] is not constant and not _equal(flat[index], constant):
                raise UsageError(
                    f"'{self.leaf_names[index]}' was {constant!r} when {self.owner} was captured; it is {flat[index]!r} now",
                    hint="capture the model again with this value",
                )
        self._check_sizes(flat)
        return flat

    def _check_sizes(self, flat: Sequence[Any]) -> None:
        for index, leaf in enumerate(flat):
            if index not in self.constants and not isinstance(leaf, torch.Tensor):
                raise UsageError(f"'{self.leaf_names[index]}' of {self.owner} must be a tensor, not {type(leaf).__name__}")
        for condition in self.conditions:
            if not holds(condition, flat):
                raise UsageError(
                    f"{self.owner} was captured for inputs with {self.describe(condition)}",
                    hint="capture the model again with inputs of this size, or with other dynamic_shapes",
                )

    def describe(self, condition: str) -> str:
        """A condition for a person: ``x.shape[1] == 7``."""
        named = re.sub(r"leaves\[(\d+)\]", lambda found: self.leaf_names[int(found[1])], condition)
        return re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", named)

    def _take(self, name: str, given: dict[str, Any]) -> Any:
        if name in given:
            return given.pop(name)
        for argument in self.arguments:
            if argument.name == name and argument.default is not _REQUIRED:
                return argument.default
        raise UsageError(f"{self.owner} needs the argument '{name}'")

    def _refuse_new(self, given: Mapping[str, Any]) -> None:
        defaults = {argument.name: argument.default for argument in self.arguments}
        for name, value in given.items():
            if value is None or (name in defaults and _equal(value, defaults[name])):
                continue
            if name not in defaults:
                # Only a forward with **kwargs takes other names; what it does with them was not captured either.
                raise UsageError(f"{self.owner} was captured without an argument '{name}'", hint="capture it with this argument")
            raise UsageError(
                f"'{name}' was not given when {self.owner} was captured", hint=f"pass '{name}' in the example inputs too"
            )

    def flatten(self, output: Any) -> list[Any]:
        """The leaves of an output of the user's model, in graph order."""
        return list(pytree.tree_leaves(output))

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The user's output object from the graph's outputs."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


def holds(condition: str, leaves: Sequence[Any] | Mapping[int, Any]) -> bool:
    """Whether a condition over ``leaves`` is true of these inputs; it is false where it cannot be asked.

    Example:
        >>> holds("leaves[0].size()[1] == 7", [torch.zeros(2, 7)])
        True
    """
    try:
        return bool(eval(_compiled(condition), dict(size_functions), {"leaves": leaves}))
    except IndexError:
        return False


@functools.cache
def _compiled(condition: str) -> types.CodeType:
    return compile(condition, "<condition>", "eval")


def _in_order(tree: Any, spec: Any) -> Any:
    """``tree`` with the entries of its dicts in the order that ``spec`` has them, as far as the two are alike."""
    if type(tree) is not spec.type or not isinstance(tree, (dict, list, tuple)):
        return tree
    if type(tree) is dict:
        if set(tree) != set(spec.context):
            return tree
        return {key: _in_order(tree[key], child) for key, child in zip(spec.context, spec.children(), strict=True)}
    if type(tree) in (list, tuple) and len(tree) == spec.num_children:
        return type(tree)(map(_in_order, tree, spec.children()))
    return tree


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    return type(a) is type(b) and bool(a == b)


def _leaf_name(path: Any, by_position: Sequence[str]) -> str:
    """``(0, 2, 'mask')`` is the third positional argument's entry ``mask``."""
    _, first, *rest = path
    index = getattr(first, "idx", None)
    name = getattr(first, "key", None)
    if name is None:
        name = by_position[index] if index is not None and index < len(by_position) else f"args[{index}]"
    return str(name) + pytree.keystr(tuple(rest))
