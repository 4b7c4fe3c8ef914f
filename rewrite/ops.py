"""The vocabulary: ``op.linear(x, W, b)`` means whatever the interpretation ``op`` makes of it.

Interpreted over symbols it is a pattern, over a graph an emission, over torch a value, over strings a line of the
docs. Where ATen has the op, its overload *is* the semantic op; library.py has the others. The table below only gives an op
a name and says whether it commutes. One that is not in the table is spelled by its overload: ``op(torch.ops.my.op.default)(x)``.
"""

from __future__ import annotations

import difflib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch._ops import OpOverload

from .errors import PatternError
from .lean import LEAN
from .library import tautomer

aten = torch.ops.aten


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: what a rule writes after ``op.``.
        target: the callable in the graph.
        commutative: whether its first two operands may be exchanged.
    """

    name: str
    target: Callable[..., Any]
    commutative: bool = False


TABLE = (
    Op("linear", aten.linear.default),
    Op("matmul", aten.matmul.default),
    Op("bmm", aten.bmm.default),
    Op("mv", aten.mv.default),
    Op("addmm", aten.addmm.default),
    Op("conv1d", aten.conv1d.default),
    Op("conv2d", aten.conv2d.default),
    Op("conv3d", aten.conv3d.default),
    Op("embedding", aten.embedding.default),
    Op("layer_norm", aten.layer_norm.default),
    Op("rms_norm", aten.rms_norm.default),
    Op("group_norm", aten.group_norm.default),
    Op("scaled_dot_product_attention", aten.scaled_dot_product_attention.default),
    Op("softmax", aten.softmax.int),
    Op("dropout", aten.dropout.default),
    Op("gelu", aten.gelu.default),
    Op("silu", aten.silu.default),
    Op("relu", aten.relu.default),
    Op("tanh", aten.tanh.default),
    Op("sigmoid", aten.sigmoid.default),
    Op("exp", aten.exp.default),
    Op("log", aten.log.default),
    Op("erf", aten.erf.default),
    Op("abs", aten.abs.default),
    Op("neg", aten.neg.default),
    Op("sqrt", aten.sqrt.default),
    Op("rsqrt", aten.rsqrt.default),
    Op("square", aten.square.default),
    Op("reciprocal", aten.reciprocal.default),
    Op("add", aten.add.Tensor, commutative=True),
    Op("mul", aten.mul.Tensor, commutative=True),
    Op("sub", aten.sub.Tensor),
    Op("rsub", aten.rsub.Scalar),
    Op("div", aten.div.Tensor),
    Op("pow", aten.pow.Tensor_Scalar),
    Op("vector_norm", aten.linalg_vector_norm.default),
    Op("clamp", aten.clamp.default),
    Op("clamp_min", aten.clamp_min.default),
    Op("maximum", aten.maximum.default, commutative=True),
    Op("where", aten.where.self),
    Op("masked_fill", aten.masked_fill.Scalar),
    Op("mean", aten.mean.dim),
    Op("sum", aten.sum.dim_IntList),
    Op("amax", aten.amax.default),
    Op("var", aten.var.correction),
    Op("var_unbiased", aten.var.dim),
    Op("std", aten.std.correction),
    Op("std_unbiased", aten.std.dim),
    Op("cast", aten.to.dtype),
    Op("copy_cast", aten._to_copy.default),
    Op("type_as", aten.type_as.default),
    Op("detach", aten.detach.default),
    Op("clone", aten.clone.default),
    Op("t", aten.t.default),
    Op("transpose", aten.transpose.int),
    Op("permute", aten.permute.default),
    Op("unsqueeze", aten.unsqueeze.default),
    Op("squeeze", aten.squeeze.dim),
    Op("expand", aten.expand.default),
    Op("reshape", aten.reshape.default),
    Op("view", aten.view.default),
    Op("flatten", aten.flatten.using_ints),
    Op("unflatten", aten.unflatten.int),
    Op("cat", aten.cat.default),
    Op("stack", aten.stack.default),
    Op("split", aten.split.Tensor),
    Op("split_sizes", aten.split_with_sizes.default),
    Op("chunk", aten.chunk.default),
    Op("select", aten.select.int),
    Op("slice", aten.slice.Tensor),
    Op("narrow", aten.narrow.default),
    Op("unbind", aten.unbind.int),
    Op("getitem", operator.getitem),
    Op("crms_norm", tautomer.crms_norm.v1),
    Op("add_layer_norm", tautomer.add_layer_norm.v1),
    Op("add_rms_norm", tautomer.add_rms_norm.v1),
    Op("quick_gelu", tautomer.quick_gelu.v1),
    Op("glu", tautomer.glu.v1),
    Op("rotary", tautomer.rotary.v1),
    Op("normalize", tautomer.normalize.v1),
    *(Op(own.name.partition(".")[0], own.overload) for own in LEAN),
    Op("packed_attention", tautomer.packed_attention.v1),
    Op("cached_attention", tautomer.cached_attention.v1),
    Op("block_linear", tautomer.block_linear.v1),
    Op("kernel_attention", tautomer.kernel_attention.v1),
    Op("hybrid_attention", tautomer.hybrid_attention.v1),
    Op("block_attention", tautomer.block_attention.v1),
    Op("window_attention", tautomer.window_attention.v1),
    Op("top_attention", tautomer.top_attention.v1),
    Op("hyper_attention", tautomer.hyper_attention.v3),
    Op("nystrom_attention", tautomer.nystrom_attention.v1),
    Op("linformer_attention", tautomer.linformer_attention.v1),
    Op("ponet_attention", tautomer.ponet_attention.v1),
    Op("poolformer_attention", tautomer.poolformer_attention.v1),
)
OPS = {entry.name: entry for entry in TABLE}
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
"""Called as (x, W, b, …). They ask about sizes to choose their kernel, which would be a guard: the capture has asked already."""
BY_TARGET = {id(entry.target): entry for entry in TABLE}


def op_of(target: Callable[..., Any]) -> Op:
    """The op of an overload; one outside the table is named by its overload."""
    return BY_TARGET.get(id(target)) or Op(str(getattr(target, "__name__", target)), target)


# -- variables of a rule --------------------------------------------------------------------------------------
#
# An annotation types a variable, ``Annotated`` narrows it further, and ``| None`` lets it be missing:
#
#     q: Annotated[Tensor, "*batch n d"]                       axes by name: a name that occurs twice is one size
#     x: Annotated[Tensor, torch.float16, torch.bfloat16]      one of these dtypes
#     eps: Annotated[Scalar, "> 0"]                            a range
#     b: Annotated[Weight, "d"] | None

Operand = Any
"""A variable without a type: a tensor, None, a number, a dtype, a list. The default."""

Tensor = Annotated[Any, "tensor"]
"""A variable that binds a tensor, weight or not."""

Weight = Annotated[Any, "weight"]
"""A variable that binds a weight, or anything computed from weights alone (a transposed weight)."""

OptionalWeight = Weight | None
"""A variable that binds a weight or None: a bias that may be missing."""

Parameter = Annotated[Any, "parameter"]
"""A variable that binds a weight of the table itself, not something computed from it."""

Scalar = Annotated[Any, "scalar"]
"""A variable that binds a Python number."""


# -- interpretations ------------------------------------------------------------------------------------------


class Ops(ABC):
    """An interpretation of the vocabulary."""

    @abstractmethod
    def apply(self, op: Op, *args: Any, **kwargs: Any) -> Any:
        """What ``op(*args, **kwargs)`` means here."""

    def any_of(self, *alternatives: Any) -> Any:
        """Spellings of one value. Only a pattern looks beyond the first."""
        return alternatives[0]

    def width(self, x: Any) -> Any:
        """The size of the last axis of ``x``."""
        return x.shape[-1]

    def filled(self, size: int, value: float, like: Any) -> Any:
        """A vector of one value, with the dtype and on the device of ``like``."""
        return self(aten.new_full.default)(like, [size], value)

    def dtype(self, x: Any) -> Any:
        """The dtype of ``x``."""
        return x.dtype

    def constant(self, x: Any) -> bool:
        """Whether ``x`` is computed from weights alone, as far as is known here."""
        return False

    def inside(self, x: Any, name: str) -> tuple[Any, ...] | None:
        """The operands of ``x`` if it is known to be a call of the op ``name``."""
        return None

    def weight(self, x: Any) -> Any:
        """``x``, computed once: what is computed from weights alone becomes a weight of its own."""
        return x

    def __call__(self, target: Callable[..., Any]) -> Callable[..., Any]:
        """An op by its overload, for what the table does not name."""
        return partial(self.apply, op_of(target))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in OPS:
            near = difflib.get_close_matches(name, OPS, 1)
            hint = f"op.{near[0]}" if near else "op(torch.ops.namespace.name.overload)"
            raise PatternError(f"there is no op '{name}'", hint=hint)
        return partial(self.apply, OPS[name])


class TorchOps(Ops):
    """Values: an equation is run on tensors."""

    def apply(self, op: Op, *args: Any, **kwargs: Any) -> Any:
        return op.target(*args, **kwargs)


class TextOps(Ops):
    """Text: an equation is read.

    Example:
        >>> TextOps().linear("x", "W", None)
        'linear(x, W, None)'
    """

    def apply(self, op: Op, *args: Any, **kwargs: Any) -> str:
        shown = [show_literal(a) for a in args] + [f"{k}={show_literal(v)}" for k, v in kwargs.items()]
        return f"{op.name}({', '.join(shown)})"

    def width(self, x: Any) -> str:
        return "d"

    def dtype(self, x: Any) -> str:
        return f"dtype of {x}"


def show_literal(x: Any) -> str:
    """A literal for a person: ``float32``, ``[-1]``, ``[d]``."""
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(show_literal, x))}]"
    return str(x).removeprefix("torch.")


_PURE: dict[int, bool] = {}


def is_pure(target: Any) -> bool:
    """Whether equal operands give equal results and nothing else happens: no write, no random numbers."""
    pure = _PURE.get(id(target))
    if pure is None:
        if isinstance(target, OpOverload):
            random = torch.Tag.nondeterministic_seeded in target.tags
            pure = not target._schema.is_mutable and not random and bool(target._schema.returns)
        else:
            pure = getattr(target, "__module__", "") in ("_operator", "math")
        _PURE[id(target)] = pure
    return pure


# -- one form for the arguments of a call ---------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How the arguments of one target are normalised.

    Attributes:
        names: the schema's argument names, in order.
        defaults: one default per argument (None where there is none).
        dims: the positions of the arguments that name axes.
        extra: how many more axes the result has than the operand the axes count (1 for ``unsqueeze``).
        ignored: the positions that change no value (``cudnn_enable``).
    """

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    dims: tuple[int, ...]
    extra: int
    ignored: tuple[int, ...]


_DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "source", "destination"}
_IGNORED = {"cudnn_enable", "cudnn_enabled", "non_blocking"}


_FORMS: dict[int, Form | None] = {}


def form_of(target: Any) -> Form | None:
    """The normal form of a target's arguments; None if it has no schema (``operator.getitem``)."""
    # Keyed by id: hashing an OpOverload is slow Python, and overloads live as long as the process.
    if id(target) not in _FORMS:
        _FORMS[id(target)] = _form(target._schema) if isinstance(target, OpOverload) else None
    return _FORMS[id(target)]


def _form(schema: torch.FunctionSchema) -> Form:
    names = tuple(argument.name for argument in schema.arguments)
    return Form(
        names,
        tuple(argument.default_value for argument in schema.arguments),
        tuple(i for i, name in enumerate(names) if name in _DIMS),
        1 if schema.name in ("aten::unsqueeze", "aten::stack") else 0,
        tuple(i for i, name in enumerate(names) if name in _IGNORED),
    )


def fill(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call in schema order, defaults filled in.

    Raises:
        PatternError: an argument is unknown or given twice, or there are too many.
    """
    form = form_of(target)
    if form is None:
        return (*args, *kwargs.values())
    if len(args) > len(form.names):
        raise PatternError(f"{target} takes {len(form.names)} arguments, {len(args)} were given")
    filled = list(args) + list(form.defaults[len(args) :])
    for name, value in kwargs.items():
        if name not in form.names:
            raise PatternError(f"{target} has no argument '{name}'", hint=f"one of {', '.join(form.names)}")
        filled[form.names.index(name)] = value
    for position in form.ignored:
        filled[position] = form.defaults[position]
    return tuple(filled)


def normal(node: torch.fx.Node) -> tuple[Any, ...]:
    """The arguments of a call in the graph: in schema order, defaults filled in, axes counted from the end."""
    form, args, kwargs = form_of(node.target), node.args, node.kwargs
    if form is None:
        return args
    if kwargs or form.ignored:
        args = fill(node.target, args, kwargs)
    elif len(args) < len(form.defaults):
        args = args + form.defaults[len(args) :]
    return _from_the_end(form, args) if form.dims else args


def _from_the_end(form: Form, args: tuple[Any, ...]) -> tuple[Any, ...]:
    first = args[0]
    operand = first[0] if isinstance(first, (list, tuple)) and first else first
    value = operand.meta.get("val") if isinstance(operand, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return args
    rank = value.ndim + form.extra
    normalised = list(args)
    for position in form.dims:
        dim = args[position]
        if isinstance(dim, int):
            if dim >= 0:
                normalised[position] = dim - rank
        elif isinstance(dim, (list, tuple)):
            normalised[position] = [d - rank if isinstance(d, int) and d >= 0 else d for d in dim]
    if form.names[1:3] == ("dim0", "dim1") and normalised[1] > normalised[2]:
        normalised[1:3] = normalised[2], normalised[1]
    return tuple(normalised)
