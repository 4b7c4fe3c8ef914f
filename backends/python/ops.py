"""Every call of a graph as a person would write it: ``x + y``, ``F.gelu(x)``, ``x.transpose(1, 2)``.

A table names the ops with a spelling of their own. Any other op that PyTorch binds as it is, as a method or a function, is
spelled by its name; what is left is called by its full name, ``torch.ops.aten.name.overload``, which is always right.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from tautomer.rewrite.errors import ExportError
from tautomer.rewrite.library import SEMANTIC
from tautomer.rewrite.program import arguments, place, target_name
from tautomer.rewrite.shapes import key, static

from .pieces import (
    AND,
    ATOM,
    COMPARE,
    NOT,
    OR,
    POWER,
    PRODUCT,
    SUM,
    TERNARY,
    UNARY,
    XOR,
    Code,
    Piece,
    binary,
    call,
    code,
    listed,
    method,
    plain,
    tuple_of,
    within,
)

SEMANTIC_NAMES = {op.name.partition(".")[0]: op for op in SEMANTIC}


class Spell(Protocol):
    """What spelling a call needs: the text of an operand, whatever it is, and of the device that the module runs on."""

    def __call__(self, x: Any, role: str = "value") -> Code: ...

    def device(self, node: fx.Node) -> Code: ...


Given = Mapping[str, Any]


def express(node: fx.Node, spell: Spell) -> Code:
    """The call of ``node`` as text.

    Raises:
        ExportError: it has none that runs where torch alone is installed.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return express_size(node, spell)
    space, name = node.target.namespace, node.target._schema.name.split("::")[1]
    given = arguments(node)
    if space == "tautomer" and name.partition(".")[0] in SEMANTIC_NAMES:
        return _call(node, given, spell, plain(name.partition(".")[0]), method_of=False)
    if space not in ("aten", "prims"):
        raise ExportError(
            f"{target_name(node)} at {place(node)} is an operator that a file which imports torch alone does not have",
            hint="leave out the rewrite that put it there (skip=…), or save the module instead (tautomer.save)",
        )
    if space == "aten" and name in _SPELLINGS:
        found = _SPELLINGS[name](node, given, spell)
        if found is not None:
            return found
    return _call(node, given, spell, *_bound(node, name))


# -- by rule ---------------------------------------------------------------------------------------------------


def _bound(node: fx.Node, name: str) -> tuple[Code, bool]:
    """The function that is bound to an op of this name as it is, and whether it is a method."""
    schema = node.target._schema  # type: ignore[union-attr]
    first = schema.arguments[0] if schema.arguments else None
    tensor = first is not None and str(first.type) == "Tensor" and first.name == "self"
    if tensor and type(getattr(Tensor, name, None)).__name__ == "method_descriptor":
        return plain(name), True
    if type(getattr(torch, name, None)).__name__ == "builtin_function_or_method":
        return plain(f"torch.{name}"), False
    if type(getattr(F, name, None)).__name__ == "builtin_function_or_method":
        return plain(f"F.{name}"), False
    if name in _WRAPPED:
        return plain(f"F.{name}"), False
    group, _, rest = name.partition("_")
    if group in ("linalg", "special", "fft") and hasattr(getattr(torch, group), rest):
        return plain(f"torch.{group}.{rest}"), False
    return plain(f"torch.ops.{node.target}"), False


_WRAPPED = {"leaky_relu", "elu", "celu", "selu", "hardswish", "hardsigmoid", "hardtanh", "mish"}
"""The functions of torch.nn.functional in Python that do nothing but call the op of their name."""


def _call(node: fx.Node, given: Given, spell: Spell, function: Code, method_of: bool) -> Code:
    """A call with the arguments that say something: defaults left out, flags and late arguments by name."""
    schema = node.target._schema  # type: ignore[union-attr]
    args, kwargs, gap = list[Code](), dict[str, Code](), False
    raw = str(function.parts[0]).startswith("torch.ops.")
    for index, argument in enumerate(schema.arguments):
        value = given[argument.name]
        if argument.has_default_value() and _equal(value, argument.default_value):
            gap = True
            continue
        if argument.name in ("pin_memory", "layout") and value in (False, torch.strided):
            gap = True
            continue
        if argument.name == "device":
            value, shown = None, spell.device(node)
        else:
            shown = spell(value, argument.name)
        flag = isinstance(value, bool) or (isinstance(value, (str, torch.dtype)) and index > 0)
        if argument.kwarg_only or gap or (not raw and (flag or (index > 3 and not isinstance(value, fx.Node)))):
            kwargs[argument.name], gap = shown, True
        else:
            args.append(shown)
    if method_of:
        return method(args[0], str(function.parts[0]), *args[1:], **kwargs)
    return call(function, *args, **kwargs)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, fx.Node) or isinstance(b, fx.Node) or isinstance(a, bool) != isinstance(b, bool):
        return False
    return bool(a == b) if isinstance(a, (int, float)) and isinstance(b, (int, float)) else type(a) is type(b) and bool(a == b)


