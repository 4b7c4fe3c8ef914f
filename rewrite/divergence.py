"""How far a program moves when its weights do, on the user's data and without labels.

KL(dense || edited) per token of the logits, or the mean relative error of the outputs of a model without logits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .interpret import interpret
from .program import Program


class Divergence:
    """The loss of edited weights against the program as it is.

    Args:
        calls: flat inputs; the program's own outputs on them are kept.

    Attributes:
        what: which of the two it is, for a report.
    """

    def __init__(self, program: Program, calls: Sequence[Sequence[Any]], tokens: str = "attention_mask") -> None:
        self.program, self.calls = program, calls
        self.logits = _logits(program)
        self.what = "relative error of the outputs" if self.logits is None else "KL of the logits"
        names = [str(node.target) for node in program.placeholders]
        self.mask = names.index(tokens) if tokens in names else None
        self.wanted = [self._outputs(call, {}) for call in calls]

    def __call__(self, weights: Mapping[str, Tensor], calls: Sequence[int] | None = None) -> float:
        """The mean over the calls (by default all), with these tensors in the place of the weights of these names."""
        chosen = range(len(self.calls)) if calls is None else calls
        losses = [self._loss(self.wanted[i], self._outputs(self.calls[i], weights), self.calls[i]) for i in chosen]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _outputs(self, call: Sequence[Any], weights: Mapping[str, Tensor]) -> list[Tensor]:
        table = self.program.weights
        results = interpret(
            self.program, call, weight=lambda name: weights[name] if name in weights else table.value(name), noise=False
        )
        chosen = results if self.logits is None else [results[self.logits]]
        return [x.float() for x in chosen if isinstance(x, Tensor) and x.is_floating_point()]

    def _loss(self, wanted: list[Tensor], found: list[Tensor], call: Sequence[Any]) -> float:
        if self.logits is None:
            pairs = list(zip(wanted, found, strict=True))
            return sum(float((b - a).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs) / max(1, len(pairs))
        p, q = wanted[0].log_softmax(-1), found[0].log_softmax(-1)
        rows = (p.exp() * (p - q)).sum(-1)
        if self.mask is not None and call[self.mask].shape == rows.shape:
            rows = rows[call[self.mask] != 0]
        return float(rows.mean())


def _logits(program: Program) -> int | None:
    """Which flat output is the user's ``logits``; None if there is no such."""
    outputs = program.output.args[0]
    assert isinstance(outputs, (tuple, list))
    named = program.signature.unflatten(list(range(len(outputs))))
    found = named.get("logits") if isinstance(named, Mapping) else getattr(named, "logits", None)
    return found if isinstance(found, int) else None
