"""Programs timed against each other in turns, so that a machine that slows down slows all of them: A B C A B C …"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Sequence[Any]], Any]


Statistic = Callable[[Sequence[float]], float]


def measure(
    a: Run, b: Run, inputs: Sequence[Any], rounds: int | None = None, statistic: Statistic = statistics.median
) -> tuple[float, float]:
    """The median time of one call of ``a(inputs)`` and of ``b(inputs)``, in µs, after one call of each to warm up.

    Args:
        rounds: how many calls of each; by default as many as fit into a second, five to fifty.
        statistic: ``min`` is for decisions about single ops, which a busy machine must not sway.

    Example:
        >>> a, b = measure(lambda xs: sum(xs), lambda xs: sorted(xs), range(1000), rounds=5)
        >>> a > 0 and b > 0
        True
    """
    if rounds is None:
        rounds = rounds_within(1000.0, a, b, inputs, least=5, most=50)
    first, second = in_turns([a, b], inputs, rounds, statistic)
    return first, second


def in_turns(
    runs: Sequence[Run], inputs: Sequence[Any], rounds: int, statistic: Statistic = statistics.median, milliseconds: float = 0.0
) -> list[float]:
    """The same for any number of runs, each called at least ``rounds`` times, and on until so much time is over."""
    wait = torch.cuda.synchronize if any(isinstance(x, Tensor) and x.is_cuda for x in inputs) else _nothing
    times: list[list[float]] = [[] for _ in runs]
    with torch.no_grad(), _quiet_collector():
        for run in runs:
            run(inputs)
        end = time.perf_counter() + milliseconds / 1e3
        while len(times[0]) < rounds or time.perf_counter() < end:
            for run, found in zip(runs, times, strict=True):
                wait()
                start = time.perf_counter()
                run(inputs)
                wait()
                found.append((time.perf_counter() - start) * 1e6)
    return [statistic(found) for found in times]


def rounds_within(milliseconds: float, a: Run, b: Run, inputs: Sequence[Any], *, least: int = 3, most: int = 200) -> int:
    """How many rounds of ``measure(a, b, inputs)`` fit into a time."""
    first = sum(measure(a, b, inputs, rounds=1))
    return max(least, min(most, int(milliseconds * 1e3 / max(first, 1.0))))


def _nothing() -> None:
    pass


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Inside, the garbage collector does not run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