# -- sizes -----------------------------------------------------------------------------------------------------

_SIGNS: dict[Any, tuple[str, int]] = {
    operator.add: ("+", SUM), operator.sub: ("-", SUM), operator.mul: ("*", PRODUCT), operator.floordiv: ("//", PRODUCT),
    operator.mod: ("%", PRODUCT), operator.truediv: ("/", PRODUCT), operator.eq: ("==", COMPARE), operator.ne: ("!=", COMPARE),
    operator.lt: ("<", COMPARE), operator.le: ("<=", COMPARE), operator.gt: (">", COMPARE), operator.ge: (">=", COMPARE),
    operator.and_: ("&", AND), operator.or_: ("|", OR), operator.pow: ("**", POWER),
}  # fmt: skip
_FUNCTIONS: dict[Any, str] = {
    torch.sym_max: "max", torch.sym_min: "min", torch.sym_float: "float", torch.sym_int: "int", operator.neg: "-",
    math.ceil: "math.ceil", math.floor: "math.floor", math.trunc: "math.trunc", operator.not_: "not ", torch.sym_not: "not ",
    math.sqrt: "math.sqrt", torch.sym_sqrt: "math.sqrt", operator.abs: "abs", round: "round",
}  # fmt: skip


def express_size(node: fx.Node, spell: Spell) -> Code:
    """A call that computes with sizes, flags or members of a tuple."""
    target, args = node.target, node.args
    if target is operator.getitem:
        return code(within(spell(args[0]), ATOM), "[", spell(args[1]), "]")
    if target is operator.mul and isinstance(args[1], fx.Node) and args[1].meta.get("val") is True:
        return code(spell(args[0], "p"), " if ", spell(args[1]), " else 0.0", level=TERNARY)
    if target in _SIGNS:
        sign, level = _SIGNS[target]
        return binary(spell(args[0]), sign, spell(args[1]), level)
    if target in _FUNCTIONS:
        name = _FUNCTIONS[target]
        if name in ("-", "not "):
            level = UNARY if name == "-" else NOT
            return code(name, within(spell(args[0]), level), level=level)
        return call(name, *map(spell, args))
    raise ExportError(f"{target_name(node)} at {place(node)} computes with sizes in a way that has no Python spelling here")


# -- spellings -------------------------------------------------------------------------------------------------

Spelling = Callable[[fx.Node, Given, Spell], Code | None]


def _infix(sign: str, level: int) -> Spelling:
    def spelling(node: fx.Node, given: Given, spell: Spell) -> Code | None:
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            return None
        left, right = given.get("self"), given.get("other", given.get("exponent"))
        if not isinstance(left, fx.Node):
            return None
        return binary(spell(left), sign, spell(right, "factor" if level == PRODUCT else "value"), level)

    return spelling


