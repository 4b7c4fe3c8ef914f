"""``torch.compile(model, backend="tautomer")``: the graphs of torch.compile, rewritten, checked, and handed to Inductor.

    graph of torch functions → program → rewritten, held to its claims → the same inputs, the same outputs → Inductor

What cannot be taken, rewritten or compiled goes on as it was: a compilation fails where it would have failed without us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import fx

from tautomer.backends.to_lifted import to_lifted
from tautomer.passes.recipes import Compile
from tautomer.rewrite._torch import backend_named, restarts
from tautomer.rewrite.errors import Refused, UsageError
from tautomer.rewrite.lifted import lift
from tautomer.rewrite.pass_base import Context, Log
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import source_of
from tautomer.rewrite.record import silence
from tautomer.rewrite.report import Report, Size


@dataclass(frozen=True)
class CompiledGraph:
    """One graph that torch.compile handed over.

    Attributes:
        source: the first line of the user's in it, or "".
        report: what fired, what did not and why, how exact; None if the graph went on as it was.
        reason: why it went on as it was, or "".
    """

    source: str
    report: Report | None
    reason: str = ""

    def __str__(self) -> str:
        where = f"from {self.source}\n" if self.source else ""
        return where + (str(self.report) if self.report is not None else f"  went on as it was: {self.reason}\n")


class Compiler:
    """A backend of torch.compile that rewrites before it compiles.

    ``torch.compile(model, backend="tautomer")`` is ``torch.compile(model, backend=tautomer.compiler)``, for inference and
    training. ``mode=`` and ``options=`` of torch.compile are those of the backend behind it.

    Args:
        then: the backend that compiles what was rewritten, by name or itself; "eager" runs it.
        check: hold every rewrite to its claim, on the inputs that the graph is compiled for.

    Attributes:
        graphs: what was compiled, in order; ``torch.compiler.reset()`` forgets it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
        >>> mine = Compiler(then="eager")
        >>> y = torch.compile(model, backend=mine)(torch.randn(2, 4))
        >>> len(mine.graphs)
        1
    """

    __name__ = "tautomer"

    def __init__(self, then: str | Callable[..., Any] = "inductor", *, check: bool = True) -> None:
        if then is self or then == "tautomer":
            raise UsageError("tautomer cannot be the backend behind itself", hint='"inductor" or "eager"')
        self.then = then
        self.check = check
        self.graphs: list[CompiledGraph] = []

    def __call__(
        self, graph_module: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Any = None
    ) -> Callable[..., Any]:
        finish = backend_named(self.then, mode, options)
        before = graph_module.graph
        source = next(filter(None, map(source_of, before.nodes)), None) or ""
        try:
            with silence():
                report = self._rewrite(graph_module, inputs)
            compiled = finish(graph_module, inputs)
        except Exception as failure:
            graph_module.graph = before
            if restarts(failure):
                raise
            compiled = finish(graph_module, inputs)
            self.graphs.append(CompiledGraph(source, None, _sentence(failure)))
        else:
            self.graphs.append(CompiledGraph(source, report))
        return compiled

    def reset(self) -> None:
        """Forget what was compiled: what ``torch.compiler.reset()`` calls."""
        self.graphs.clear()

    def __str__(self) -> str:
        return "\n".join(map(str, self.graphs)) or "nothing was compiled"

    def _rewrite(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Report:
        """Rewrite a graph in place; it is as it was if nothing fires."""
        start = perf_counter()
        recipe = Compile(trains=torch.is_grad_enabled())
        lifted = lift(graph_module, inputs)
        original, seconds = lifted.program.copy(), perf_counter() - start
        with torch.inference_mode(False), torch.enable_grad():
            outcome = run_passes(recipe.passes(), lifted.program, Context(log=Log()), check=self.check)
        if outcome.log.applications:
            to_lifted(lifted, graph_module)
        return Report(
            lifted.program.name,
            str(getattr(self.then, "__name__", self.then)),
            outcome.log,
            (),
            Size.of(original),
            Size.of(lifted.program),
            outcome.gains,
            outcome.evidence,
            None,
            {"capture": seconds} | outcome.seconds,
        )


def _sentence(failure: Exception) -> str:
    first = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    return first if isinstance(failure, Refused) else f"{type(failure).__name__}: {first}"


compiler = Compiler()
"""The backend "tautomer" of torch.compile, and the report of every graph it compiled."""
