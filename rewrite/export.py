"""``torch.export`` on flat inputs: every leaf its own tensor, sizes symbolic where the model allows it.

The model is exported inside a wrapper whose forward takes the flat leaves, so that argument names, ``**kwargs`` and
registered classes make no difference to torch. What torch prints about a failure is swallowed; the user gets one
sentence and the line of their own code.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import oblivious_sizes, pytree, quick_export, short_bodies
from .errors import CaptureError, DataDependent, UsageError
from .functions import without_checkpoints
from .record import clone_leaves, silence, undisturbed

PREFIX = "model"
Sizes = dict[int, Any] | Sequence[Any] | None


class Flat(nn.Module):
    """``model`` as a function from flat inputs to flat outputs."""

    def __init__(self, model: nn.Module, in_spec: Any) -> None:
        super().__init__()
        self.model = model
        self.in_spec = in_spec

    def forward(self, *leaves: Any) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.in_spec)
        return list(pytree.tree_leaves(self.model(*args, **kwargs)))


def export(
    model: nn.Module, leaves: Sequence[Any], in_spec: Any, sizes: Sequence[Sizes], *, oblivious: bool = False
) -> torch.export.ExportedProgram:
    """Export ``model`` on the flat inputs ``leaves``; ``sizes`` gives the dynamic dims of each leaf.

    Raises:
        CaptureError: with the user's line and what to try.
    """
    shapes = (tuple(sizes),) if any(size is not None for size in sizes) else None
    sizing = oblivious_sizes() if oblivious else contextlib.nullcontext()
    with undisturbed(model), silence(), sizing, quick_export(), without_checkpoints(), short_bodies():
        try:
            inputs = tuple(clone_leaves(list(leaves)))
            return torch.export.export(Flat(model, in_spec), inputs, strict=False, dynamic_shapes=shapes)
        except Exception as error:
            raise explain(error, type(model).__name__) from None


# -- which sizes are dynamic ----------------------------------------------------------------------------------


def automatic_sizes(leaves: Sequence[Any], length: int | None, cached: Sequence[bool], embedded: bool = False) -> list[Sizes]:
    """The first size of every leaf, and every size that is the length of a sequence.

    Args:
        length: the length of the sequences among the leaves, None if there are none.
        cached: for every leaf, whether it is part of a cache, or of what an encoder returned: its length is another one.
        embedded: whether the sequences are ``[batch, sequence, width]``: their width is none of the sizes, and each may have a
            length of its own, which a mask then shares with it.
    """
    tensors = [leaf if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]
    lengths = {length} if length is not None and length > 1 else set()
    if lengths and embedded:
        lengths |= {x.shape[1] for x in tensors if x is not None and _has_width(x) and x.shape[1] > 2}
    return [x if x is None else _automatic(x, lengths, inside, embedded) for x, inside in zip(tensors, cached, strict=True)]


def _has_width(leaf: Tensor) -> bool:
    return leaf.dim() == 3 and leaf.is_floating_point()


def _automatic(leaf: Tensor, lengths: Set[int], cached: bool, embedded: bool) -> Sizes:
    tokens = leaf.dim() == 2 and not leaf.is_floating_point() and not leaf.is_complex()
    dims = {0}
    if tokens:
        dims.add(1)
    last = 2 if embedded and _has_width(leaf) else leaf.dim()
    dims.update(dim for dim in range(1, last) if leaf.shape[dim] in lengths)
    if cached and (leaf.dim() == 4 or _has_width(leaf)):  # a cache, the states of an encoder
        dims.add(leaf.dim() - 2)
    return dict.fromkeys(sorted(dims), torch.export.Dim.AUTO)


def given_sizes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], spec: Any) -> list[Sizes]:
    """A ``dynamic_shapes`` in the form ``torch.export`` takes, as one entry per flat leaf.

    Raises:
        UsageError: the specification does not fit the inputs.
    """
    if isinstance(spec, str):
        near = difflib.get_close_matches(spec, ("auto", "static"), 1)
        raise UsageError(f"there are no dynamic_shapes {spec!r}", hint=f'"{near[0]}"' if near else 'one of "auto", "static"')
    if hasattr(spec, "dynamic_shapes"):  # ShapesCollection, AdditionalInputs
        spec = spec.dynamic_shapes(model, tuple(args), dict(kwargs))
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    named = spec if isinstance(spec, Mapping) else dict(zip(bound, spec, strict=False))
    variadic = {p.name: p.kind for p in inspect.signature(model.forward).parameters.values()}
    by_name: dict[str, Any] = {}
    positional: list[Any] = []
    for name in bound:
        entry = named.get(name)
        if variadic[name] is inspect.Parameter.VAR_POSITIONAL:
            positional.extend(entry or [None] * len(bound[name]))
        elif variadic[name] is inspect.Parameter.VAR_KEYWORD:
            by_name.update(entry or {key: named.get(key) for key in bound[name]})
        else:
            by_name[name] = entry
            if name not in kwargs:
                positional.append(entry)
    try:
        sizes = _spread([list(args), dict(kwargs)], [positional[: len(args)], {name: by_name.get(name) for name in kwargs}])
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"dynamic_shapes does not fit the inputs: {error}", hint="give one entry per argument, as torch.export takes them"
        ) from None
    for leaf, size in zip(pytree.tree_leaves((tuple(args), dict(kwargs))), sizes, strict=True):
        for dim in size if isinstance(size, Mapping) else ():
            if not isinstance(leaf, Tensor) or not isinstance(dim, int) or not 0 <= dim < leaf.dim():
                shape = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise UsageError(f"dynamic_shapes does not fit the inputs: {shape} has no dimension {dim}")
    return sizes


def _spread(tree: Any, spec: Any) -> list[Sizes]:
    if spec is None:
        return [None] * len(pytree.tree_leaves(tree))
    children, structure = pytree.tree_flatten(tree, is_leaf=lambda x: x is not tree)
    if structure.is_leaf():
        return [spec]
    if isinstance(spec, Mapping):
        entries = [spec.get(key) for key in tree] if isinstance(tree, Mapping) else list(spec.values())
    else:
        entries = list(spec)
    return [size for child, entry in zip(children, entries, strict=True) for size in _spread(child, entry)]


# -- what went wrong ------------------------------------------------------------------------------------------

_REASONS: tuple[tuple[str, type[CaptureError], str, str], ...] = (
    (
        r"data-dependent|DataDependent|unbacked|\bu\d+\b|Could not guard",
        DataDependent,
        "decides by the values of a tensor, which a graph cannot",
        "torch.where or torch.cond for the decision, or take it out of forward: .item(), .tolist(), `if tensor:` decide",
    ),
    (
        r"[Cc]onstraints violated|dynamic_shapes|specializ",
        CaptureError,
        "cannot run with the dynamic_shapes that were asked for",
        'dynamic_shapes="auto", or dynamic_shapes=None for exactly the sizes of the example',
    ),
    (
        r"pytree|not supported|unsupported.*(input|output)",
        CaptureError,
        "takes or returns an object that torch.export does not know",
        "tensors, tuples, dicts and dataclasses, or register the class with torch.utils._pytree.register_pytree_node",
    ),
)


def explain(error: BaseException, owner: str) -> CaptureError:
    """The sentence for an exception that came out of ``torch.export``."""
    text = f"{type(error).__name__}: {error}"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = user_line(error)
    for pattern, kind, reason, hint in _REASONS:
        if re.search(pattern, text):
            return kind(f"{owner} {reason} ({first[:200]})", where=where, hint=hint)
    return CaptureError(
        f"{owner} cannot be captured: {type(error).__name__}: {first[:300]}",
        where=where,
        hint="torch operations for what this line does, or to take it out of forward",
    )


def user_line(error: BaseException) -> str | None:
    """The innermost line of the traceback that is neither torch's, nor Python's, nor ours."""
    library = sysconfig.get_path("stdlib")
    ours = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    seen: BaseException | None = error
    while seen is not None:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            own = frame.filename.startswith(ours) or frame.filename.startswith("<")
            standard = frame.filename.startswith(library) and "site-packages" not in frame.filename
            if not own and not standard:
                return f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()}"
        seen = seen.__cause__ or seen.__context__
    return None