def _reflected(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    if given["alpha"] != 1 or isinstance(given["other"], fx.Node):
        return None
    return binary(spell(given["other"]), "-", spell(given["self"]), SUM)


def _power(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    return binary(spell(given["self"]), "**", spell(given["exponent"], "exponent"), POWER)


def _unary(sign: str) -> Spelling:
    return lambda node, given, spell: code(sign, within(spell(given["self"]), UNARY), level=UNARY)


def _select(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    return _indexed(node, given["self"], given["dim"], spell(given["index"], "index"), spell)


def _slice(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    if given["self"].meta.get("val") is None:
        return None
    start = "" if given["start"] in (None, 0) else spell(given["start"], "start")
    stop = "" if given["end"] is None or _endless(given["end"]) else spell(given["end"], "stop")
    step: list[Piece] = [] if given["step"] == 1 else [":", spell(given["step"], "step")]
    return _indexed(node, given["self"], given["dim"], code(start, ":", stop, *step, cost=0), spell)


def _endless(end: Any) -> bool:
    return isinstance(end, int) and end >= 2**63 - 1


def _indexed(node: fx.Node, x: fx.Node, dim: int, index: Code, spell: Spell) -> Code | None:
    value = x.meta.get("val")
    if value is None:
        return None
    axis = dim % value.dim()
    last = axis == value.dim() - 1 and axis > 1
    inside: list[Piece] = ["...", ", ", index] if last else [":, " * axis, index]
    return code(within(spell(x), ATOM), "[", *inside, "]")


def _index(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    pieces = [plain(":") if index is None else spell(index) for index in given["indices"]]
    return code(within(spell(given["self"]), ATOM), "[", *listed(pieces), "]")


def _reshape(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    """A split of one axis is ``unflatten``, a merge of neighbours ``flatten``; neither needs the other sizes."""
    x, shape = given["self"], given["shape"] if "shape" in given else given["size"]
    old, new = x.meta.get("val"), node.meta.get("val")
    if old is not None and new is not None:
        before, after = list(map(key, old.shape)), list(map(key, new.shape))
        front = _common(before, after)
        back = _common(before[front:][::-1], after[front:][::-1])
        gone, made = len(before) - front - back, len(after) - front - back
        if gone == 1 and made > 1:
            split = [static(size) for size in new.shape[front : front + made]]
            if sum(size is None for size in split) <= 1:
                axis = -1 if front + 1 == len(before) else front
                if None not in split:
                    free = [i for i, size in enumerate(shape[front : front + made]) if size == -1]
                    split = [-1 if i in free else size for i, size in enumerate(split)]
                sizes = [plain("-1") if size in (None, -1) else spell(size, "heads") for size in split]
                return method(spell(x), "unflatten", spell(axis, "axis"), tuple_of(sizes))
        if made == 1 and gone > 1:
            end = [] if front + gone == len(before) else [spell(front + gone - 1, "axis")]
            start = [] if front == 0 and not end else [spell(front, "axis")]
            return method(spell(x), "flatten", *start, *end)
    return method(spell(x), "reshape", *_sizes(shape, spell))


def _common(a: list[Any], b: list[Any]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _sizes(shape: Any, spell: Spell) -> list[Piece]:
    return [spell(size, "size") for size in shape]


def _sized(name: str, argument: str) -> Spelling:
    return lambda node, given, spell: method(spell(given["self"]), name, *_sizes(given[argument], spell))


def _transpose(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    return code(within(spell(given["self"]), ATOM), ".T")


def _to(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    if given.get("copy") or given.get("memory_format") is not None or "dtype" not in given:
        return None
    x, dtype = given["self"], given["dtype"]
    device = given.get("device")
    if device is not None and (x.meta.get("val") is None or x.meta["val"].device != torch.device(device)):
        return method(spell(x), "to", spell(torch.device(device)), *([spell(dtype)] if dtype is not None else []))
    return method(spell(x), "to", spell(dtype)) if dtype is not None else None


def _softmax(name: str) -> Spelling:
    def spelling(node: fx.Node, given: Given, spell: Spell) -> Code | None:
        dtype = {} if given["dtype"] is None else {"dtype": spell(given["dtype"])}
        return call(f"F.{name}", spell(given["self"]), dim=spell(given["dim"], "dim"), **dtype)

    return spelling


def _attention(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    options = dict[str, Code]()
    if given["attn_mask"] is not None:
        options["attn_mask"] = spell(given["attn_mask"])
    if given["dropout_p"] != 0.0:
        options["dropout_p"] = spell(given["dropout_p"], "dropout")
    if given["is_causal"]:
        options["is_causal"] = spell(given["is_causal"])
    if given["scale"] is not None and not _usual_scale(given["query"], given["scale"]):
        options["scale"] = _scale(given["query"], given["scale"], spell)
    if given["enable_gqa"]:
        options["enable_gqa"] = spell(given["enable_gqa"])
    operands = [spell(given[name]) for name in ("query", "key", "value")]
    return call("F.scaled_dot_product_attention", *operands, **options)


def _usual_scale(query: Any, scale: Any) -> bool:
    value = query.meta.get("val")
    width = None if value is None else static(value.shape[-1])
    return width is not None and isinstance(scale, float) and scale == 1.0 / math.sqrt(width)


def _scale(query: Any, scale: Any, spell: Spell) -> Code:
    value = query.meta.get("val")
    width = None if value is None else static(value.shape[-1])
    if width is not None and isinstance(scale, float) and scale == width**-0.5:
        return code(spell(width, "head_width"), "**-0.5", level=POWER, cost=0)
    return spell(scale, "scale")


def _dropout(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    return call("F.dropout", spell(given["input"]), spell(given["p"], "dropout"), training=spell(given["train"]))


def _norm(name: str) -> Spelling:
    def spelling(node: fx.Node, given: Given, spell: Spell) -> Code | None:
        args = [spell(given["input"]), tuple_of([spell(size, "width") for size in given["normalized_shape"]])]
        options = {} if given["weight"] is None else {"weight": spell(given["weight"])}
        if given.get("bias") is not None:
            options["bias"] = spell(given["bias"])
        default = None if name == "rms_norm" else 1e-5
        if given["eps"] != default:
            options["eps"] = spell(given["eps"], "eps")
        return call(f"F.{name}", *args, **options)

    return spelling


def _group_norm(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    options = {name: spell(given[name]) for name in ("weight", "bias") if given[name] is not None}
    if given["eps"] != 1e-5:
        options["eps"] = spell(given["eps"], "eps")
    return call("F.group_norm", spell(given["input"]), spell(given["num_groups"], "groups"), **options)


def _batch_norm(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    options = {name: spell(given[name]) for name in ("weight", "bias") if given[name] is not None}
    options["training"] = spell(given["training"])
    options |= {name: spell(given[name], name) for name in ("momentum", "eps")}
    return call("F.batch_norm", *(spell(given[name]) for name in ("input", "running_mean", "running_var")), **options)


def _instance_norm(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    names = ("running_mean", "running_var", "weight", "bias")
    options = {name: spell(given[name]) for name in names if given[name] is not None}
    options["use_input_stats"] = spell(given["use_input_stats"])
    options |= {name: spell(given[name], name) for name in ("momentum", "eps")}
    return call("F.instance_norm", spell(given["input"]), **options)


def _embedding(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    if given["scale_grad_by_freq"] or given["sparse"]:
        return None
    padding = {} if given["padding_idx"] == -1 else {"padding_idx": spell(given["padding_idx"], "padding_idx")}
    return call("F.embedding", spell(given["indices"]), spell(given["weight"]), **padding)


def _linear(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    return call("F.linear", *(spell(given[name]) for name in ("input", "weight", "bias") if given[name] is not None))


def _conv(name: str) -> Spelling:
    def spelling(node: fx.Node, given: Given, spell: Spell) -> Code | None:
        args = [spell(given[name]) for name in ("input", "weight", "bias") if given[name] is not None]
        options = {}
        for option, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1)):
            value = given.get(option, default)
            value = collapsed(value)
            if value != default:
                options[option] = spell(value, option)
        return call(f"F.{name}", *args, **options)

    return spelling


def collapsed(value: Any) -> Any:
    """``[3, 3]`` is ``3`` where a size per axis is meant."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) and x == value[0] for x in value):
        return value[0]
    return tuple(value) if isinstance(value, list) else value


def _pool(name: str, *options: tuple[str, Any]) -> Spelling:
    def spelling(node: fx.Node, given: Given, spell: Spell) -> Code | None:
        size = collapsed(given.get("kernel_size", given.get("output_size")))
        shown = {}
        for option, default in options:
            value = collapsed(given[option])
            if value in ([], ()) or (option == "stride" and value == size):
                continue
            if value != default:
                shown[option] = spell(value, option)
        return call(f"F.{name}", spell(given["self"]), spell(size, "size"), **shown)

    return spelling


def _pad(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    args = [spell(given["self"]), tuple_of([spell(x, "padding") for x in given["pad"]])]
    mode = {} if given["mode"] == "constant" else {"mode": spell(given["mode"])}
    value = {} if given["value"] in (None, 0) else {"value": spell(given["value"])}
    return call("F.pad", *args, **mode, **value)


def _einsum(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    if given["path"] is not None or len(given["tensors"]) > 2:
        return None
    return call("torch.einsum", spell(given["equation"]), *map(spell, given["tensors"]))


def _joined(name: str, default: int = 0) -> Spelling:
    def spelling(node: fx.Node, given: Given, spell: Spell) -> Code | None:
        dim = {} if given["dim"] == default else {"dim": spell(given["dim"], "dim")}
        return call(f"torch.{name}", tuple_of([spell(x) for x in given["tensors"]]), **dim)

    return spelling


def _reduction(name: str) -> Spelling:
    def spelling(node: fx.Node, given: Given, spell: Spell) -> Code | None:
        if given.get("dtype") is not None or "correction" in given:
            return None
        dims = given.get("dim")
        if isinstance(dims, (list, tuple)):
            shown = [spell(collapsed(dims) if len(dims) == 1 else tuple(dims), "dim")] if dims else []
        else:
            shown = [] if dims is None else [spell(dims, "dim")]
        keep = {"keepdim": spell(True)} if given.get("keepdim") else {}
        return method(spell(given["self"]), name, *shown, **keep) if shown or not keep else None

    return spelling


def _split(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    size = given.get("split_size", given.get("split_sizes"))
    shown = tuple_of([spell(x, "size") for x in size]) if isinstance(size, (list, tuple)) else spell(size, "size")
    dim = given["dim"]
    value = given["self"].meta.get("val")
    last = value is not None and dim == value.dim() - 1
    return method(spell(given["self"]), "split", shown, **({} if dim == 0 else {"dim": spell(-1 if last else dim, "dim")}))


def _rounded(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    if given.get("rounding_mode") != "floor" or not isinstance(given["self"], fx.Node):
        return _infix("/", PRODUCT)(node, given, spell)
    return None


def _one_hot(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    return call(
        "F.one_hot", spell(given["self"]), *([] if given["num_classes"] == -1 else [spell(given["num_classes"], "classes")])
    )


def _hardtanh(node: fx.Node, given: Given, spell: Spell) -> Code | None:
    return call("F.relu6", spell(given["self"])) if (given["min_val"], given["max_val"]) == (0, 6) else None


_POOLING = (("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
_AVERAGE = (("stride", None), ("padding", 0), ("ceil_mode", False), ("count_include_pad", True), ("divisor_override", None))
_SPELLINGS: dict[str, Spelling] = {
    "add": _infix("+", SUM), "sub": _infix("-", SUM), "mul": _infix("*", PRODUCT), "div": _rounded, "rsub": _reflected,
    "matmul": _infix("@", PRODUCT), "pow": _power, "neg": _unary("-"), "bitwise_not": _unary("~"),
    "eq": _infix("==", COMPARE), "ne": _infix("!=", COMPARE), "lt": _infix("<", COMPARE), "le": _infix("<=", COMPARE),
    "gt": _infix(">", COMPARE), "ge": _infix(">=", COMPARE),
    "__and__": _infix("&", AND), "bitwise_and": _infix("&", AND), "__or__": _infix("|", OR), "bitwise_or": _infix("|", OR),
    "__xor__": _infix("^", XOR), "bitwise_xor": _infix("^", XOR),
    "select": _select, "slice": _slice, "index": _index, "reshape": _reshape, "view": _reshape, "t": _transpose,
    "unflatten": lambda node, given, spell: method(
        spell(given["self"]), "unflatten", spell(given["dim"], "dim"), tuple_of([spell(x, "size") for x in given["sizes"]])
    ),
    "expand": _sized("expand", "size"), "permute": _sized("permute", "dims"), "repeat": _sized("repeat", "repeats"),
    "to": _to, "softmax": _softmax("softmax"), "log_softmax": _softmax("log_softmax"),
    "scaled_dot_product_attention": _attention, "dropout": _dropout,
    "layer_norm": _norm("layer_norm"), "rms_norm": _norm("rms_norm"), "group_norm": _group_norm, "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "embedding": _embedding, "linear": _linear, "conv1d": _conv("conv1d"), "conv2d": _conv("conv2d"), "conv3d": _conv("conv3d"),
    "conv_transpose1d": _conv("conv_transpose1d"), "conv_transpose2d": _conv("conv_transpose2d"),
    "conv_transpose3d": _conv("conv_transpose3d"),
    "max_pool1d": _pool("max_pool1d", *_POOLING), "max_pool2d": _pool("max_pool2d", *_POOLING),
    "max_pool3d": _pool("max_pool3d", *_POOLING), "avg_pool2d": _pool("avg_pool2d", *_AVERAGE),
    "adaptive_avg_pool1d": _pool("adaptive_avg_pool1d"), "adaptive_avg_pool2d": _pool("adaptive_avg_pool2d"),
    "adaptive_avg_pool3d": _pool("adaptive_avg_pool3d"),
    "pad": _pad, "einsum": _einsum, "cat": _joined("cat"), "stack": _joined("stack"), "one_hot": _one_hot,
    "mean": _reduction("mean"), "sum": _reduction("sum"), "amax": _reduction("amax"), "amin": _reduction("amin"),
    "split": _split, "split_with_sizes": _split,
    "mT": lambda node, given, spell: code(within(spell(given["self"]), ATOM), ".mT"),
    "relu": lambda node, given, spell: call("F.relu", spell(given["self"])),
    "relu6": lambda node, given, spell: call("F.relu6", spell(given["self"])),
    "hardtanh": _hardtanh,
    "silu": lambda node, given, spell: call("F.silu", spell(given["self"])),
}  # fmt: skip
