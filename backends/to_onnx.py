"""Write a program as an ONNX file, run the file on ONNX Runtime, compare, and only then put it where it was asked for.

program  ->  emitted module  ->  torch.export  ->  torch.onnx with our lowering table  ->  checked file
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxscript.optimizer
import torch
from torch import Tensor, nn

from tautomer.rewrite._torch import known_translations, oblivious_sizes, one_at_a_time, quick_export, short_bodies
from tautomer.rewrite.errors import ExportError, UsageError
from tautomer.rewrite.lean import LEAN
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.program import Program, arguments
from tautomer.rewrite.shapes import static

from .files import free_axes, staged, writable
from .liger import FORWARD
from .onnx_check import PROVIDERS, Reference, compare, first_difference, require_provider, tensor_outputs, tolerance
from .onnx_names import moved_counts, name_sizes, name_weights, named, rename, unsaid
from .onnx_rules import node_first
from .onnx_table import of_others, table
from .to_torch import to_torch

OPSETS = range(18, 25)


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how well it agrees.

    Attributes:
        path: the file.
        opset: its ONNX operator set.
        provider: "cpu" or "cuda", where it was checked.
        nodes: how many nodes of every operator it has.
        bytes: its size, external weights included.
        error: the worst relative error of an output against PyTorch; None if it was not checked.
        sizes: the input sizes it was checked at.
        conditions: what else the sizes of its inputs must satisfy. The file cannot hold a call to them: at other sizes the
            user's forward takes another branch and the file is wrong.
    """

    path: Path
    opset: int
    provider: str
    nodes: Mapping[str, int]
    bytes: int
    error: float | None = None
    sizes: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()

    def __str__(self) -> str:
        most = ", ".join(f"{count} {name}" for name, count in Counter(self.nodes).most_common(6))
        lines = [f"{self.path}: opset {self.opset}, {self.bytes / 1e6:.1f} MB, {sum(self.nodes.values())} nodes ({most}, …)"]
        if self.error is None:
            lines.append("not run on ONNX Runtime")
        else:
            lines.append(f"ONNX Runtime ({self.provider}) against PyTorch: {self.error:.1e} at {'; '.join(self.sizes)}")
        if self.conditions:
            lines.append(f"only for sizes with {', '.join(self.conditions)}")
        return "\n".join(lines)

    def __rich__(self) -> str:
        return str(self).replace("[", r"\[")


def to_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    opset: int = 23,
    dynamic: bool = True,
    check: bool = True,
    reference: Reference | None = None,
    rewrites: Sequence[str] = (),
) -> OnnxReport:
    """Write ``program`` to ``path``; nothing is left behind if it cannot be written or does not agree.

    Inputs are named like the arguments of the user's ``forward``, outputs like the fields it returns, initializers like
    the weights, free sizes like the input and axis they are first met at (``input_ids_dim0``). Arguments that are no
    tensors are part of the graph. Weights above 2 GB go to ``<path>.data``.

    Sizes that the capture fixed are fixed in the file. Other conditions on sizes (``x.shape[1] > 10``, a branch of the
    forward) have no form in ONNX: they stand in the report and in the file's metadata.

    Args:
        provider: "cpu" or "cuda": whose kernels the file uses, and where it is checked.
        opset: 18 to 24; RMSNormalization and Attention exist from 23 on.
        dynamic: leave the sizes free that the capture left free; False fixes the example's.
        check: run the file on ONNX Runtime and compare; a file for a provider that is not installed here is written without it.
        reference: what to compare with, called like the user's model; by default the program itself.
        rewrites: the rewrites that were applied, with their claims, kept in the file's metadata.

    Raises:
        UsageError: an argument is wrong, or ``path`` cannot be written; before any work.
        ExportError: an op has no translation, ONNX Runtime cannot run the file, or an output disagrees.

    Example: ``print(to_onnx(capture(model, args), "model.onnx"))``
    """
    target = writable(path, "model.onnx")
    _validate(program, provider, opset, check)
    if dynamic:
        refuse_unrolled(program)
    module = _flat(program)
    onnx_program = _translate(program, module, table(opset, provider) | of_others(), opset, dynamic)
    model = onnx_program.model
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    name_weights(model, dict(module.named_parameters(remove_duplicate=False)))
    inputs = [i for i, x in enumerate(program.example) if isinstance(x, Tensor)]
    signature = named(program.signature)
    outputs = rename(model, signature, inputs, tensor_outputs(program))
    conditions = unsaid(signature, dict(zip(inputs, name_sizes(model), strict=True)))
    model.metadata_props["tautomer.conditions"] = ", ".join(conditions)
    model.metadata_props["tautomer.version"] = version("tautomer")
    model.metadata_props["tautomer.rewrites"] = ", ".join(rewrites)
    nodes = Counter(node.op_type for node in model.graph.all_nodes())
    with staged(target.parent, path) as folder:
        file = folder / target.name
        onnx_program.save(file)
        blame = first_difference(onnx_program, values, folder / "every_value.onnx", provider, tolerance(program))
        error, sizes = compare(program, file, provider, dynamic, reference, outputs, blame) if check else (None, ())
        total = sum(part.stat().st_size for part in folder.iterdir())
    return OnnxReport(target, opset, provider, dict(nodes), total, error, sizes, conditions)


# -- before any work ------------------------------------------------------------------------------------------


