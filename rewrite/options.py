"""What a user gives a recipe or a pass, held to the annotations of what takes it.

    window: int          64, and neither True, "64" nor 64.5
    budget: float        a number that is not nan
    of: Literal["a"]     one of the words

Two checks for everything that has options: its kind here, before anything compares it, and where a number may lie (``least``).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UsageError


def check_options(owner: Any, given: Mapping[str, Any] | None = None) -> None:
    """Hold options to their annotations.

    Args:
        owner: a dataclass, all of whose fields are options; it is told by its ``name``, or else by that of its class.
        given: the arguments of ``__init__`` by name, for an owner that is no dataclass. Others are passed over.

    A number of NumPy's is one: what a dataclass was given of it is Python's afterwards. What cannot be told at run time (a name
    that only type checkers import) is not held to anything.

    Raises:
        UsageError: an option is of another kind.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Window:
        ...     width: int = 3
        >>> check_options(Window(4))
    """
    kind = type(owner)
    try:
        hints = get_type_hints(kind if given is None else kind.__init__)
    except NameError:
        return
    values = {x.name: getattr(owner, x.name) for x in fields(owner)} if given is None else given
    for name, given_value in values.items():
        value = _plain(given_value)
        if given is None and value is not given_value:
            object.__setattr__(owner, name, value)  # it may be frozen
        if name in hints and not _is(value, hints[name]):
            raise UsageError(f"{_name(owner)}: {name} is {value!r}, which is no {_words(hints[name])}")


def least(owner: Any, **smallest: float) -> None:
    """Hold numbers among the attributes of ``owner`` to the smallest that each may be; None is no number.

    Raises:
        UsageError: one is smaller.

    Example: ``least(self, window=1, sinks=0)``
    """
    for name, bound in smallest.items():
        value = getattr(owner, name)
        if value is not None and not value >= bound:
            raise UsageError(f"{_name(owner)}: {name} is {value!r}", hint=f"{bound} or more")


def _name(owner: Any) -> str:
    return str(getattr(owner, "name", type(owner).__name__))


def _plain(value: Any) -> Any:
    """A scalar of NumPy's as Python's own, also in a list or a tuple; all else as it is."""
    if type(value) in (list, tuple):
        plain = [_plain(x) for x in value]
        return value if all(a is b for a, b in zip(plain, value, strict=True)) else type(value)(plain)
    scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if scalar else value


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (tuple, Sequence):  # a word is a sequence of words
        return isinstance(value, origin) and not isinstance(value, str) and all(_is(x, inner[0]) for x in value)
    if hint in (int, float):  # True is an int for Python alone
        return isinstance(value, int | hint) and not isinstance(value, bool) and value == value
    kind = type(None) if hint is None else origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(hint: Any) -> str:
    """An annotation as a user reads it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(map(_words, inner))
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (tuple, Sequence):
        return f"{origin.__name__} of {_words(inner[0])}"
    if origin is Callable:
        return "function"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
