"""The call of a saved module as JSON data, and back."""

from __future__ import annotations

import ast
from typing import Any

from tautomer.rewrite._torch import size_functions
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.signature import Argument, Signature

from .graph_data import decode, encode
from .spec_data import decode_spec, encode_spec, plain, spec

_REQUIRED = Argument("").default
_SYNTAX = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.cmpop, ast.BinOp, ast.operator,
    ast.Call, ast.Subscript, ast.Constant, ast.Name, ast.Attribute, ast.Load,
)  # fmt: skip
_METHODS = ("size", "stride", "storage_offset")


def encode_signature(signature: Signature) -> dict[str, Any]:
    """A signature as JSON data.

    Raises:
        UsageError: a default, a constant or a class of the call has no form as data.
    """
    return {
        "owner": signature.owner,
        "arguments": [_encode_argument(argument) for argument in signature.arguments],
        "positional": signature.positional,
        "keywords": list(signature.keywords),
        "in": encode_spec(plain(signature.in_spec)),
        "out": encode_spec(plain(signature.out_spec)),
        "constants": {str(index): encode(value) for index, value in signature.constants.items()},
        "leaves": list(signature.leaf_names),
        "conditions": list(signature.conditions),
    }


def decode_signature(data: dict[str, Any]) -> Signature:
    """The signature that ``encode_signature`` wrote.

    Raises:
        UsageError: a class cannot be imported, or a condition is more than arithmetic over sizes.
    """
    for condition in data["conditions"]:
        only_arithmetic(condition)
    return Signature(
        owner=data["owner"],
        arguments=tuple(_decode_argument(x) for x in data["arguments"]),
        positional=data["positional"],
        keywords=tuple(data["keywords"]),
        in_spec=spec(decode_spec(data["in"])),
        out_spec=spec(decode_spec(data["out"])),
        constants={int(index): decode(value, {}) for index, value in data["constants"].items()},
        leaf_names=tuple(data["leaves"]),
        conditions=tuple(data["conditions"]),
    )


def _encode_argument(argument: Argument) -> dict[str, Any]:
    data: dict[str, Any] = {"name": argument.name}
    if argument.keyword_only:
        data["keyword_only"] = True
    return data if argument.default is _REQUIRED else {**data, "default": encode(argument.default)}


def _decode_argument(data: dict[str, Any]) -> Argument:
    default = decode(data["default"], {}) if "default" in data else _REQUIRED
    return Argument(data["name"], default, data.get("keyword_only", False))


def only_arithmetic(condition: str) -> None:
    """Refuse a condition that does anything but compute with the sizes of ``leaves``: it will be run as code."""
    try:
        tree = ast.parse(condition, mode="eval")
    except SyntaxError:
        raise UsageError(f"the saved module has the condition {condition!r}, which is no condition") from None
    for node in ast.walk(tree):
        known = isinstance(node, _SYNTAX)
        if isinstance(node, ast.Name):
            known = node.id in ("leaves", "abs", "max", "min") or node.id in size_functions
        elif isinstance(node, ast.Attribute):
            of_math = isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr[0] != "_"
            known = of_math or node.attr in _METHODS
        elif isinstance(node, ast.Constant):
            known = isinstance(node.value, (bool, int, float))
        if not known:
            raise UsageError(f"the saved module has the condition {condition!r}, which is more than arithmetic over sizes")
