"""Which application broke it: bisect by fuel, and replay by id.

good(0 applications) … good(k - 1), bad(k) … bad(all)        ->  the k-th application
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tautomer.backends.rewritten import Rewritten
from tautomer.passes.recipes import Recipe
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.pass_base import Application, Log, Pass
from tautomer.rewrite.target import Target

from ._front import optimize
from ._given import Model, Progress, capture, passes_of

Metric = Callable[[Rewritten], bool]


def bisect(
    model: Model,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    metric: Metric,
    *,
    recipe: str | Recipe = "inference",
    passes: Sequence[str | Pass] | None = None,
    target: str | Target = "eager",
    data: Iterable[Any] | Data | None = None,
    dynamic_shapes: Any = "auto",
    progress: Progress | None = None,
) -> Application | None:
    """The first application that makes ``metric`` fail, by binary search over how many are made; nothing is checked.

    The model is captured once and the target asked once. ``metric`` is called about log2(applications) + 2 times, each time
    with a module on which one application more or less was made. A pass that plans as a whole (``layer-norm-to-rms-norm``)
    may plan otherwise when only some of its applications are allowed: the last one of the smallest failing run is returned.

    Args:
        metric: takes the rewritten module and returns True while it is good.
        model, args, kwargs, recipe, passes, target, dynamic_shapes, progress: as of ``optimize``.
        data: as of ``optimize``, but read again at every step: a list or a ``DataLoader``, no iterator.

    Returns:
        The application, whose ``id`` is what ``skip=`` takes; None if the metric holds with all of them.

    Raises:
        UsageError: the metric fails before anything was rewritten.

    Example: ``bisect(model, args, None, lambda m: distance(m(*args), wanted) < 1e-3).id``
    """
    tell = progress or (lambda phase: None)
    tell("capturing")
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    everything = optimize(program, recipe=recipe, passes=passes, target=target, data=data, check=False)
    pays = {name: gain.pays for name, gain in everything.report.gains.items()}
    admitted = [p for p in passes_of(recipe, passes) if pays.get(p.name, passes is not None or p.phase != "choose")]

    def rewritten(fuel: int) -> Rewritten:
        tell(f"trying {fuel} of {len(everything.report.applications)} applications")
        return optimize(program, passes=admitted, data=data, fuel=fuel, check=False)

    if metric(everything):
        return None
    good, bad, worst = 0, len(everything.report.applications), everything
    if not metric(rewritten(0)):
        raise UsageError("the metric fails before anything was rewritten", hint="try it on the captured model first")
    while bad - good > 1:
        middle = (good + bad) // 2
        module = rewritten(middle)
        if metric(module):
            good = middle
        else:
            bad, worst = middle, module
    return worst.report.applications[-1]


def replay(
    log: Log,
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    data: Iterable[Any] | Data | None = None,
    dynamic_shapes: Any = "auto",
    check: bool = True,
) -> Rewritten:
    """Make exactly the logged applications on a fresh copy of the model; no target is asked.

    Args:
        log: of a report, ``fast.report.log``. Applications may be taken out of it; what builds on them is then missing too.
        passes: the passes the log speaks of, in order; by default they are found by name.
        model, args, kwargs, data, dynamic_shapes, check: as of ``optimize``.

    Raises:
        UsageError: an application could not be made here, or one was made that the log does not have.

    Example: ``replay(fast.report.log, model, args)``
    """
    wanted = [application.id for application in log.applications]
    names = tuple(dict.fromkeys(application.rewrite for application in log.applications))
    named = names if passes is None else passes
    fast = optimize(model, args, kwargs, passes=named, data=data, only=wanted, dynamic_shapes=dynamic_shapes, check=check)
    made = Counter(application.id for application in fast.report.applications)
    if missing := Counter(wanted) - made:
        raise UsageError(f"not every application of the log could be made again: {', '.join(missing)}")
    if extra := made - Counter(wanted):
        raise UsageError(f"applications were made that the log does not have: {', '.join(extra)}")
    return fast
