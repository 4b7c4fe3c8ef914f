"""The LayerNorms of a model become Unified Normalization, in place.

LayerNorm(x; gamma, beta) -> UN(x; gamma, beta)        another function: the model must be trained
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tautomer.rewrite.errors import UsageError

from .unified_norm import UnifiedNorm


def replace_layer_norms(model: nn.Module, only: Iterable[str] = (), **options: Any) -> tuple[str, ...]:
    """Put a ``UnifiedNorm`` in the place of every ``nn.LayerNorm`` over one axis, for a model that will be trained.

    gamma and beta are the very parameters of the LayerNorm, under their old names: an optimizer keeps its references, an
    old state dict loads with ``strict=False`` (the running statistics are new). A module that stands in two places is
    replaced by one. A LayerNorm over several axes, or with a forward of its own, is left.

    Args:
        model: changed in place. Call it before ``torch.compile``, ``DistributedDataParallel`` or ``fully_shard``.
        only: module paths; what is not at or below one of them is left. A ``*`` stands for any one part of a path.
        options: of ``UnifiedNorm``: ``momentum``, ``buffer``, ``warmup``, ``outlier_filtration``, and ``eps`` (the LayerNorm's).

    Returns:
        The paths that were replaced.

    Raises:
        UsageError: nothing was replaced, or a path names no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> replace_layer_norms(model, warmup=100)
        ('1',)
    """
    modules = dict(model.named_modules())
    norms = {id(modules[path]): modules[path] for path in selected(model, only) if _local(modules[path])}
    if not norms:
        raise UsageError(f"{type(model).__name__} has no nn.LayerNorm over one axis there")
    if id(model) in norms:
        raise UsageError("a LayerNorm cannot replace itself", hint="replace it where it stands in a model")
    some = next(model.parameters(), torch.empty(0))
    return put(model, {key: _unified(norm, some, options) for key, norm in norms.items()})


def selected(model: nn.Module, entries: Iterable[str]) -> list[str]:
    """The paths of the modules at or below one of ``entries``, of all if there are none; a ``*`` stands for one part of a path.

    Raises:
        UsageError: an entry names no module.
    """
    paths, entries = [path for path, _ in model.named_modules()], tuple(entries)
    below = [re.compile(re.escape(entry).replace(r"\*", r"[^.]*") + r"(\..*)?") for entry in entries]
    for entry, pattern in zip(entries, below, strict=True):
        if not any(map(pattern.fullmatch, paths)):
            near = difflib.get_close_matches(entry, paths, 1)
            raise UsageError(f"'{entry}' is no module of {type(model).__name__}", hint=f"'{near[0]}'" if near else None)
    return [path for path in paths if not entries or any(pattern.fullmatch(path) for pattern in below)]


def put(model: nn.Module, made: Mapping[int, nn.Module]) -> tuple[str, ...]:
    """Put modules in the places of others, which are told by their ids; the paths where that was done."""
    replaced = []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in made:
                parent._modules[name] = made[id(child)]
                replaced.append(f"{path}.{name}" if path else name)
    return tuple(replaced)


def _local(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1


def _unified(norm: Any, some: Tensor, options: dict[str, Any]) -> UnifiedNorm:
    """UN with the parameters of ``norm``; one that has none takes device and dtype from ``some`` parameter of the model."""
    like = some if norm.weight is None else norm.weight
    made = UnifiedNorm(*norm.normalized_shape, **{"eps": norm.eps, **options}, device=like.device, dtype=like.dtype)
    made.weight, made.bias = norm.weight, norm.bias
    return made.train(norm.training)
