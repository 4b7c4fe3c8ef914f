"""Whatever is written is there whole or not at all: with a full disk, in every step, with and without an older one there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.onnx import ONNXProgram

import tautomer
from tautomer.backends import files
from tautomer.backends import to_package as package_module
from tautomer.backends.files import staged
from tautomer.backends.to_onnx import to_onnx
from tautomer.backends.to_package import to_package
from tautomer.backends.to_python import to_python
from tautomer.backends.to_torch import to_torch
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import TautomerError, UsageError

X = torch.randn(3, 16)


def net(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width), nn.Linear(width, 4)).eval()


def rewritten(width: int) -> nn.Module:
    model = net(width)
    tautomer.optimize_(model, (X,), target="onnxruntime", dynamic_shapes="static", check=False)
    return model


Write = Callable[[Path], Any]


def onnx(width: int) -> Write:
    program = capture(net(width), (X,))
    return lambda folder: to_onnx(program, folder / "net.onnx", check=False)


def package(width: int) -> Write:
    program = capture(net(width), (X,))
    return lambda folder: to_package(program, folder / "net.pt2", check=False)


def python(width: int) -> Write:
    program = capture(net(width), (X,))
    return lambda folder: to_python(program, folder / "readable", check=False, overwrite=True)


def archive(width: int) -> Write:
    module = to_torch(capture(net(width), (X,)))
    return lambda folder: tautomer.save(module, folder / "saved")


def form(width: int) -> Write:
    model = rewritten(width)
    model.register_module("more", rewritten(width) if width > 20 else None)  # a longer file
    return lambda folder: tautomer.save_form(model, folder / "form")


def drawing(width: int) -> Write:
    program = capture(net(width), (X,))
    return lambda folder: tautomer.draw(program, folder / "net.svg")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(x.relative_to(folder)): x.read_bytes() if x.is_file() else None for x in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("make", [onnx, package, python, archive, form, drawing])
def test_a_full_disk_leaves_what_was_there(make: Any, tmp_path: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_module, "compile_package", lambda exported, file: file.write_text("compiled" * 100))
    save = ONNXProgram.save  # with the weights beside the file, as above 2 GB
    monkeypatch.setattr(ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    old, new, empty = (tmp_path / name for name in ("old", "new", "empty"))
    for folder in (old, new, empty):
        folder.mkdir()
    make(16)(old)
    write = make(24)
    write(new)
    before, wanted = contents(old), contents(new)
    sizes = sorted({len(data) for data in wanted.values() if data})
    for size, folder, expected in ((sizes[0], empty, {}), *((size, old, before) for size in sizes)):
        with full_disk(size - 1), pytest.raises(TautomerError) as caught:
            write(folder)
        assert "File too large" in str(caught.value) and contents(folder) == expected


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_entries_are_moved_together(there: bool, at: int, tmp_path: Path, failing: Any) -> None:
    # Without weights of its own beside it an old file would read the new ones.
    def fill(folder: Path, text: str) -> None:
        (folder / "file").write_text(text)
        (folder / "package").mkdir(exist_ok=True)
        (folder / "package" / "inner").write_text(text)

    target = tmp_path / "target"
    if there:
        target.mkdir()
        fill(target, "old")
    failing(files.os, "replace", at, KeyboardInterrupt())
    if at > 2 and not there:
        with staged(target, "here") as beside:
            fill(beside, "new")
    else:
        with pytest.raises(KeyboardInterrupt), staged(target, "here") as beside:
            fill(beside, "new")
    kept = "old" if there else "new"
    assert target.exists() == (there or at > 2)
    assert contents(tmp_path) == (
        {"target": None, "target/file": kept.encode(), "target/package": None, "target/package/inner": kept.encode()}
        if target.exists()
        else {}
    )


def test_folders_that_were_made_are_taken_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "a" / "b", "a/b") as beside:
        (beside / "file").write_text("half")
        raise ZeroDivisionError
    assert contents(tmp_path) == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a/b cannot be written: "), staged(tmp_path / "file" / "b", "a/b"):
        pass
