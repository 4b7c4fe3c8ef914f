"""How far a program moves when its weights do, or a rewrite stands in it, on the user's data and without labels.

KL(dense || edited) per token of the logits, or the mean relative error of the outputs of a model without logits
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .calibration import Data
from .interpret import interpret
from .moments import token_rows
from .program import Program


@dataclass(frozen=True)
class Moved:
    """How far the outputs of a program are from those of another one, on data.

    Attributes:
        what: "KL of the logits", in nats per row that counts, or "relative error of the outputs" of a model without logits.
        mean, worst: over the calls.
        agree: the share of rows that count whose largest logit is the same one; None without logits.
        calls: how many there were.
    """

    what: str
    mean: float
    worst: float
    agree: float | None
    calls: int

    def __str__(self) -> str:
        unit = "" if self.agree is None else " nats"
        same = "" if self.agree is None else f", the largest logit is the same in {self.agree:.1%} of the rows"
        return f"{self.what} {self.mean:.2e}{unit} on {self.calls} calls (the worst call: {self.worst:.2e}){same}"


class Reading:
    """How the outputs of a program are read: its logits, or all its numbers.

    Attributes:
        what: which of the two a loss is, for a report.
    """

    def __init__(self, program: Program, tokens: str = "attention_mask") -> None:
        self.logits = logits_of(program)
        self.what = "relative error of the outputs" if self.logits is None else "KL of the logits"
        names = [str(node.target) for node in program.placeholders]
        self.mask = names.index(tokens) if tokens in names else None

    def outputs(self, results: Sequence[Any]) -> list[Tensor]:
        chosen = results if self.logits is None else [results[self.logits]]
        return [x.float() for x in chosen if isinstance(x, Tensor) and x.is_floating_point()]

    def loss(self, wanted: Sequence[Tensor], found: Sequence[Tensor], inputs: Sequence[Any]) -> float:
        """The mean over the rows of one call whose token counts."""
        if self.logits is None:
            pairs = list(zip(wanted, found, strict=True))
            return sum(float((b - a).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs) / max(1, len(pairs))
        p, q = (self.rows(x, inputs).log_softmax(-1) for x in (wanted[0], found[0]))
        return float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0.0))

    def rows(self, logits: Tensor, inputs: Sequence[Any]) -> Tensor:
        """[N, classes]: those whose token counts."""
        return token_rows(logits, -1, self.counting(inputs))

    def counting(self, inputs: Sequence[Any]) -> Tensor | None:
        """Which tokens of a call count; None for all."""
        return None if self.mask is None else inputs[self.mask] != 0


def divergence(old: Program, new: Program, data: Data, tokens: str = "attention_mask") -> Moved:
    """How far a program is from another one of the same signature, on the calls of ``data``."""
    reading, losses, rows = Reading(old, tokens), list[float](), [0, 0]

    def see(inputs: Sequence[Any], found: Sequence[tuple[Any, ...]]) -> None:
        before, after = map(reading.outputs, found)
        losses.append(reading.loss(before, after, inputs))
        if reading.logits is not None:
            best, other = (reading.rows(x[0], inputs).argmax(-1) for x in (before, after))
            rows[0] += int((best == other).sum())
            rows[1] += best.numel()

    calls = data.outputs((old, new), see)
    agree = rows[0] / rows[1] if rows[1] else None
    return Moved(reading.what, sum(losses) / calls, max(losses), agree, calls)


class Divergence:
    """The loss of edited weights against the program as it is.

    Args:
        calls: flat inputs; the program's own outputs on them are kept.
    """

    def __init__(self, program: Program, calls: Sequence[Sequence[Any]], tokens: str = "attention_mask") -> None:
        self.program, self.calls, self.reading = program, calls, Reading(program, tokens)
        self.wanted = [self._outputs(call, {}) for call in calls]

    def __call__(self, weights: Mapping[str, Tensor], calls: Sequence[int] | None = None) -> float:
        """The mean over the calls (by default all), with these tensors in the place of the weights of these names."""
        chosen = range(len(self.calls)) if calls is None else calls
        losses = [self.reading.loss(self.wanted[i], self._outputs(self.calls[i], weights), self.calls[i]) for i in chosen]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def at(self, nodes: Mapping[fx.Node, int], weights: Mapping[str, Tensor]) -> dict[fx.Node, float]:
        """How far values move: |y' - y| / |y| in the root mean square over the tokens of all calls.

        Args:
            nodes: and which of their axes holds the channels. One call's values are kept at a time.
        """
        lost, power = dict.fromkeys(nodes, 0.0), dict.fromkeys(nodes, 0.0)
        for call in self.calls:
            mask, before = self.reading.counting(call), dict[fx.Node, Tensor]()

            def keep(node: fx.Node, value: Any, before: dict[fx.Node, Tensor] = before, mask: Tensor | None = mask) -> None:
                if node in nodes:
                    before[node] = token_rows(value, nodes[node], mask).double()

            def compare(node: fx.Node, value: Any, before: dict[fx.Node, Tensor] = before, mask: Tensor | None = mask) -> None:
                if node in nodes:
                    y = before.pop(node)
                    power[node] += float(y.square().sum())
                    lost[node] += float((token_rows(value, nodes[node], mask).double() - y).square().sum())

            interpret(self.program, call, observe=keep, noise=False)
            interpret(self.program, call, weight=self._edited(weights), observe=compare, noise=False)
        return {node: (lost[node] / power[node]) ** 0.5 if power[node] > 0 else 0.0 for node in nodes}

    @torch.no_grad()
    def _outputs(self, call: Sequence[Any], weights: Mapping[str, Tensor]) -> list[Tensor]:
        return self.reading.outputs(interpret(self.program, call, weight=self._edited(weights), noise=False))

    def _edited(self, weights: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        return lambda name: weights[name] if name in weights else self.program.weights.value(name)


def logits_of(program: Program) -> int | None:
    """Which flat output is the user's ``logits``; None if there is no such."""
    outputs = program.output.args[0]
    assert isinstance(outputs, (tuple, list))
    named = program.signature.unflatten(list(range(len(outputs))))
    found = named.get("logits") if isinstance(named, Mapping) else getattr(named, "logits", None)
    return found if isinstance(found, int) else None


