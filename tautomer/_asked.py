"""The front door: questions about a model. What its backward keeps, why a rewrite did not fire, what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tautomer.backends.onnx_table import ROWS
from tautomer.backends.rewritten import Rewritten
from tautomer.backends.targets import TARGETS
from tautomer.backends.to_torch import as_run
from tautomer.passes.recipes import RECIPES
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Rule, nearest_miss
from tautomer.rewrite.saved import SavedTensors, kept_as_written
from tautomer.rewrite.saved import saved_tensors as saved_by

from ._given import Model, capture, check_entry, known, pass_of


def saved_tensors(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    autocast: torch.dtype | None = None,
    mode: str = "train",
) -> SavedTensors:
    """What the backward of one call keeps of its forward: every storage, which node made it, which nodes need it.

    To the byte what ``torch.autograd.graph.saved_tensors_hooks`` sees when the captured program runs, each storage once,
    without parameters and buffers. Nothing is computed and no memory is needed: the graph runs on fake tensors. What
    requires a gradient is what says so: freeze parameters first.

    Args:
        model: a module, rewritten or not, or a program.
        args, kwargs: one example call, whose sizes count; a rewritten module or a program has its own.
        autocast: ``torch.bfloat16`` or ``torch.float16``: as mixed-precision training runs it, casts included.
        mode: as of ``capture``.

    Raises:
        UsageError: ``autocast`` is no 16-bit float, or a rewritten module computes another mode alone.
        CaptureError: see ``capture``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> saved = saved_tensors(model, (torch.randn(10, 8),))
        >>> saved.bytes, saved.by_need
        (2880, {('aten.linear',): 1600, ('aten.gelu',): 1280})
        >>> saved.freed(["gelu"])
        1280
    """
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise UsageError(f"autocast is torch.bfloat16, torch.float16 or None, not {autocast!r}")
    given = kwargs or {}
    if isinstance(model, Rewritten) and model.program is not None:
        program = _in_mode(model, mode)
        held = dict(model.named_parameters(remove_duplicate=False))
        inputs = program.signature.bind(args, given) if args or given else None
        return saved_by(program, inputs, trains=lambda name: name in held and held[name].requires_grad, autocast=autocast)
    program = as_run(capture(model, args, kwargs, dynamic_shapes=None, mode=mode))
    inputs = program.signature.bind(args, given) if args or given else None
    saved = saved_by(program, inputs, autocast=autocast)
    if not isinstance(model, nn.Module):
        return saved
    written = kept_as_written(model, args, given, training=program.mode == "train", autocast=autocast)
    if written is None or written == saved.bytes:
        return saved
    note = (
        f"the forward as it is written keeps {written:,} bytes: the captured graph is in canonical form, without "
        "torch.utils.checkpoint and autograd.Function, and with the dtypes it was captured with"
    )
    return replace(saved, notes=(*saved.notes, note))


def _in_mode(module: Rewritten, mode: str) -> Program:
    """The program that a rewritten module runs, in a mode."""
    program = as_run(module.program)
    wanted = module.training if mode in ("auto", "both", "widest") else mode == "train"
    if program.mode != "both" and (program.mode == "train") != wanted:
        raise UsageError(
            f"{program.name} was captured in {program.mode} mode and computes that alone", hint=f'mode="{program.mode}"'
        )
    flags = {path: module.get_submodule(path).training for path in program.training}
    program.training = flags if module.training == wanted else dict.fromkeys(flags, wanted)
    return program


@dataclass(frozen=True)
class Explanation:
    """Why a rewrite fired where it did, and why not elsewhere.

    Attributes:
        rewrite: its name.
        fired: ids of the applications.
        refused: id and sentence of each refusal.
        sources: the user's source line of each refusal, or None.
        nearest: the nearest miss of a rule that found nothing, or "".
    """

    rewrite: str
    fired: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    sources: tuple[str | None, ...]
    nearest: str = ""

    def __str__(self) -> str:
        lines = [f"{self.rewrite}: fired {len(self.fired)}, declined {len(self.refused)}"]
        lines += [f"  fired at {i.split('@', 1)[-1]}" for i in self.fired]
        for (place, reason), source in zip(self.refused, self.sources, strict=True):
            lines.append(f"  not at {place.split('@', 1)[-1]}: {reason}" + (f"\n    {source}" if source else ""))
        return "\n".join(lines + ([f"  nearest miss: {self.nearest}"] if self.nearest else []))


def explain(
    model: Model,
    rule: str | Pass,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    at: str | None = None,
) -> Explanation:
    """Why a rewrite fires or does not fire, without keeping it.

    Args:
        model: a module with an example call, or a program.
        rule: the rewrite, by name or itself.
        at: only below this module path.

    Example:
        >>> program = capture(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval(), (torch.randn(2, 8),))
        >>> print(explain(program, "layer-norm-to-rms-norm"))
        layer-norm-to-rms-norm: fired 1, declined 0
          fired at 1/layer_norm...
    """
    rewrite = pass_of(rule)
    program = capture(model, args, kwargs)
    if at is not None:
        check_entry(at, program)
    miss = nearest_miss(rewrite, program, at) if isinstance(rewrite, Rule) else None
    context = Context(check=False, only=(at,) if at else ())
    run_passes((rewrite,), program, context, check=False)
    log = context.log
    fired = tuple(a.id for a in log.applications)
    refused = tuple((r.id, r.reason) for r in log.refusals)
    sources = tuple(r.source for r in log.refusals)
    return Explanation(rewrite.name, fired, refused, sources, str(miss) if miss is not None and not fired else "")


@dataclass(frozen=True)
class Catalogue:
    """The rewrites, recipes, targets and ONNX lowerings there are.

    Attributes:
        passes: name, claim, paper, phase, purpose and first docstring line of each rewrite.
        recipes: name to the names of its passes, in order.
        targets: names.
        operators: op, provider, opset, form, dtypes and measurement of each row of the ONNX table, in words.
    """

    passes: tuple[dict[str, str], ...]
    recipes: dict[str, tuple[str, ...]]
    targets: tuple[str, ...]
    operators: tuple[dict[str, str], ...] = ()


def catalogue() -> Catalogue:
    """What there is, as data.

    Example:
        >>> "inference" in catalogue().recipes
        True
    """
    rows = tuple(
        {"name": p.name, "claim": p.claim.name, "note": p.claim.note, "paper": p.paper, "phase": p.phase, "purpose": p.purpose,
         "summary": _summary(p)}
        for p in known().values()
    )  # fmt: skip
    recipes = {name: tuple(p.name for p in recipe().passes()) for name, recipe in RECIPES.items()}
    return Catalogue(rows, recipes, tuple(TARGETS), tuple(row.facts for row in ROWS))


def _summary(rewrite: Pass) -> str:
    module = __import__("sys").modules[type(rewrite).__module__]
    return (module.__doc__ or type(rewrite).__doc__ or "").strip().splitlines()[0]
