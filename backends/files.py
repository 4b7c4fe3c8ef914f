"""Where a file is written: what can be, all of it or nothing, and which sizes it leaves free."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
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


@contextlib.contextmanager
def staged(folder: Path, path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder whose entries are put into ``folder`` when the body ends: all of them, or none if anything raises.

    Args:
        folder: made if it is not there, and then not left behind by a failure.
        path: what the user named, for the sentence.

    Raises:
        UsageError: the disk is full, or it cannot be written for another reason.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tautomer-", dir=folder) as temporary:
            yield Path(temporary)
            # What refers to another entry comes after it: net.onnx after net.onnx.data.
            _move(sorted(Path(temporary).iterdir(), reverse=True), folder)
    except BaseException as failure:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(failure, OSError):
            raise UsageError(f"{path} cannot be written: {failure.strerror or failure}") from failure
        raise


def _move(entries: Sequence[Path], folder: Path) -> None:
    """Put ``entries`` into ``folder``, all or none: weights beside a file are part of it."""
    if len(entries) == 1 and entries[0].is_file():
        os.replace(entries[0], folder / entries[0].name)  # at no moment without the old file
        return
    moved: list[tuple[Path, Path, Path]] = []
    try:
        for entry in entries:
            target, aside = folder / entry.name, entry.with_name(f"{entry.name}.before")
            moved.append((entry, target, aside))
            if target.exists():
                os.replace(target, aside)
            os.replace(entry, target)
    except BaseException:
        for entry, target, aside in moved:
            if not entry.exists():
                os.replace(target, entry)
            if aside.exists():
                os.replace(aside, target)
        raise


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write ``file`` as safetensors, which makes files that only their owner reads: undone here.

    Raises:
        OSError: it cannot be written.
    """
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    file.chmod(mode)


def free_axes(program: Program) -> Iterator[list[int]]:
    """For every tensor input the axes whose size the capture left free; a condition may fix what the graph does not."""
    for index, node in enumerate(program.placeholders):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            given = {axis for leaf, axis in fixed_sizes(program.signature) if leaf == index}
            yield [axis for axis, size in enumerate(value.shape) if static(size) is None and axis not in given]