def sensitivities(
    program: Program, data: Data, nodes: Mapping[fx.Node, int], tokens: str = "attention_mask", seed: int = 0
) -> dict[fx.Node, Tensor]:
    """E[g g^T] of the gradient g of the outputs' log-likelihood at nodes, [channels, channels] in float64.

    An error e of a node moves the outputs by half of E[(g^T e)^2] in KL, to second order. The labels are drawn from the model
    itself (the Fisher information, not its empirical stand-in), so none are needed; numbers are read as means of Gaussians.

    Args:
        nodes: and which of their axes holds the channels. A node that the outputs do not depend on is left out.
        tokens: the input that is zero where a row of the logits does not count.
    """
    generator, reading = torch.Generator().manual_seed(seed), Reading(program, tokens)
    about = {"sites": {node.name: axis for node, axis in nodes.items()}, "tokens": tokens, "seed": seed}
    kept = data.checkpoint("sensitivities", program, about)
    found = {node: kept.saved[f"{node.name} second"] for node in nodes if f"{node.name} second" in kept.saved}
    rows = {node: int(kept.saved[f"{node.name} count"]) for node in found}
    if "generator" in kept.saved:
        generator.set_state(kept.saved["generator"])

    def state() -> dict[str, Tensor]:
        sums = {f"{node.name} second": G for node, G in found.items()}
        counts = {f"{node.name} count": torch.tensor(count) for node, count in rows.items()}
        return {**sums, **counts, "generator": generator.get_state()}

    kept.state = state

    def loss(inputs: list[Any], outputs: tuple[Any, ...]) -> Tensor:
        values = reading.outputs(outputs)
        if reading.logits is None:
            return torch.stack([(x * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in values]).sum()
        logits = reading.rows(values[0], inputs)
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
        likelihood: Tensor = logits.log_softmax(-1).gather(-1, labels).sum()
        return -likelihood

    def see(node: fx.Node, gradient: Tensor) -> None:
        g = gradient.movedim(nodes[node], -1).flatten(0, -2).double()
        found[node] = found[node].to(g.device) + g.T @ g if node in found else g.T @ g
        rows[node] = rows.get(node, 0) + len(g)

    data.gradients(program, list(nodes), loss, see, kept)
    return {node: G / rows[node] for node, G in found.items() if bool(G.isfinite().all()) and bool(G.any())}
