"""Self-guided training: a dense matrix leads the structured layer that takes its place, and leaves.

    o = alpha W x + (1 - alpha) U (V x) + b         W = U V at the start, or a pretrained matrix
    alpha = (1 + cos(pi t / T)) / 2                 from 1 at the first step to 0 after T steps; then W is dropped

In the cheap form W x is computed with probability alpha alone; where it is not, o = U (V x) + b.

arXiv:2406.16450 (Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.errors import UsageError

from .callbacks import Callback
from .replace import put
from .structured import StructuredLinear


class SelfGuidedLinear(nn.Module):
    """A structured layer and the dense matrix that leads it.

    Args:
        layer: the structured layer, whose bias counts for both.
        weight: the dense matrix [out_features, in_features]; a parameter is taken itself. By default the layer's own.

    Attributes:
        alpha: the share of the dense matrix; ``SelfGuidance`` sets it.
        guided: whether the dense product is computed in training.

    Example:
        >>> layer = LowRankLinear(8, 16, 4)
        >>> guided, x = SelfGuidedLinear(layer), torch.randn(3, 8)
        >>> torch.allclose(guided(x), layer(x), atol=1e-6)
        True
    """

    _share: Tensor

    def __init__(self, layer: StructuredLinear, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None and weight.shape != (layer.out_features, layer.in_features):
            raise UsageError(f"the dense matrix is {list(weight.shape)}, the layer [{layer.out_features}, {layer.in_features}]")
        weight = layer.merged() if weight is None else weight
        self.layer, self.guided = layer, True
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("_share", torch.ones((), dtype=wide, device=weight.device), persistent=False)
        self.alpha = 1.0
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach().clone())

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        # What is compiled reads a tensor and a flag, not the number: it would be compiled at every step.
        self._alpha, self._led = alpha, alpha > 0
        self._share.fill_(alpha)

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer."""
        y: Tensor = self.layer(x)
        if not self._led or (self.training and not self.guided):
            return y
        return torch.lerp(y, F.linear(x, self.weight, self.layer.bias), self._share.to(y.dtype))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.3f}"


class SelfGuidance(Callback):
    """Lets alpha fall, step by step, in every ``SelfGuidedLinear`` of a model, and puts the structured layers in their places.

    Args:
        model: whose self-guided layers it leads (``replace_linears(…, guide=True)`` makes them).
        steps: T, after how many steps the dense matrices are gone. The paper takes a half of the training, or, to train with the
            operations of an unguided one, 0.3 to 0.43.
        cheap: compute a dense product in a step with probability alpha alone. All ranks of a distributed training draw alike.
        optimizers: where the dense matrices are taken out when they are dropped, so that what is kept for them is freed.
        seed: of the draws.

    Raises:
        UsageError: there is no self-guided layer.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        cheap: bool = False,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        seed: int = 0,
    ) -> None:
        self.model, self.steps, self.cheap, self.seed = model, steps, cheap, seed
        self.optimizers = tuple(optimizers)
        self.layers = [module for module in model.modules() if isinstance(module, SelfGuidedLinear)]
        if not self.layers:
            raise UsageError("there is no self-guided layer", hint="replace_linears(model, form, guide=True) makes them")
        if steps < 1:
            raise UsageError(f"steps={steps}: alpha needs a step at least to fall from 1 to 0")
        self.seek(0)

    @property
    def alpha(self) -> float:
        return (1 + math.cos(math.pi * self.count / self.steps)) / 2 if self.count < self.steps else 0.0

    def seek(self, count: int) -> None:
        super().seek(count)
        self.after_step()

    def after_step(self) -> None:
        if not self.alpha:
            self.drop()
        draws = torch.rand(len(self.layers), generator=torch.Generator().manual_seed(self.seed + self.count))
        for layer, draw in zip(self.layers, draws.tolist(), strict=True):
            layer.alpha, layer.guided = self.alpha, not self.cheap or draw < self.alpha

    def drop(self) -> None:
        """Put the structured layers in the places of the self-guided ones, and forget the dense matrices."""
        put(self.model, {id(layer): layer.layer for layer in self.layers})
        gone = {id(layer.weight) for layer in self.layers}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for weight in [weight for weight in group["params"] if id(weight) in gone]:
                    optimizer.state.pop(weight, None)
                group["params"] = [weight for weight in group["params"] if id(weight) not in gone]
        self.layers = []
