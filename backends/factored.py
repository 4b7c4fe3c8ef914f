"""A leaf module that holds other weights than its class has: two factors in the place of a matrix.

    y = x W^T + b   ->   y = (x V^T) U^T + b        V and U are parameters, W = U V is none any more

What asks a linear layer for its ``weight`` (its dtype, its device, its shape) gets the product, computed at every question. What
would be written to it would be lost, so an assignment to its ``data``, as an adapter makes that is merged, is refused.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tautomer.rewrite._torch import plain_results
from tautomer.rewrite.errors import UsageError

_KEY = "_tautomer_exchanged"


@dataclass(frozen=True)
class Exchanged:
    """The names of the parameters that a module has over its class, and of those it lacks."""

    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def exchanged_weights(module: nn.Module) -> Exchanged:
    """What a module has, and lacks, over its class; copies and pickles of it say the same."""
    found: Exchanged = vars(module).get(_KEY, Exchanged())
    return found


def exchange_weights(module: nn.Module, added: Mapping[str, nn.Parameter], dropped: Collection[str]) -> Callable[[], None]:
    """Let ``module`` hold ``added`` and no longer ``dropped``; what is returned takes that back."""
    parameters, before = dict(module._parameters), exchanged_weights(module)

    def take_back() -> None:
        module._parameters.clear()
        module._parameters.update(parameters)
        vars(module)[_KEY] = before
        if before == Exchanged():
            del vars(module)[_KEY]

    for name in dropped:
        del module._parameters[name]
    module._parameters.update(added)
    own = [name for name in dropped if name not in before.added]
    vars(module)[_KEY] = Exchanged(
        (*(name for name in before.added if name not in dropped and name not in added), *added), (*before.dropped, *own)
    )
    return take_back


def _weight(module: nn.Module) -> Tensor:
    own, held = module._parameters.get("weight"), exchanged_weights(module)
    if own is not None:
        return own
    if "weight" not in held.dropped:
        raise AttributeError(f"{type(module).__name__} holds no weight")
    _, code, _ = vars(type(module))["tautomer_form"]
    read = [node["target"] for node in json.loads(code) if node["op"] == "get_attr" and node["target"] in held.added]
    factors = [module.get_parameter(name) for name in read]
    W = functools.reduce(lambda product, factor: factor.flatten(1) @ product, factors[1:], factors[0].flatten(1))
    if factors[0].ndim > 2:
        W = W.reshape(*W.shape, *factors[0].shape[2:])
    elif not isinstance(module, nn.Linear):
        W = W.T  # the Conv1D of transformers
    return W if torch.compiler.is_compiling() else W.as_subclass(_Shown)


product: Any = property(_weight, doc="The product of the factors, computed at every question; it cannot be written.")
"""What a linear layer answers that is asked for its ``weight`` and holds factors."""


class _Shown(Tensor):
    """A tensor to look at and to compute with."""

    __torch_function__ = plain_results

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UsageError(
            "this layer holds two factors, and their product cannot be written: a merged adapter would be lost",
            hint="keep the adapter beside the layer, or merge it before optimize_(…, recipe='compress')",
        )
