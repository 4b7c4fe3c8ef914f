"""``before`` read over symbols: what a pattern is made of, before it is compiled.

before(op, x, eps: Annotated[Scalar, "> 0"])   ->   Call(mul, x, Call(rsqrt, Call(add, …, Variable(eps, "scalar", > 0))))
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import torch

from .canonical import respell
from .errors import PatternError
from .ops import Op, Ops, fill, form_of, show_literal


@dataclass(frozen=True, eq=False)
class Variable:
    """A wildcard, as far as its annotation lets it bind anything.

    Attributes:
        name: as in the rule.
        kind: "", "tensor", "weight", "parameter" or "scalar".
        optional: whether it may be None.
        axes: the names of its axes, ``("*batch", "n", "d")``; None if any shape will do.
        dtypes: the dtypes it may have; any, if empty.
        range: what a scalar must satisfy, ``("> 0", "< 1")``.
    """

    name: str
    kind: str = ""
    optional: bool = False
    axes: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    range: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, annotation: Any) -> Variable:
        """The variable of a parameter of ``before``.

        Raises:
            PatternError: the annotation restricts in a way that is not known.
        """
        optional = type(None) in get_args(annotation)
        if optional:
            (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        kind, *more = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ("",)
        dtypes = tuple(x for x in more if isinstance(x, torch.dtype))
        texts = [x for x in more if x not in dtypes]
        scalar = kind == "scalar"
        fits = re.compile(r"([<>]=?|[!=]=) *-?[\d.]+(e-?\d+)?" if scalar else r"(\*?\w+|\.\.\.)?( (\*?\w+|\.\.\.))*")
        wrong = [x for x in texts if not isinstance(x, str) or not fits.fullmatch(x)] + ([dtypes] if scalar and dtypes else [])
        if wrong or (not scalar and (len(texts) > 1 or sum(axis[0] in "*." for x in texts for axis in x.split()) > 1)):
            example = '"> 0"' if scalar else '"*batch n d"'
            raise PatternError(f"the annotation of {name} restricts it by {more}", hint=f"dtypes, or one text like {example}")
        axes = tuple(texts[0].split()) if texts and not scalar else None
        return cls(name, kind, optional, axes, dtypes, tuple(texts) if scalar else ())

    @property
    def check(self) -> str:
        """What it may bind, as an expression over ``{0}`` for the compiled function, but for its axes; "" if anything."""
        kinds = [f"is_{self.kind}({{0}})"] if self.kind else []
        dtypes = [f"str(dtype({{0}})) in {tuple(map(str, self.dtypes))}"] if self.dtypes else []
        checks = " and ".join(kinds + dtypes + [f"{{0}} {bound}" for bound in self.range])
        return f"({{0}} is None or {checks})" if checks and self.optional else checks

    @property
    def wanted(self) -> str:
        """What it may bind, as a phrase: ``a weight [d] or None for b``."""
        names = {"": "an operand", "scalar": "a number", "parameter": "a parameter (a weight itself)"}
        axes = [] if self.axes is None else [f"[{', '.join(self.axes)}]"]
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        words = [names.get(self.kind, f"a {self.kind}"), *axes, *([f"of {dtypes}"] if dtypes else []), " and ".join(self.range)]
        return " ".join(filter(None, words)) + (" or None" if self.optional else "") + f" for {self.name}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Call:
    """``op(*args)``, its arguments in normal form; ``source`` is the line of the rule that wrote it."""

    op: Op
    args: tuple[Any, ...]
    source: str

    def __str__(self) -> str:
        form = form_of(self.op.target)
        args = list(self.args)
        while form and args and _is_default(args[-1], form.defaults[len(args) - 1]):
            args.pop()
        return f"{self.op.name}({', '.join(map(brief, args))})"


@dataclass(frozen=True, eq=False)
class AnyOf:
    """Spellings of one value."""

    alternatives: tuple[Any, ...]

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(map(brief, self.alternatives)))


@dataclass(frozen=True, eq=False)
class Fact:
    """What is known of something that the pattern binds elsewhere: its width, its dtype."""

    name: str
    of: Any

    def __str__(self) -> str:
        return f"{self.name}({brief(self.of)})"


SYMBOLS = (Variable, Call, AnyOf, Fact)


def brief(x: Any) -> str:
    """An operand in a sentence about something else: ``sqrt(…)``."""
    return f"{x.op.name}(…)" if isinstance(x, Call) else show_literal(x)


def _is_default(x: Any, default: Any) -> bool:
    return not isinstance(x, SYMBOLS) and x == default


class Symbols(Ops):
    """Patterns: an equation is matched. What it spells in another way than a canonical graph is spelled as there."""

    source = ""

    def apply(self, op: Op, *args: Any, **kwargs: Any) -> Any:
        outer, frame = self.source, sys._getframe(1)
        if not outer:
            source = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}: "
            self.source = source + linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        try:
            filled = _from_the_end(op, fill(op.target, args, kwargs), self.source)
            return respell(self, op.target, filled, Call(op, filled, self.source))
        finally:
            self.source = outer

    def any_of(self, *alternatives: Any) -> AnyOf:
        return AnyOf(alternatives)

    def constant(self, x: Any) -> bool:
        variables = list(variables_of(x))
        return bool(variables) and all(variable.kind in ("weight", "parameter") for variable in variables)

    def inside(self, x: Any, name: str) -> tuple[Any, ...] | None:
        return x.args if isinstance(x, Call) and x.op.name == name else None

    def width(self, x: Any) -> Fact:
        return Fact("width", x)

    def dtype(self, x: Any) -> Fact:
        return Fact("dtype", x)


def _from_the_end(op: Op, args: tuple[Any, ...], source: str) -> tuple[Any, ...]:
    """Axes in a pattern count from the end, as ``normal`` counts them; a permutation tells its own rank."""
    form = form_of(op.target)
    if form is None:
        return args
    normalised = list(args)
    for position in form.dims:
        dims = args[position]
        if op.name == "permute" and isinstance(dims, (list, tuple)):
            normalised[position] = [d - len(dims) if d >= 0 else d for d in dims]
        elif any(isinstance(d, int) and d >= 0 for d in (dims if isinstance(dims, (list, tuple)) else (dims,))):
            raise PatternError(f"the axis {dims} of op.{op.name} counts from the front", where=source, hint="count from the end")
    return tuple(normalised)


def trace(before: Callable[..., Any]) -> tuple[tuple[Variable, ...], tuple[Any, ...]]:
    """The variables and the roots of ``before(op, *variables)``."""
    parameters = list(inspect.signature(before, eval_str=True).parameters.values())[1:]
    variables = tuple(Variable.of(p.name, p.annotation) for p in parameters)
    result = before(Symbols(), *variables)
    return variables, tuple(result) if isinstance(result, (tuple, list)) else (result,)


# -- reading a pattern -----------------------------------------------------------------------------------------


def children(pattern: Any) -> Sequence[Any]:
    if isinstance(pattern, Call):
        return pattern.args
    if isinstance(pattern, AnyOf):
        return pattern.alternatives
    return pattern if isinstance(pattern, (list, tuple)) else ()


def variables_of(pattern: Any) -> Iterator[Variable]:
    if isinstance(pattern, Variable):
        yield pattern
    for child in children(pattern):
        yield from variables_of(child)


def size_of(pattern: Any) -> int:
    sizes = list(map(size_of, children(pattern)))
    return max(sizes) if isinstance(pattern, AnyOf) else sum(sizes) + isinstance(pattern, Call)


def depth_of(pattern: Any) -> int:
    return max(map(depth_of, children(pattern)), default=0) + isinstance(pattern, Call)


def calls_of(pattern: Any) -> Iterator[Call]:
    if isinstance(pattern, Call):
        yield pattern
    for child in children(pattern):
        yield from calls_of(child)


def operands_of(args: Sequence[Any]) -> Iterator[Call]:
    """The calls among the arguments of a call, whatever their spelling."""
    for arg in args:
        if isinstance(arg, Call):
            yield arg
        else:
            yield from operands_of(children(arg))


def may_meet(a: Any, b: Any) -> bool:
    """Whether one value could fit both patterns, as far as their ops and literals tell."""
    for x, y in ((a, b), (b, a)):
        if isinstance(x, AnyOf):
            return any(may_meet(alternative, y) for alternative in x.alternatives)
        if isinstance(x, (Variable, Fact)):
            return not isinstance(y, Call) or (isinstance(x, Variable) and x.kind not in ("scalar", "parameter"))
    if isinstance(a, Call) and isinstance(b, Call):
        exchanged = [(*a.args[1::-1], *a.args[2:])] if a.op.commutative else []
        return a.op.target is b.op.target and any(may_meet(args, b.args) for args in (a.args, *exchanged))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(may_meet, a, b))
    return not isinstance(a, Call) and not isinstance(b, Call) and bool(a == b)
