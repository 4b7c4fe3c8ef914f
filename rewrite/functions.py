"""What ``torch.export`` makes of an ``autograd.Function``: its forward. The backward that its author wrote is lost.

A reentrant checkpoint is such a function, and the only one whose backward is known: it is the derivative of what it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.autograd import Function
from torch.utils import checkpoint

from ._torch import in_checkpoint, plain_checkpoints


def defined() -> bool:
    """Whether there is any such class besides torch's own."""
    pending = [Function]
    while pending:
        kind = pending.pop()
        pending.extend(kind.__subclasses__())
        if not kind.__module__.startswith("torch."):
            return True
    return False


def applied(outputs: Iterable[Any]) -> dict[str, str | None]:
    """The classes that ``outputs`` were computed with, and the line of their backward."""
    found: dict[str, str | None] = {}
    pending = [y.grad_fn for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        kind = getattr(node, "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith("torch."):
            code = getattr(kind.backward, "__code__", None)
            found[kind.__name__] = f"{code.co_filename}:{code.co_firstlineno}: def backward" if code is not None else None
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        pending.extend(following)
    return found


@contextlib.contextmanager
def without_checkpoints() -> Iterator[None]:
    """Inside, a checkpoint is a plain call, whose nodes carry its name: the forward of a reentrant one runs without gradients,
    and a graph of it would have none."""

    def apply(run: Any, preserve: bool, *args: Any) -> Any:
        with in_checkpoint():
            return run(*args)

    with patch.object(checkpoint.CheckpointFunction, "apply", staticmethod(apply)), plain_checkpoints():
        yield
