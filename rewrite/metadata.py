"""The metadata of a new node: what the op returns on fake tensors, remembered.

    memo[target, what the op can see of its operands] -> result

A fake op costs 60 to 400 µs, ten times that with symbolic sizes; a rewrite that fires in every layer asks the same
question every time. Strides are part of the key: views are legal or not by them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import FakeTensorMode, any_batch, fakes_made_once, one_at_a_time, quiet_fakes
from .errors import Refused
from .library import FAKES
from .ops import CONVOLUTIONS, fill
from .program import target_name
from .shapes import key, same_shape, show, tensor_key
from .weights import Expression


@dataclass(frozen=True)
class Derived:
    """A weight that is not in the table yet.

    Attributes:
        expression: what it is, over the leaves.
        fake: its shape, dtype and device.
    """

    expression: Expression
    fake: Tensor


_UNKNOWN = object()


class Metadata:
    """Fake results by question, for one fake mode (one program)."""

    def __init__(self, mode: FakeTensorMode | None) -> None:
        self.mode = mode
        self.memo: dict[Hashable, Any] = {}
        # A key is a number: hashing and comparing symbols is slow. The tensor is kept beside it, so that its id stays its own.
        self.keys: dict[int, tuple[Tensor, int]] = {}
        self.numbers: dict[Hashable, int] = {}

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake result of ``target`` on operands: nodes, derived weights, fake tensors, literals.

        Raises:
            Refused: the op does not accept these operands.
        """
        spelled = (id(target), *map(self.key, args), self.key(tuple(kwargs.items())) if kwargs else None)
        result = self.memo.get(spelled, _UNKNOWN)
        if result is _UNKNOWN:
            question = self._question(target, args, kwargs)
            if question not in self.memo:
                values = {name: value_of(x) for name, x in kwargs.items()}
                self.memo[question] = self._run(target, value_of(args), values)
            result = self.memo[spelled] = self.memo[question]
        return result

    def learn(self, node: fx.Node) -> None:
        """Remember what the capture knows about a call, and with a view about the reshape that it is."""
        view = node.target is torch.ops.aten.view.default
        for target in (node.target, torch.ops.aten.reshape.default) if view else (node.target,):
            self.memo[self._question(target, node.args, node.kwargs)] = node.meta.get("val")

    def _question(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """What the result depends on; that of a convolution looks the same with a bias and without."""
        filled = fill(target, args, kwargs)
        return id(target), self.key((*filled[:2], *filled[3:]) if target in CONVOLUTIONS else filled)

    def key(self, x: Any) -> Hashable:
        """Everything an op can see of an operand."""
        if x.__class__ is fx.Node:
            x = x.meta.get("val")
        elif x.__class__ is Derived:
            x = x.fake
        if known := self.keys.get(id(x)):
            return known[1]
        if isinstance(x, Tensor):
            number = self.numbers.setdefault(tensor_key(x), len(self.numbers))
            self.keys[id(x)] = (x, number)
            return number
        if isinstance(x, (list, tuple)):
            return tuple(map(self.key, x))
        if isinstance(x, torch.SymInt):
            return ("symbol", key(x))
        return (x.__class__, x)  # 1, 1.0 and True are three questions

    def _run(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = self.mode or contextlib.nullcontext()
        with one_at_a_time(), mode, torch.no_grad(), any_batch(), fakes_made_once(), quiet_fakes():
            try:
                return FAKES.get(str(target), target)(*args, **kwargs)
            except Exception as error:
                shown = ", ".join(show(x.shape) if isinstance(x, Tensor) else str(x) for x in args)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                reason = reason.replace(
                    "Guard attempted while ShapeEnv guards are frozen:", "PyTorch cannot tell for every input whether"
                )
                raise Refused(f"{getattr(target, '__name__', target)}({shown}) is impossible: {reason}") from error

    def agree(self, old: Any, new: Any) -> bool:
        """Whether two results are interchangeable to every reader, strides included."""
        return old is new or self.key(old) == self.key(new)


def value_of(x: Any) -> Any:
    """The fake value of a node or a derived weight; a literal is its own value."""
    if isinstance(x, fx.Node):
        return x.meta.get("val")
    if isinstance(x, (list, tuple)):
        return tuple(map(value_of, x))
    return x.fake if isinstance(x, Derived) else x


def difference(old: Any, new: Any) -> str | None:
    """How two results differ in shape, dtype or device, as a phrase; None if a reader cannot tell them apart."""
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return next((d for d in map(difference, old, new) if d), None)
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None if type(old) is type(new) else f"{type(old).__name__} became {type(new).__name__}"
    if not same_shape(old.shape, new.shape):
        return f"shape {show(old.shape)} became {show(new.shape)}"
    if old.dtype != new.dtype:
        return f"{old.dtype} became {new.dtype}"
    return None if old.device == new.device else f"{old.device} became {new.device}"


def refresh(node: fx.Node, metadata: Metadata, overlay: dict[fx.Node, Any]) -> Any:
    """The fake result of an existing node, with ``overlay`` in place of some operands' metadata.

    Raises:
        Refused: the node cannot run on what its operands become.
    """
    value = lambda x: overlay[x] if x in overlay else x.meta.get("val")  # noqa: E731
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    try:
        return metadata.call(node.target, args, kwargs)  # type: ignore[arg-type]
    except Refused as refusal:
        raise Refused(f"'{target_name(node)}' downstream could not run: {refusal}") from refusal
