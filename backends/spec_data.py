"""The tree of a call or an output as plain tuples, and those as JSON: ``(type, context, children)``, a leaf is None.

Classes are named, not pickled: reading a saved tree imports the module that defines the class and asks the pytree
registry for it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import namedtuple
from typing import Any

import torch

from tautomer.rewrite._torch import pytree
from tautomer.rewrite.errors import UsageError

from .graph_data import decode, encode

Plain = tuple[Any, Any, tuple[Any, ...]] | None


def plain(spec: Any) -> Plain:
    """A tree of the pytree registry as tuples."""
    if spec.is_leaf():
        return None
    return spec.type, spec.context, tuple(plain(spec.child(i)) for i in range(spec.num_children))


def spec(tree: Plain) -> Any:
    """The tree of the pytree registry behind ``plain``."""
    if tree is None:
        return pytree.tree_structure(0)
    kind, context, children = tree
    return pytree.TreeSpec(kind, context, [spec(child) for child in children])


def encode_spec(tree: Plain) -> Any:
    """A plain tree as JSON data.

    Raises:
        UsageError: a class of the tree has no importable name, or carries what has no form as data.
    """
    if tree is None:
        return None
    kind, context, children = tree
    context = {"class": class_name(context)} if isinstance(context, type) else encode(context)
    return {"type": class_name(kind), "context": context, "children": [encode_spec(child) for child in children]}


def decode_spec(data: Any) -> Plain:
    """The plain tree that ``encode_spec`` wrote.

    Raises:
        UsageError: a class cannot be imported here, or is not known to pytree.
    """
    if data is None:
        return None
    context = data["context"]
    context = find_class(context["class"]) if isinstance(context, dict) and "class" in context else decode(context, {})
    return find_class(data["type"]), context, tuple(decode_spec(child) for child in data["children"])


def class_name(cls: type) -> str:
    """``package.module:Class``, from which ``find_class`` finds the class again."""
    name = f"{cls.__module__}:{cls.__qualname__}"
    if "<locals>" in name or cls.__module__ == "__main__":
        raise UsageError(f"the class {cls.__qualname__} cannot be saved: it has no importable name", hint="define it in a module")
    return name


def find_class(name: str) -> type:
    """The class of a name; a plain dataclass is made known to pytree. (What pytree calls the class of a named tuple is
    the function ``namedtuple``; the class itself is the context.)"""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the saved module takes or returns {name}, which cannot be imported here: {error}",
            hint=f"install the package that has {module}, or add its folder to PYTHONPATH",
        ) from error
    if found is namedtuple:
        return namedtuple  # type: ignore[no-any-return]
    if not isinstance(found, type):
        raise UsageError(f"the saved module takes or returns {name}, which is no class here")
    if found not in pytree.SUPPORTED_NODES and not pytree.is_namedtuple_class(found):
        if not dataclasses.is_dataclass(found):
            raise UsageError(
                f"the saved module takes or returns {name}, which is no registered pytree here",
                hint="register it before loading, as when the model was captured",
            )
        torch.export.register_dataclass(found)
    cls: type = found
    return cls
