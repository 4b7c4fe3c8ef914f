"""Import a written package in a fresh process that has no tautomer, run it, and hold it to the emitted module, bit by bit.

outputs, buffers after the call and, where parameters train, gradients at the example and at another size
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tautomer.rewrite._torch import pytree
from tautomer.rewrite.errors import ExportError
from tautomer.rewrite.evidence import ROUNDING, relative_error
from tautomer.rewrite.program import Program
from tautomer.rewrite.samples import samples

from ..rewritten import Rewritten
from .called import Called

_SCRIPT = """
import sys
sys.modules["tautomer"] = None
import importlib, torch
given, made, parent, name = sys.argv[1:]
sys.path.insert(0, parent)
model = importlib.import_module(name)
about = torch.load(given, weights_only=True)
torch.set_num_threads(about["threads"])
torch.set_float32_matmul_precision(about["precision"])
module = model.load()
keys, results = list(module.state_dict()), []
for mode in about["modes"]:
    module.train(mode)
    for inputs, cotangents in about["runs"]:
        inputs = [x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in inputs]
        module.zero_grad()
        torch.manual_seed(0)
        result = module(CALL)
        outputs = [RESULTS]
        pairs = [(x, g) for x, g in zip(outputs, cotangents) if isinstance(x, torch.Tensor) and g is not None and x.requires_grad]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        results.append({
            "outputs": [x.detach() if isinstance(x, torch.Tensor) else x for x in outputs],
            "buffers": {n: x.clone() for n, x in module.named_buffers(remove_duplicate=False)},
            "gradients": {n: x.grad for n, x in module.named_parameters() if x.grad is not None},
            "inputs": [x.grad if isinstance(x, torch.Tensor) else None for x in inputs],
        })
torch.save({"keys": keys, "results": results}, made)
"""


@dataclass(frozen=True)
class Agreement:
    """What was compared.

    Attributes:
        sizes: the sizes of the inputs.
        gradients: the worst relative error of a gradient, 0.0 for the same bits; None if nothing has one.
    """

    sizes: tuple[str, ...] = ()
    gradients: float | None = None


def compare(program: Program, emitted: Rewritten, called: Called, package: Path) -> Agreement:
    """Hold the package to the emitted module.

    Raises:
        ExportError: it does not run, or an output, a buffer or a key differs.
    """
    twin = copy.deepcopy(emitted)
    modes = [False, True] if program.mode == "both" else [program.mode == "train"]
    runs = [_run(twin, program, inputs) for inputs in _inputs(twin, program)]
    wanted = [_reference(twin, program, mode, inputs, cotangents) for mode in modes for inputs, cotangents in runs]
    with tempfile.TemporaryDirectory() as folder:
        given, made, script = (Path(folder) / name for name in ("given.pt", "made.pt", "run.py"))
        about = {
            "runs": runs,
            "modes": modes,
            "threads": torch.get_num_threads(),
            "precision": torch.get_float32_matmul_precision(),
        }
        torch.save(about, given)
        script.write_text(_SCRIPT.replace("CALL", called.call_text()).replace("RESULTS", ", ".join(called.result_texts())))
        command = [sys.executable, "-I", "-W", "ignore", script, given, made, package.parent, package.name]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"the Python of {program.name} does not run: {last}", hint="please report this model")
        found = torch.load(made, weights_only=True)
    keys = list(emitted.state_dict())
    if set(found["keys"]) != set(keys):
        different = sorted(set(found["keys"]) ^ set(keys))
        raise ExportError(f"the Python of {program.name} has other weights: {', '.join(different[:3])}")
    worst = [_differences(program, x, y) for x, y in zip(wanted, found["results"], strict=True)]
    errors = [error for error in worst if error is not None]
    return Agreement(tuple(_shown(program, inputs) for inputs, _ in runs), max(errors) if errors else None)


def _inputs(twin: Rewritten, program: Program) -> list[Sequence[Any]]:
    """The example, and another size that the model takes."""
    found: list[Sequence[Any]] = [program.example]
    for sample in samples(program):
        shapes = [[x.shape for x in flat if isinstance(x, Tensor)] for flat in (sample.inputs, program.example)]
        if shapes[0] == shapes[1]:
            continue
        try:
            with torch.no_grad():
                copy.deepcopy(twin)._run(*_copied(sample.inputs, False))
        except Exception:
            continue  # a size that the model itself does not take
        found.append(sample.inputs)
        break
    return found


def _copied(inputs: Sequence[Any], gradients: bool) -> list[Any]:
    copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    return [x.requires_grad_() if gradients and isinstance(x, Tensor) and x.is_floating_point() else x for x in copies]


def _run(twin: Rewritten, program: Program, inputs: Sequence[Any]) -> tuple[list[Any], list[Tensor | None]]:
    """The inputs, and what is propagated back from the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        outputs = copy.deepcopy(twin)._run(*_copied(inputs, False))
    cotangents = [
        torch.randn(x.shape, generator=generator).to(x) if isinstance(x, Tensor) and x.is_floating_point() else None
        for x in outputs
    ]
    return _copied(inputs, False), cotangents