def _validate(program: Program, provider: str, opset: int, check: bool) -> None:
    if provider not in PROVIDERS:
        raise UsageError(f"there is no provider '{provider}'", hint=" or ".join(PROVIDERS))
    if check:
        require_provider(provider)
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} cannot be written; {OPSETS[0]} to {OPSETS[-1]} can")
    if program.mode == "train":
        raise UsageError(f"{program.name} was captured in train mode, an ONNX file computes eval mode", hint="call model.eval()")
    counts = moved_counts(program.signature)
    if counts:
        raise ExportError(
            f"{program.name} counts its steps in Python ({', '.join(counts)}): the file would be right for this step alone",
            hint="a model whose cache has no sliding window (sliding_window=None), or use_cache=False",
        )
    border = [*program.placeholders, *program.output.all_input_nodes]
    if any(isinstance(x := node.meta.get("val"), Tensor) and x.is_complex() for node in border):
        raise ExportError(
            f"{program.name} takes or returns complex numbers, and complex numbers are not supported by ONNX",
            hint="torch.view_as_real at the border",
        )


UNROLLED = 32
"""The most levels of HyperAttentions of free length that are written: each takes some 3 seconds, most of it in torch."""


def refuse_unrolled(program: Program) -> None:
    """Refuse causal HyperAttentions that would be unrolled for minutes; made to be asked before a program is captured again.

    Raises:
        ExportError: their levels, one for each doubling from ``leaf`` to ``longest`` positions, are more than ``UNROLLED``.
    """
    given = [arguments(node) for node in program.graph.find_nodes(op="call_function", target=tautomer.hyper_attention.v3)]
    free = [x for x in given if x["causal"] and static(x["query"].meta["val"].shape[-2]) is None]
    levels = sum(max(0, ((x["longest"] - 1) // x["leaf"]).bit_length()) for x in free)
    if levels > UNROLLED:
        raise ExportError(
            f"the {len(free)} HyperAttentions of {program.name} have {levels} levels in all, and each is written out, in some 3 "
            f"seconds: more than {UNROLLED} are refused",
            hint="a smaller longest or a larger leaf (one level for each doubling between them), fewer layers=, or "
            "dynamic_shapes='static'",
        )


# -- torch to ONNX --------------------------------------------------------------------------------------------


def _translate(program: Program, module: nn.Module, rows: dict[Any, Any], opset: int, dynamic: bool) -> Any:
    """The ONNX program, from a fresh export of the emitted module on tensors alone."""
    tensors = [x for x in program.example if isinstance(x, Tensor)]
    sizes = tuple(dict.fromkeys(axes if dynamic else (), torch.export.Dim.AUTO) for axes in free_axes(program))
    degenerate = any(tensor.shape[axis] < 2 for tensor, axes in zip(tensors, sizes, strict=True) for axis in axes)
    try:
        sizing = oblivious_sizes() if degenerate else contextlib.nullcontext()
        with one_at_a_time(), _quiet(), torch.no_grad(), known_translations(), quick_export(), sizing:
            with short_bodies():
                exported = torch.export.export(module, tuple(tensors), dynamic_shapes={"tensors": sizes}, strict=False)
            onnx_program = torch.onnx.export(
                _referred(exported),
                (),
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                custom_translation_table=rows,
            )
            assert onnx_program is not None
            # Constants only: the exporter's own fusions break rotary embeddings of free length.
            with node_first():
                onnxscript.optimizer.optimize(onnx_program.model)
            return onnx_program
    except Exception as error:
        missing = sorted(set(re.findall(r"No ONNX function found for.*?op='([\w.]+)'", str(error))))
        reason = f"no translation of {', '.join(missing)}" if missing else _root(error)
        raise ExportError(f"{program.name} cannot be written as ONNX opset {opset}: {reason}") from error


def _referred(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``exported`` with what stands for every op that has its own gradient: a file has none, and no name for it.

    So it is for the views of complex numbers that the exporter does not know.
    """
    present = {node.target for node in exported.graph.nodes}
    bodies = {op.overload: op.reference or op.body for op in (*LEAN, FORWARD) if op.overload in present}
    if any(isinstance(x := node.meta.get("val"), Tensor) and x.is_complex() for node in exported.graph.nodes):
        bodies |= {op: _of_pairs(op) for op in _VIEWS if op in present}
    return exported.run_decompositions(bodies) if bodies else exported


_VIEWS = (torch.ops.aten.unsqueeze.default, torch.ops.aten.select.int)


def _of_pairs(view: Any) -> Any:
    """``view`` of complex numbers as one of their real and imaginary parts, which are the last axis; of others itself."""

    def body(x: Tensor, dim: int, *rest: Any) -> Any:
        if not x.is_complex():
            return NotImplemented
        axes = x.dim() + (view is torch.ops.aten.unsqueeze.default)
        return torch.view_as_complex(view(torch.view_as_real(x), dim % axes, *rest))

    return body


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter's warnings and its log of what it did not do are not shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _flat(program: Program) -> nn.Module:
    """The emitted module, in eval mode, called with its tensors alone and returning its tensors alone."""
    module = to_torch(program)
    if program.mode == "both":
        module.eval()
    wanted = tensor_outputs(program)

    def forward(self: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        feed = iter(tensors)
        outputs = self._run(*[next(feed) if isinstance(x, Tensor) else x for x in program.example])
        return tuple(outputs[i] for i in wanted)

    module.__class__ = type("Flat", (type(module),), {"forward": forward})
    return module


def _root(error: BaseException) -> str:
    """The first line of what an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
