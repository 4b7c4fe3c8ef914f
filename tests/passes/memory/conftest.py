"""What an eager run keeps, observed."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn


def _observed(model: nn.Module, *args: Any, autocast: bool = False) -> int:
    """The bytes that autograd keeps, each storage once, without parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def see(t: torch.Tensor) -> torch.Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage())
        return t

    narrow = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with narrow, torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        model(*args)
    return sum(s.nbytes() for key, s in kept.items() if key not in own)


@pytest.fixture
def observed() -> Any:
    return _observed