def _reference(
    twin: Rewritten, program: Program, mode: bool, inputs: Sequence[Any], cotangents: Sequence[Any]
) -> Mapping[str, Any]:
    """What the emitted module computes; its buffers move from call to call."""
    twin.train(mode)
    twin.zero_grad()
    flat = _copied(inputs, True)
    torch.manual_seed(0)
    args, kwargs = pytree.tree_unflatten(flat, program.signature.in_spec)
    outputs = program.signature.flatten(twin(*args, **kwargs))
    pairs = [
        (x, g) for x, g in zip(outputs, cotangents, strict=True) if isinstance(x, Tensor) and g is not None and x.requires_grad
    ]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    return {
        "outputs": [x.detach() if isinstance(x, Tensor) else x for x in outputs],
        "buffers": {name: x.clone() for name, x in twin.named_buffers(remove_duplicate=False)},
        "gradients": {name: x.grad for name, x in twin.named_parameters() if x.grad is not None},
        "inputs": [x.grad if isinstance(x, Tensor) else None for x in flat],
    }


def _differences(program: Program, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> float | None:
    """The worst error of a gradient; outputs and buffers must have the same bits."""
    for index, (x, y) in enumerate(zip(wanted["outputs"], found["outputs"], strict=True)):
        if not _same(x, y):
            raise ExportError(
                f"output {index} of the Python of {program.name} has other bits than the emitted module's{_by(x, y)}"
            )
    for name, x in wanted["buffers"].items():
        if not _same(x, found["buffers"].get(name)):
            raise ExportError(f"the buffer '{name}' of the Python of {program.name} differs from the emitted module's")
    ours, theirs = wanted["gradients"], found["gradients"]
    if set(ours) != set(theirs):
        raise ExportError(
            f"the Python of {program.name} has gradients for other parameters: {sorted(set(ours) ^ set(theirs))[:3]}"
        )
    pairs = [(ours[name], theirs[name]) for name in ours] + list(zip(wanted["inputs"], found["inputs"], strict=True))
    errors = [0.0 if _same(x, y) else relative_error(x, y) for x, y in pairs if x is not None and y is not None]
    allowed = [_allowed(x.dtype) for x, y in pairs if x is not None and y is not None]
    if any(not error <= bound for error, bound in zip(errors, allowed, strict=True)):
        raise ExportError(f"a gradient of the Python of {program.name} differs: relative error {max(errors):.1e}")
    return max(errors) if errors else None


def _same(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return type(x) is type(y) and bool(x == y)
    return x.dtype == y.dtype and x.shape == y.shape and bool(torch.equal(x, y) or torch.allclose(x, y, 0, 0, equal_nan=True))


def _allowed(dtype: torch.dtype) -> float:
    """What sums in another order may cost: in 16 bits two roundings, of which 64 would be the whole number."""
    return (ROUNDING if dtype.itemsize >= 4 else 2) * torch.finfo(dtype).eps


def _by(x: Any, y: Any) -> str:
    return f": relative error {relative_error(x, y):.1e}" if isinstance(x, Tensor) and x.shape == y.shape else ""


def _shown(program: Program, inputs: Sequence[Any]) -> str:
    pairs = zip(program.signature.leaf_names, inputs, strict=True)
    return ", ".join(f"{name}{list(x.shape)}" for name, x in pairs if isinstance(x, Tensor))
