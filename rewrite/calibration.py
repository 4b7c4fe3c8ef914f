"""Run a program on the user's data, and let a pass see the values of chosen nodes as they come.

One call at a time: a pass keeps a sum or a maximum, never the values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .errors import TautomerError, UsageError
from .expected import check, expected
from .interpret import Observer, interpret
from .program import Program


@dataclass
class Data:
    """Example calls of the captured model, to measure on.

    Attributes:
        calls: any iterable of calls; a call is a tensor (the only argument), a tuple or list (the positional arguments) or a
            mapping (the keyword arguments). One that can be read again (a list, a ``DataLoader``) serves several passes.
        tell: called with a few words before each call.
    """

    calls: Iterable[Any]
    tell: Callable[[str], None] = field(default=lambda words: None, repr=False)
    _spent: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.calls, (Tensor, Mapping, str)) or not isinstance(self.calls, Iterable):
            shown = type(self.calls).__name__
            raise UsageError(f"data is an iterable of example calls, not one {shown}", hint="data=[…] or a DataLoader")

    @torch.no_grad()
    def watch(
        self, program: Program, nodes: Collection[fx.Node], see: Observer, only: Callable[[int], bool] = lambda call: True
    ) -> int:
        """Run ``program`` once on every call, in its own dtype and without dropout.

        Args:
            nodes: whose values are shown, in the order of the graph, call by call.
            see: takes a node and its value; it must not keep the value.
            only: whether to run a call, by its number from 0; asked when its turn comes.

        Returns:
            The number of calls.

        Raises:
            UsageError: there is no call, one does not fit the captured model (says which), or ``calls`` was an iterator that
                is spent.
        """
        wanted = set(nodes)

        def observe(node: fx.Node, value: Any) -> None:
            if node in wanted:
                see(node, value)

        return self._run((program,), lambda inputs, outputs: None, observe, only)

    @torch.no_grad()
    def outputs(self, programs: Sequence[Program], see: Callable[[Sequence[Any], list[tuple[Any, ...]]], None]) -> int:
        """Run programs with one signature on every call: ``see(flat inputs, [flat outputs of each])``.

        Returns, raises: as ``watch``.
        """
        return self._run(programs, see)

    def _run(
        self, programs: Sequence[Program], see: Callable[..., None], observe: Observer | None = None,
        only: Callable[[int], bool] = lambda call: True,
    ) -> int:  # fmt: skip
        count = 0
        for count, flat in enumerate(self.each(programs[0]), 1):
            if not only(count - 1):
                continue
            try:
                found = [interpret(program, flat, observe=observe, noise=False) for program in programs]
            except TautomerError:
                raise
            except Exception as failure:
                problem = str(failure).splitlines()[0]
                raise UsageError(f"data[{count - 1}]: {programs[0].name} fails on it: {problem}") from failure
            see(flat, found)
        return count

    def gradients(
        self, program: Program, nodes: Collection[fx.Node], loss: Callable[[list[Any], tuple[Any, ...]], Tensor], see: Observer
    ) -> None:
        """Run ``program`` once on every call, and show the gradient of ``loss(flat inputs, flat outputs)`` for each of ``nodes``
        that it depends on. Parameters get none.

        Raises:
            UsageError: as of ``watch``.
        """
        wanted = set(nodes)
        for flat in self.each(program):
            values = dict[fx.Node, Tensor]()

            def observe(node: fx.Node, value: Any, values: dict[fx.Node, Tensor] = values) -> None:
                if node in wanted:
                    values[node] = value if value.requires_grad else value.requires_grad_()

            with torch.enable_grad():
                asked = loss(flat, interpret(program, flat, observe=observe, noise=False))
                found = torch.autograd.grad(asked, list(values.values()), allow_unused=True)
            for node, gradient in zip(values, found, strict=True):
                if gradient is not None:
                    see(node, gradient)

    def each(self, program: Program) -> Iterator[list[Any]]:
        """The flat inputs of every call, one at a time.

        Raises:
            UsageError: as of ``watch``.
        """
        if self._spent:
            raise UsageError("data is an iterator that has been read, and is needed again", hint="a list, or a DataLoader")
        calls = iter(self.calls)
        self._spent = calls is self.calls
        inputs, count = expected(program), 0
        for count, call in enumerate(calls, 1):
            self.tell(f"calibrating on call {count}")
            yield self._bound(program, inputs, call, count - 1)
        if not count:
            raise UsageError("data holds no call", hint="a list or a DataLoader of example inputs")

    def _bound(self, program: Program, inputs: Any, call: Any, index: int) -> list[Any]:
        try:
            flat = program.signature.bind(*_arguments(call))
            check(flat, inputs, program.name)
        except UsageError as wrong:
            raise UsageError(f"data[{index}]: {wrong.what}", hint=wrong.hint) from wrong
        return flat


def _arguments(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, Tensor):
        return (call,), {}
    if isinstance(call, Mapping):
        return (), dict(call)
    if isinstance(call, (tuple, list)):
        return tuple(call), {}
    raise UsageError(f"a call is a tensor, a tuple of arguments or a dict of keyword arguments, not {type(call).__name__}")
