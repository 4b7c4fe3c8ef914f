"""Run a program on the user's data, and let a pass see the values of chosen nodes as they come.

One call at a time: a pass keeps a sum or a maximum, never the values. Sums over many calls may be kept in a folder meanwhile
(checkpoint.py), so that nothing is lost when a calibration is interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import pytree
from .checkpoint import Checkpoint, fingerprint
from .errors import TautomerError, UsageError
from .expected import check, expected
from .interpret import Observer, interpret
from .program import Program


@dataclass
class Data:
    """Example calls of the captured model, to measure on.

    Attributes:
        calls: any iterable of calls; a call is a tensor (the only argument), a tuple or list (the positional arguments) or a
            mapping (the keyword arguments). One that can be read again (a list, a ``DataLoader``) serves several passes. Keyword
            arguments of the example call that hold no tensor (``use_cache=False``) need not be repeated.
        tell: called with a few words before each call.
        folder: where the statistics of a calibration are kept while it runs, or None: the same calls of the same model go on from
            there. What is there of another model, of other calls, or damaged, is refused.
        every: after how many calls they are written. Also when reading the next call fails.

    Raises:
        UsageError: ``calls`` is one call, or no iterable; ``every`` is less than 1.

    Example: ``optimize(model, args, recipe=tautomer.Compress(), data=tautomer.Data(batches, folder="statistics"))``
    """

    calls: Iterable[Any]
    tell: Callable[[str], None] = field(default=lambda words: None, repr=False)
    folder: str | PathLike[str] | None = None
    every: int = 32
    _spent: bool = field(default=False, repr=False)
    _own: set[Path] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.calls, (Tensor, Mapping, str)) or not isinstance(self.calls, Iterable):
            shown = type(self.calls).__name__
            raise UsageError(f"data is an iterable of example calls, not one {shown}", hint="data=[…] or a DataLoader")
        if not isinstance(self.every, int) or self.every < 1:
            raise UsageError(f"every is {self.every!r}", hint="how many calls are between two writes, 1 or more")

    def checkpoint(self, what: str, program: Program, about: Mapping[str, Any]) -> Checkpoint:
        """The sums ``what`` over all calls, as far as an earlier run came with them.

        Args:
            about: which values of the program are summed.

        Raises:
            UsageError: what the folder has is of another model, or damaged.
        """
        if self.folder is None:
            return Checkpoint()
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        file = Path(self.folder) / f"{what}-{name}.safetensors"
        anew = file in self._own  # of an attempt of this run, on the program as it was then
        self._own.add(file)
        found = Checkpoint(file, {"program": fingerprint(program), **about}, self.every, anew)
        if found.known:
            self.tell(f"{found.known} calls are in {file}")
        return found

    @torch.no_grad()
    def watch(
        self, program: Program, nodes: Collection[fx.Node], see: Observer, only: Callable[[int], bool] = lambda call: True,
        kept: Checkpoint | None = None,
    ) -> int:  # fmt: skip
        """Run ``program`` once on every call, in its own dtype and without dropout.

        Args:
            nodes: whose values are shown, in the order of the graph, call by call.
            see: takes a node and its value; it must not keep the value.
            only: whether to run a call, by its number from 0; asked when its turn comes.
            kept: the sums that ``see`` adds to; what they hold is not run.

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

        return self._run((program,), lambda inputs, outputs: None, observe, only, kept)

    @torch.no_grad()
    def outputs(self, programs: Sequence[Program], see: Callable[[Sequence[Any], list[tuple[Any, ...]]], None]) -> int:
        """Run programs with one signature on every call: ``see(flat inputs, [flat outputs of each])``.

        Returns, raises: as ``watch``.
        """
        return self._run(programs, see)

    def _run(
        self, programs: Sequence[Program], see: Callable[..., None], observe: Observer | None = None,
        only: Callable[[int], bool] = lambda call: True, kept: Checkpoint | None = None,
    ) -> int:  # fmt: skip
        kept = kept or Checkpoint()
        for index, flat in self._calls(programs[0], kept):
            if not only(index):
                continue
            try:
                found = [interpret(program, flat, observe=observe, noise=False) for program in programs]
            except TautomerError:
                raise
            except Exception as failure:
                problem = str(failure).splitlines()[0]
                raise UsageError(f"data[{index}]: {programs[0].name} fails on it: {problem}") from failure
            see(flat, found)
        return kept.calls

    def gradients(
        self, program: Program, nodes: Collection[fx.Node], loss: Callable[[list[Any], tuple[Any, ...]], Tensor], see: Observer,
        kept: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        """Run ``program`` once on every call, and show the gradient of ``loss(flat inputs, flat outputs)`` for each of ``nodes``
        that it depends on. Parameters get none. ``kept`` is as of ``watch``.

        Raises:
            UsageError: as of ``watch``.
        """
        wanted = set(nodes)
        for _, flat in self._calls(program, kept or Checkpoint()):
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

    def each(self, program: Program, kept: Checkpoint | None = None) -> Iterator[list[Any]]:
        """The flat inputs of every call that ``kept`` does not hold, one at a time.

        Raises:
            UsageError: as of ``watch``.
        """
        for _, flat in self._calls(program, kept or Checkpoint()):
            yield flat

    def _calls(self, program: Program, kept: Checkpoint) -> Iterator[tuple[int, list[Any]]]:
        """The calls that ``kept`` does not hold, by number; it is told when one is done."""
        if self._spent:
            raise UsageError("data is an iterator that has been read, and is needed again", hint="a list, or a DataLoader")
        calls = iter(self.calls)
        self._spent = calls is self.calls
        inputs = expected(program)
        while True:
            try:
                flat = self._bound(program, inputs, next(calls), kept.calls)
            except StopIteration:
                break
            except BaseException:
                kept.save()
                raise
            if kept.has(flat):
                continue
            self.tell(f"calibrating on call {kept.calls}")
            yield kept.calls - 1, flat
            kept.added()
        if not kept.calls:
            raise UsageError("data holds no call", hint="a list or a DataLoader of example inputs")
        kept.ended()

    def _bound(self, program: Program, inputs: Any, call: Any, index: int) -> list[Any]:
        try:
            args, kwargs = _arguments(call)
            flat = program.signature.bind(args, {**_constants(program, len(args)), **kwargs})
            check(flat, inputs, program.name)
        except UsageError as wrong:
            raise UsageError(f"data[{index}]: {wrong.what}", hint=wrong.hint) from wrong
        return flat


def _constants(program: Program, positional: int) -> dict[str, Any]:
    """The keyword arguments of the example call that hold no tensor, but for those that a call gives by position."""
    _, given = pytree.tree_unflatten(list(program.example), program.signature.in_spec)
    taken = [argument.name for argument in program.signature.arguments[:positional]]
    plain = {name: x for name, x in given.items() if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x))}
    return {name: x for name, x in plain.items() if name not in taken}


def _arguments(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, Tensor):
        return (call,), {}
    if isinstance(call, Mapping):
        return (), dict(call)
    if isinstance(call, (tuple, list)):
        return tuple(call), {}
    raise UsageError(f"a call is a tensor, a tuple of arguments or a dict of keyword arguments, not {type(call).__name__}")
