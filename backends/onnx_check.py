"""Run an ONNX file on ONNX Runtime and hold it to PyTorch.

    max|ort(x) - program(x)| <= tolerance * max|program(x)|

at the example and, where sizes are free, at batch 1 and an odd length. Where they disagree, the file runs once more with
every value as an output, beside the graph it was translated from: the first op whose values disagree is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, fx

from tautomer.rewrite._torch import pytree, unlifted_module
from tautomer.rewrite.errors import ExportError, UsageError
from tautomer.rewrite.evidence import relative_error
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.program import Program, target_name
from tautomer.rewrite.samples import samples

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error of an output, by the coarsest floating dtype of the program.

float64 is bounded by the format: ONNX keeps attributes such as epsilon and scale in float32, 2^-24 off.
"""

Reference = Callable[..., Any]
Blame = Callable[[Sequence[Tensor]], str]


def compare(
    program: Program,
    file: Path,
    provider: str,
    dynamic: bool,
    reference: Reference | None,
    names: Sequence[str],
    blame: Blame | None = None,
) -> tuple[float, tuple[str, ...]]:
    """The worst relative error of the file's outputs, and the sizes it was measured at.

    Args:
        blame: says of inputs on which an output disagrees where it began.
    """
    session = open_session(file, provider, hint=_hint(program))
    others = [sample.inputs for sample in samples(program)] if dynamic else []
    inputs = [program.example, *(x for x in others if _shapes(x) != _shapes(program.example))]
    bound = tolerance(program)
    worst, shown = 0.0, []
    for flat in inputs:
        try:
            expected = _expected(program, flat, reference)
        except Exception:
            if flat is program.example:
                raise
            continue  # a size that the model itself does not take
        try:
            feed = {x.name: y.detach().cpu().numpy() for x, y in zip(session.get_inputs(), _tensors(flat), strict=True)}
            found = [torch.from_numpy(x) for x in session.run(None, feed)]
        except Exception as error:
            sentence = f"ONNX Runtime cannot run {program.name} at {_sizes(session, flat)}: {error}"
            raise ExportError(sentence, hint=_hint(program)) from error
        errors = {name: relative_error(a, b.cpu()) for name, a, b in zip(names, found, expected, strict=True)}
        name = max(errors, key=lambda n: errors[n], default="")
        if errors and errors[name] > bound:
            raise ExportError(
                f"ONNX Runtime and PyTorch disagree on '{name}': relative error {errors[name]:.1e}, allowed {bound:.0e}, "
                f"at {_sizes(session, flat)}{'; ' + blame(_tensors(flat)) if blame else ''}"
            )
        worst = max([worst, *errors.values()])
        shown.append(_sizes(session, flat))
    return worst, tuple(shown)


def first_difference(onnx_program: Any, values: Mapping[str, Any], file: Path, provider: str, bound: float) -> Blame:
    """Names the first op whose values in the file and in the graph it was translated from disagree.

    Args:
        onnx_program: the translation; it is written once more, to ``file``, with other outputs.
        values: the value of the file for every node of the graph that has one, by the node's name.
    """

    @torch.no_grad()
    def blame(inputs: Sequence[Tensor]) -> str:
        graph = onnx_program.model.graph
        graph.outputs.extend(value for value in values.values() if all(value is not x for x in graph.outputs))
        onnx_program.save(file)
        session = open_session(file, provider)
        feed = {x.name: y.detach().cpu().numpy() for x, y in zip(session.get_inputs(), inputs, strict=True)}
        found = dict(zip((x.name for x in session.get_outputs()), session.run(None, feed), strict=True))
        differences: list[str] = []

        class Compare(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.op == "call_function" and n.name in values and isinstance(result, Tensor) and not differences:
                    value = values[n.name]
                    error = relative_error(torch.from_numpy(found[value.name]), result.cpu())
                    if error > bound:
                        what = f"{target_name(n)} ('{n.name}', {value.producer().op_type} in the file)"
                        differences.append(f"the first op that disagrees is {what}: relative error {error:.1e}")
                return result

        Compare(unlifted_module(onnx_program.exported_program)).run(*inputs)
        return (
            differences or ["every op of the file agrees with the captured graph: the graph is not what it is compared with"]
        )[0]

    return blame


def _shapes(flat: Sequence[Any]) -> list[torch.Size]:
    return [x.shape for x in _tensors(flat)]


def require_provider(provider: str) -> None:
    """Refuse a provider that the ONNX Runtime of this machine was built without."""
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        hint = "pip install onnxruntime-gpu; export_onnx(…, check=False) writes the file without running it"
        raise UsageError(f"this ONNX Runtime has no {PROVIDERS[provider]}", hint=hint)


def open_session(file: Path, provider: str, threads: int | None = None, *, hint: str | None = None) -> Any:
    """An ONNX Runtime session on ``file``; ``hint`` is what to try if it does not load.

    Raises:
        ExportError: the file does not load, or not with this provider.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or torch.get_num_threads()
    providers = list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:
        missing = re.search(r"Could not find an implementation for (\w+)", str(error))
        reason = f"it has no {provider} kernel for {missing[1]} of these dtypes" if missing else str(error)
        raise ExportError(f"ONNX Runtime cannot load the file: {reason}", hint=hint) from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise ExportError(f"ONNX Runtime did not load its {PROVIDERS[provider]}", hint="check its CUDA and cuDNN versions")
    return session


def _hint(program: Program) -> str | None:
    """ONNX Runtime has all its kernels for float32 alone."""
    other = dtypes(program) & {torch.bfloat16, torch.float16, torch.float64}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in other))
    return f"model.float(); ONNX Runtime has not every kernel for {names}" if other else None


def dtypes(program: Program) -> set[torch.dtype]:
    """The dtypes of the weights, inputs and outputs."""
    nodes = [*program.placeholders, *program.graph.find_nodes(op="get_attr"), *program.output.all_input_nodes]
    return {node.meta["val"].dtype for node in nodes if isinstance(node.meta.get("val"), Tensor)}


def tolerance(program: Program) -> float:
    """How far the file may be from PyTorch, by the coarsest floating dtype of weights, inputs and outputs."""
    return max((TOLERANCE[dtype] for dtype in dtypes(program) if dtype in TOLERANCE), default=TOLERANCE[torch.float32])


@torch.no_grad()
def _expected(program: Program, flat: Sequence[Any], reference: Reference | None) -> list[Tensor]:
    if reference is None:
        outputs: Sequence[Any] = interpret(program, flat)
    else:
        copies = [x.clone() if isinstance(x, Tensor) else x for x in flat]
        args, kwargs = pytree.tree_unflatten(copies, program.signature.in_spec)
        outputs = program.signature.flatten(reference(*args, **kwargs))
    return [outputs[i] for i in tensor_outputs(program)]


def _tensors(flat: Sequence[Any]) -> list[Tensor]:
    return [x for x in flat if isinstance(x, Tensor)]


def _sizes(session: Any, flat: Sequence[Any]) -> str:
    return ", ".join(f"{x.name}{list(y.shape)}" for x, y in zip(session.get_inputs(), _tensors(flat), strict=True))


def tensor_outputs(program: Program) -> list[int]:
    """Which of the program's flat outputs are tensors."""
    return [i for i, x in enumerate(program.output.args[0]) if isinstance(getattr(x, "meta", {}).get("val"), Tensor)]  # type: ignore[arg-type]
