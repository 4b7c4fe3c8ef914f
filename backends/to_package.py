"""Write a program as an AOTInductor package, run the package, compare, and only then put it where it was asked for.

program  →  emitted module  →  torch.export  →  Inductor's C++, compiled  →  package.pt2, reloaded and run

The package needs torch where it runs, and nothing else: not tautomer, not the model's code. It is loaded by
``torch._inductor.aoti_load_package`` and called as the example was.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tautomer.rewrite._torch import compile_package, cpp_compiler, load_package, oblivious_sizes, pytree
from tautomer.rewrite.errors import ExportError, UsageError
from tautomer.rewrite.evidence import relative_error
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.program import Program
from tautomer.rewrite.record import clone_leaves, silence
from tautomer.rewrite.samples import samples

from .files import free_axes, staged, writable
from .onnx_check import tensor_outputs, tolerance
from .onnx_names import unsaid
from .to_torch import to_torch


@dataclass(frozen=True)
class PackageReport:
    """What was written and how well it agrees.

    Attributes:
        path: the package.
        device: what it was compiled for.
        bytes: its size.
        error: the worst relative error of an output against PyTorch; None if it was not checked.
        sizes: the input sizes it was checked at.
        conditions: what the sizes of its inputs must satisfy. The package does not ask: at other sizes it is wrong.
    """

    path: Path
    device: str
    bytes: int
    error: float | None = None
    sizes: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path}: an AOTInductor package for {self.device}, {self.bytes / 1e6:.1f} MB"]
        if self.error is None:
            lines.append("not run")
        else:
            lines.append(f"reloaded and run against PyTorch: {self.error:.1e} at {'; '.join(self.sizes)}")
        if self.conditions:
            lines.append(f"only for sizes with {', '.join(self.conditions)}")
        return "\n".join(lines)

    def __rich__(self) -> str:
        return str(self).replace("[", r"\[")


def to_package(program: Program, path: str | os.PathLike[str], *, dynamic: bool = True, check: bool = True) -> PackageReport:
    """Write ``program`` to ``path``; nothing is left behind if it cannot be compiled or does not agree.

    Args:
        dynamic: leave the sizes free that the capture left free; False fixes the example's.
        check: load the package and compare it with the program, at two sizes where sizes are free.

    Raises:
        UsageError: ``path`` cannot be written, or the program computes train mode; before any work.
        ExportError: there is no C++ compiler, an input or output is of a class that torch cannot name in a file, the
            program cannot be compiled, or an output disagrees.

    Example: ``print(to_package(capture(model, args), "model.pt2"))``
    """
    target = writable(path, "model.pt2")
    _validate(program, target)
    program = program.copy()
    program.training = dict.fromkeys(program.training, False)
    with staged(target.parent, path) as folder:
        file = folder / target.name
        _compile(program, file, dynamic)
        error, sizes = _compare(program, file, dynamic) if check else (None, ())
        size = file.stat().st_size
    return PackageReport(target, _device(program), size, error, sizes, _conditions(program))


def _validate(program: Program, target: Path) -> None:
    if target.suffix != ".pt2":
        raise UsageError(f"{target.name} does not end in .pt2, and a package must", hint=f"{target.stem}.pt2")
    if program.mode == "train":
        raise UsageError(f"{program.name} was captured in train mode, a package computes eval mode", hint="call model.eval()")
    if cpp_compiler() is None:
        raise ExportError(
            "there is no C++ compiler, and a package is compiled C++",
            hint="install g++ or clang, or name one in the environment variable CXX",
        )
    for what, spec in (("inputs", program.signature.in_spec), ("outputs", program.signature.out_spec)):
        try:
            pytree.treespec_dumps(spec)
        except Exception as error:
            raise ExportError(
                f"the {what} of {program.name} are of a class that torch has no name for in a file: {_first(error)}",
                hint="tensors, tuples, lists and dicts, or register the class with a serialized_type_name",
            ) from error


def _device(program: Program) -> str:
    values = (node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    return next((value.device.type for value in values if value.device.type != "cpu"), "cpu")


def _conditions(program: Program) -> tuple[str, ...]:
    """What the code of the package takes for granted, besides the sizes that are numbers in it."""
    values = ((index, node.meta.get("val")) for index, node in enumerate(program.placeholders))
    sizes = {index: [s if isinstance(s, int) else str(s) for s in x.shape] for index, x in values if isinstance(x, Tensor)}
    return unsaid(program.signature, sizes)


def _compile(program: Program, file: Path, dynamic: bool) -> None:
    module = to_torch(program)
    leaves = clone_leaves(list(program.example))
    args, kwargs = pytree.tree_unflatten(leaves, program.signature.in_spec)
    sizes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    degenerate = False
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for leaf, free in zip(tensors, free_axes(program), strict=True):
        if free and dynamic:
            sizes[leaf] = dict.fromkeys(free, torch.export.Dim.AUTO)
            degenerate = degenerate or any(leaf.shape[axis] < 2 for axis in free)
    try:
        with silence(), torch.no_grad(), oblivious_sizes() if degenerate else nullcontext():
            shapes = sizes.dynamic_shapes(module, args, kwargs)
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            compile_package(exported, file)
    except Exception as error:
        raise ExportError(f"{program.name} cannot be compiled: {_first(error)}") from error


@torch.no_grad()
def _compare(program: Program, file: Path, dynamic: bool) -> tuple[float, tuple[str, ...]]:
    """The worst relative error of the package's outputs, and the sizes it was measured at."""
    package, bound = load_package(file), tolerance(program)
    others = [(sample.inputs, sample.sizes) for sample in samples(program)] if dynamic else []
    worst, shown = 0.0, list[str]()
    for flat, sizes in [(program.example, _show(program, program.example)), *others]:
        if sizes in shown:
            continue
        try:
            expected = interpret(program, flat)
        except Exception:
            if flat is program.example:
                raise
            continue  # a size that the model itself does not take
        args, kwargs = pytree.tree_unflatten(clone_leaves(list(flat)), program.signature.in_spec)
        try:
            found = program.signature.flatten(package(*args, **kwargs))
        except Exception as failure:
            raise ExportError(f"the package of {program.name} does not run at {sizes}: {_first(failure)}") from failure
        for index in tensor_outputs(program):
            error = relative_error(found[index], expected[index])
            if not error <= bound:
                raise ExportError(
                    f"the package and PyTorch disagree on output {index} at {sizes}: "
                    f"relative error {error:.1e}, allowed {bound:.0e}"
                )
            worst = max(worst, error)
        shown.append(sizes)
    return worst, tuple(shown)


def _show(program: Program, flat: Sequence[Any]) -> str:
    pairs = zip(program.placeholders, flat, strict=True)
    return ", ".join(f"{node.target}{list(x.shape)}" for node, x in pairs if isinstance(x, Tensor))


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
