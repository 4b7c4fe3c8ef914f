"""The linear layers of a model become structured ones, in place.

linear(x, W, b) -> linear(x, W', b), W' a product of structured factors        another function: the model must be trained
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Literal

from torch import nn

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.structured import BlockDense, BlockShuffle, Form, Init, LowRank

from .block_dense import BlockDenseLinear
from .block_shuffle import BlockShuffleLinear
from .low_rank import LowRankLinear
from .replace import put, selected
from .self_guided import SelfGuidedLinear
from .structured import StructuredLinear, dense_of

_KINDS: dict[type[Form], type[StructuredLinear]] = {
    LowRank: LowRankLinear,
    BlockDense: BlockDenseLinear,
    BlockShuffle: BlockShuffleLinear,
}


def replace_linears(
    model: nn.Module, form: Form | Callable[[int, int], Form], only: Iterable[str] = (), *, skip: Iterable[str] = (),
    keep_first: bool = False, init: Init | Literal["nearest"] = "nearest", std: float | None = None, guide: bool = False,
    merge_below: int = 0,
) -> tuple[str, ...]:  # fmt: skip
    """Put a structured layer in the place of every linear layer, for a model that will be trained.

    Linear layers are ``nn.Linear`` and the Conv1D of transformers. A layer's bias stays the very parameter; the factors are new
    ones, so make the optimizer afterwards. A module that stands in two places is replaced by one.

    Args:
        model: changed in place. Call it before ``torch.compile``, ``DistributedDataParallel`` or ``fully_shard``.
        form: the structure, or a function from a layer's outputs and inputs to it: ``LowRank(64)``, ``LowRank.at(0.625)``.
        only: module paths; what is not at or below one of them is left. A ``*`` stands for any one part of a path:
            ``transformer.h.*.mlp``. The papers replace feedforward layers and leave attention as it is.
        skip: module paths that are left, written alike.
        keep_first: leave the first of a list of blocks as it is, as the papers do.
        init: "nearest" to the layer's own weights, or how fresh factors start (the form's paper: "spectral" for LowRank, else
            "orthogonal"). A fresh start is for models that are not trained yet; the bias stays what it is in either case.
        std: of what a fresh start draws; see ``StructuredLinear``.
        guide: keep the dense weight, to lead the training: see ``SelfGuidance``. After a fresh start it is the factors' product.
        merge_below: as of ``StructuredLinear``.

    Returns:
        The paths that were replaced.

    Raises:
        UsageError: nothing was replaced, a path names no module, a weight is tied to another module's, or a layer has no such
            form. The model is then what it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> replace_linears(model, LowRank.at(0.5))
        ('0', '2')
    """
    modules = dict(model.named_modules())
    left = set(selected(model, skip)) if (skip := tuple(skip)) else set()
    found = [(path, dense_of(modules[path])) for path in selected(model, only) if path not in left]
    dense = {path: layer for path, layer in found if layer is not None and not (keep_first and _in_first_block(path, modules))}
    if not dense:
        raise UsageError(f"{type(model).__name__} has no linear layer there")
    if "" in dense:
        raise UsageError("a linear layer cannot replace itself", hint="replace it where it stands in a model")
    _require_own_weights(modules, dense)
    made: dict[int, nn.Module] = {}
    for path, layer in dense.items():
        n, m = layer.in_features, layer.out_features
        try:
            chosen = form if isinstance(form, Form) else form(m, n)
            sizes, kind = astuple(chosen), _KINDS[type(chosen)]  # type: ignore[call-overload]
            structured = kind.from_dense(layer, *sizes, init=init, std=std, merge_below=merge_below)
        except UsageError as error:
            raise UsageError(f"'{path}': {error.what}", hint=error.hint) from error
        weight = layer.weight if init == "nearest" else None
        made[id(modules[path])] = SelfGuidedLinear(structured, weight) if guide else structured
    return put(model, made)


def _in_first_block(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the layer stands in the first of several blocks of a list."""
    parts = path.split(".")
    for depth in range(len(parts) - 1):
        parent = modules[".".join(parts[:depth])]
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) and len(parent) > 1:
            return parent[0] is modules[".".join(parts[: depth + 1])]
    return False


def _require_own_weights(modules: dict[str, nn.Module], dense: dict[str, nn.Linear]) -> None:
    """Refuse a weight that another module reads too: its two readers would learn apart."""
    readers: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            readers.setdefault(id(parameter), []).append(path)
    for path in dense:
        other = next((other for other in readers[id(modules[path]._parameters["weight"])] if other != path), None)
        if other is not None:
            raise UsageError(f"the weight of '{path}' is tied to that of '{other}'", hint=f"skip=['{path}']")
