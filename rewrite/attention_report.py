"""What became of the attentions of a model: the form that stands there, how far off it is, and why an attention was left alone.

place      off by ‖y' - y‖ / ‖y‖ on the inputs of the original, before and after it learnt
the whole  KL(before || after) of the logits, against the sum of what every place moves alone
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .claims import ARCHITECTURE
from .divergence import Moved

TRAIN = "this is another function than the model was: train it before it is used"


@dataclass(frozen=True)
class Learning:
    """How a form learnt what attention gave.

    Attributes:
        steps: calls it was trained on; 0 where nothing trains, and what it starts with was measured.
        before, after: the relative error of its output on the calls that are held out. The loss is the square of it.
        stopped: whether it no longer improved, and stopped before the last step.
        kept: whether what it learnt was kept; where it was no better, it is as it started.
    """

    steps: int
    before: float
    after: float
    stopped: bool = False
    kept: bool = True


@dataclass(frozen=True)
class Place:
    """One attention of the model.

    Attributes:
        id: ``rewrite@module path/node``.
        replaced: whether another form stands there now.
        reason: why not, in a sentence; "" if it is replaced.
        error: the relative error of its output on data, on the inputs of the original; None if it was not measured.
        learning: how it learnt; None if there was nothing to learn, or no data.
        alone: how far the outputs of the model move if it alone is replaced; None without a budget.
        source: the user's source line, if known.
    """

    id: str
    replaced: bool
    reason: str = ""
    error: float | None = None
    learning: Learning | None = None
    alone: float | None = None
    source: str | None = None

    @property
    def path(self) -> str:
        """The module path, or the name of the call at the root."""
        place = self.id.partition("@")[2]
        return place.rpartition("/")[0] or place


@dataclass(frozen=True)
class Selection:
    """Which attentions were chosen under a budget.

    Attributes:
        budget: how far the outputs may move.
        predicted: the sum of what every chosen attention moves alone.
        measured: how far they move together.
        how: "planned" by a dynamic program over what each moves alone, whose plan held when it was measured, with others added
            while that stayed within the budget; or "greedy", one by one, because the plan did not hold.
    """

    budget: float
    predicted: float
    measured: float
    how: str

    def __str__(self) -> str:
        told = f"budget {self.budget:.2e}: each alone {self.predicted:.2e} in sum, together {self.measured:.2e}; "
        return told + ("as planned" if self.how == "planned" else "one by one, for the plan did not hold")


@dataclass(frozen=True)
class AttentionReport:
    """What one rewrite made of the attentions of a model.

    Attributes:
        method: the rewrite's name.
        claim: its claim's name.
        places: every attention that was found, in the order of the program.
        moved: how far the outputs moved on data; None without data, or if nothing was replaced.
        selection: how the budget was spent; None without one.
    """

    method: str
    claim: str
    places: tuple[Place, ...]
    moved: Moved | None = None
    selection: Selection | None = None

    @property
    def replaced(self) -> tuple[Place, ...]:
        return tuple(place for place in self.places if place.replaced)

    @property
    def calibrated(self) -> bool:
        """Whether all that stands there has learnt, or was measured, on data."""
        return bool(self.replaced) and all(place.learning is not None for place in self.replaced)

    def lines(self) -> Iterator[str]:
        """The whole, in sentences."""
        if not self.places:
            yield f"{self.method}: no attention was recognised in this model, so there was nothing to replace"
            return
        yield f"{self.method}: {len(self.replaced)} of {len(self.places)} attentions replaced"
        if self.moved is not None:
            yield f"on data: {self.moved}"
        if self.calibrated:
            yield self._learnt()
        elif self.replaced and self.claim == ARCHITECTURE.name:
            yield TRAIN
        if self.selection is not None:
            yield str(self.selection)

    def _learnt(self) -> str:
        learnt = [place.learning for place in self.replaced if place.learning is not None]
        steps, stopped = max(x.steps for x in learnt), sum(x.stopped for x in learnt)
        before, after = (sum(loss) / len(learnt) for loss in zip(*((x.before**2, x.after**2) for x in learnt), strict=True))
        told = f"calibrated on data: {f'{steps} steps' if steps else 'measured, nothing to train'}, "
        told += f"loss {before:.3g} → {after:.3g} on calls held out (the mean of ‖y' - y‖² / ‖y‖²)"
        return told + (f", {stopped} stopped early" if stopped else "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.places:
            yield self._table()
        yield from (Text(f"  {line}") for line in self.lines())

    def _table(self) -> Table:
        rows = [_row(self.method, place) for place in self.places]
        names = [name for name in _COLUMNS if any(row[name] for row in rows)]
        table = Table(*names, box=None, pad_edge=True)
        for row in rows:
            table.add_row(*(Text(row[name]) for name in names))
        return table


_COLUMNS = ("attention", "now", "off by", "before", "steps", "alone", "why not")


def _row(method: str, place: Place) -> dict[str, str]:
    learnt = place.learning
    return {
        "attention": place.path,
        "now": method if place.replaced else "as it was",
        "off by": "" if place.error is None or not place.replaced else f"{place.error:.2g}",
        "before": "" if learnt is None else f"{learnt.before:.2g}",
        "steps": "" if learnt is None else f"{learnt.steps}{' (stopped)' * learnt.stopped}{' (not kept)' * (not learnt.kept)}",
        "alone": "" if place.alone is None else f"{place.alone:.1e}",
        "why not": place.reason.partition("\n")[0],
    }
