"""Capture a model as a program: one recorded eager run, ``torch.export`` before decomposition, canonical form, checked.

    interpret(capture(model, args, kwargs), leaves)  =  leaves of model(*args, **kwargs)

at the sizes of the example and at other batch sizes and lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ._torch import pytree
from .build import build
from .canonical import canonicalize
from .export import PREFIX, automatic_sizes, export
from .functional import functionalize
from .program import Program
from .record import clone_leaves, record, register_caches, register_classes
from .signature import Signature


def capture(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
            dynamic_shapes: Any = "auto", mode: str = "auto") -> Program:
    kwargs = dict(kwargs or {})
    register_caches(model)
    register_classes((tuple(args), kwargs))
    args, kwargs = clone_leaves((tuple(args), kwargs))
    recording = record(model, args, kwargs)
    leaves, in_spec = pytree.tree_flatten((tuple(args), kwargs))
    sizes = automatic_sizes(leaves)
    exported = export(model, leaves, in_spec, sizes)
    signature = Signature.of(model.forward, type(model).__name__, args, kwargs, recording.out_spec)
    program = build(exported, model, PREFIX, signature, leaves)
    functionalize(program)
    return canonicalize(program)
