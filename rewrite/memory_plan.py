"""What was chosen for each block so that the backward keeps no more than a budget: bytes before and after, FLOPs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .printed import printed


@dataclass(frozen=True)
class Chosen:
    """One block of a plan.

    Attributes:
        block: its module path, or what it is.
        choice: "keep", "checkpoint", or what else is done with what it would keep.
        rewrites: the rewrites that may fire in it, by name.
        before, after: the bytes that are kept for it; what several blocks need is the first one's.
        flops: what the backward computes again of it.
    """

    block: str
    choice: str
    rewrites: tuple[str, ...]
    before: int
    after: int
    flops: int


@dataclass(frozen=True)
class MemoryPlan:
    """What the backward of a program will keep, block by block.

    Attributes:
        budget: the bytes that it may keep.
        captured: the bytes that it keeps as captured, before anything was recognised.
        forward: the FLOPs of the forward.
        blocks: in order, with what stands outside of them.
    """

    budget: int
    captured: int
    forward: int
    blocks: tuple[Chosen, ...]

    @property
    def before(self) -> int:
        return sum(block.before for block in self.blocks)

    @property
    def after(self) -> int:
        return sum(block.after for block in self.blocks)

    @property
    def flops(self) -> int:
        return sum(block.flops for block in self.blocks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        again = f"{self.flops:,} FLOPs are computed again, {self.flops / max(self.forward, 1):.1%} of the forward"
        yield Text(f"  plan: {self.captured:,} → {self.after:,} bytes, the budget is {self.budget:,}; {again}")
        table = Table("block", "choice", "bytes", "→", "FLOPs again", box=None, pad_edge=True)
        for (choice, before, after, flops), run in groupby(self.blocks, lambda b: (b.choice, b.before, b.after, b.flops)):
            table.add_row(*map(Text, (_span(list(run)), choice, f"{before:,}", f"{after:,}", f"{flops:,}")))
        yield table

    def __str__(self) -> str:
        return printed(self)


def _span(run: Sequence[Chosen]) -> str:
    first, last = run[0].block, run[-1].block
    return first if len(run) == 1 else f"{first} … {last}, each"
