"""Before a file is written: where it goes, and which sizes it leaves free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Program
from tautomer.rewrite.shapes import static

from .onnx_names import fixed_sizes


def writable(path: str | os.PathLike[str], example: str) -> Path:
    """The absolute path of a file that can be written; ``example`` is a name for it.

    Raises:
        UsageError: it cannot.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"name a file, {example}")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise UsageError(f"{path} cannot be written")
    return target


def free_axes(program: Program) -> Iterator[list[int]]:
    """For every tensor input the axes whose size the capture left free; a condition may fix what the graph does not."""
    for index, node in enumerate(program.placeholders):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            given = {axis for leaf, axis in fixed_sizes(program.signature) if leaf == index}
            yield [axis for axis, size in enumerate(value.shape) if static(size) is None and axis not in given]
