"""Where a program can run, and what a rewrite is worth there: measured where that takes milliseconds, recorded where not.

    gain("layer-norm-to-rms-norm") = (time of LayerNorm, time of RMSNorm) at the program's commonest norm shape

In eager PyTorch on a CPU an RMSNorm is several kernels and loses; on ONNX Runtime it is one and wins.
"""

from __future__ import annotations

import difflib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.measure import measure, rounds_within
from tautomer.rewrite.ops import normal
from tautomer.rewrite.parallel import parallel_linears
from tautomer.rewrite.program import Program
from tautomer.rewrite.samples import example_sizes, number
from tautomer.rewrite.target import Compiled, Gain, Target

from . import liger
from .onnx_check import open_session, require_provider
from .to_onnx import to_onnx
from .to_torch import to_torch

NORM, MERGE = "layer-norm-to-rms-norm", "merge-parallel-linears"
_SUM_AND_NORM = {
    "fuse-add-layer-norm": Gain(
        True, 495.0, 73.0,
        "ONNX Runtime makes one SkipLayerNormalization of an Add and a LayerNormalization, 495 µs at [1, 128, 768], and leaves a "
        "Sum and a LayerNormalization apart, 73 µs, recorded",
    ),
    "fuse-add-rms-norm": Gain(
        False, 52.0, 86.0,
        "Add and RMSNormalization take 52 µs and one SkipSimplifiedLayerNormalization 86 µs at [1, 128, 768], recorded",
    ),
}  # fmt: skip
"""What one op for a residual sum and the norm that reads it is worth on ONNX Runtime 1.31, one CPU thread."""
_APART = Gain(
    False, 122.0, 123.0,
    "no LayerNormalization alone reads a float32 sum, of which ONNX Runtime would make one slow op; other sums it leaves apart: "
    "122 µs as they are, 123 µs rewritten, in float16 at [1, 128, 768], recorded",
)  # fmt: skip
_UNTRIED = Gain(True, None, None, "one kernel for a residual sum and the norm that reads it; it was never measured here")
PACKED = ("split-heads", "move-transpose", "pack-attention", "pack-cached-attention")
_RECORDED_ATTENTIONS = {torch.float32: (992.0, 863.0), torch.float16: (384.0, 602.0), torch.float64: (2072.0, 2067.0)}
"""µs of one Attention with transpositions and one on packed heads at [1, 128, 768] on ONNX Runtime 1.31, one CPU thread, as
benchmarks/onnx_runtime.py prints; causal in float32."""
_LIGER = Gain(True, None, None, "one kernel of Liger instead of a sum and an RMSNorm; it was never measured here")
_LAYER_NORM = torch.ops.aten.layer_norm.default
_RMS_NORM = torch.ops.aten.rms_norm.default
_LINEAR = torch.ops.aten.linear.default
_BUDGET_MS = 40.0
_LARGEST, _LARGEST_PRODUCT = 2**20, 2**28
_NOISE = 1.05
_WORTH = 0.9
"""A merge renames parameters, and the parts of a split are read with strides: less than a tenth is not worth it."""
_RECORDED = {
    (1, 197, 384): (68.0, 46.0), (1, 128, 768): (97.0, 67.0), (1, 197, 768): (128.0, 82.0),
    (8, 197, 384): (444.0, 293.0), (8, 128, 768): (616.0, 407.0), (8, 197, 768): (1061.0, 721.0),
}  # fmt: skip
"""µs of one LayerNormalization and one RMSNormalization on ONNX Runtime 1.31, one CPU thread, as benchmarks/norms.py prints."""
_RECORDED_LAYERS = {
    (1, 768, 2304): (82.0, 78.0), (16, 768, 2304): (278.0, 272.0), (128, 768, 2304): (2157.0, 2222.0),
    (1576, 768, 2304): (49588.0, 50181.0), (1, 1024, 1536): (72.0, 69.0), (128, 1024, 1536): (1948.0, 1971.0),
    (1, 1024, 5632): (467.0, 457.0), (128, 1024, 5632): (7302.0, 7403.0),
}  # fmt: skip
"""Rows, width, features in all: µs of the layers one by one and of one with a split, as benchmarks/parallel_linears.py prints."""


_UNMEASURED = Gain(False, None, None, "merged linear layers were never measured here")


@dataclass(frozen=True)
class Norms:
    """The commonest LayerNorm of a program: the shape it sees in the example, and where."""

    shape: tuple[int, ...]
    dims: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Layers:
    """The commonest linear layers with one input: how many rows that has in the example, its width, their features."""

    rows: int
    width: int
    features: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Eager:
    """PyTorch as it is, on the model's own device."""

    name: str = "eager"
    device: str | None = None
    multiple: int = 16

    def compile(self, program: Program) -> Compiled:
        module = to_torch(program, kernels=True)

        def run(inputs: Sequence[Any]) -> tuple[Any, ...]:
            with torch.no_grad():
                return module._run(*inputs)

        return run

    def gain(self, pass_name: str, program: Program) -> Gain | None:
        if pass_name == MERGE:
            layers = commonest_layers(program)
            return None if layers is None else measured_layers(layers)
        if pass_name == "fuse-add-rms-norm":
            return _LIGER if any(map(_has_a_kernel, normalized_sums(program, _RMS_NORM))) else None
        norms = commonest_norm(program) if pass_name == NORM else None
        return None if norms is None else measured_norms(norms)


@dataclass(frozen=True)
class Inductor:
    """``torch.compile`` with its default backend, on the model's own device."""

    name: str = "inductor"
    device: str | None = None
    multiple: int = 16

    def compile(self, program: Program) -> Compiled:
        compiled = torch.compile(to_torch(program)._run)

        def run(inputs: Sequence[Any]) -> tuple[Any, ...]:
            with torch.no_grad():
                return tuple(compiled(*inputs))

        return run

    def gain(self, pass_name: str, program: Program) -> Gain | None:
        if pass_name == MERGE:
            return _UNMEASURED
        if pass_name != NORM or commonest_norm(program) is None:
            return None
        return Gain(True, None, None, "either norm is one fused kernel, and the RMSNorm takes 0.86 to 0.91 of the time, recorded")


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on one device. ``compile`` writes and loads a file; outputs that are no tensors are left out."""

    name: str = "onnxruntime"
    device: str | None = "cpu"
    multiple: int = 16

    def compile(self, program: Program) -> Compiled:
        provider = self.device or "cpu"
        require_provider(provider)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            to_onnx(program, file, provider=provider, check=False)
            session = open_session(file, provider)
        names = [x.name for x in session.get_inputs()]

        def run(inputs: Sequence[Any]) -> tuple[Any, ...]:
            tensors = [x.detach().cpu().numpy() for x in inputs if isinstance(x, Tensor)]
            return tuple(torch.from_numpy(x) for x in session.run(None, dict(zip(names, tensors, strict=True))))

        return run

    def gain(self, pass_name: str, program: Program) -> Gain | None:
        if pass_name == MERGE:
            layers = commonest_layers(program) if self.device == "cpu" else None
            return _UNMEASURED if layers is None else recorded_layers(layers)
        if pass_name in PACKED:
            return packed_attention(program) if self.device == "cpu" else None
        if pass_name in _SUM_AND_NORM:
            norm = _LAYER_NORM if pass_name == "fuse-add-layer-norm" else _RMS_NORM
            sums = [total for total, _ in normalized_sums(program, norm)]
            return fused_sum(pass_name, sums, on_cpu=self.device == "cpu") if sums else None
        norms = commonest_norm(program) if pass_name == NORM else None
        return recorded_norms(norms) if norms is not None and self.device == "cpu" else None


TARGETS: Mapping[str, Target] = {
    target.name: target for target in (Eager(), Inductor(), OnnxRuntime(), OnnxRuntime("onnxruntime-cuda", "cuda", 64))
}


def resolve(name: str) -> Target:
    """The target of this name.

    Raises:
        UsageError: there is none; the nearest is suggested.

    Example:
        >>> resolve("onnxruntime").device
        'cpu'
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(str(name), TARGETS, n=1)
    raise UsageError(f"there is no target '{name}'", hint=near[0] if near else ", ".join(TARGETS))


# -- what a norm costs ----------------------------------------------------------------------------------------


def measured_norms(norms: Norms) -> Gain:
    """Both norms timed here and now, alternately, in a few tens of milliseconds."""
    shape = _affordable(norms)
    normalized = list(shape[len(shape) - norms.dims :])
    options = _random(norms.dtype, norms.device)
    x, (g, b) = torch.randn(shape, **options), torch.randn(2, *normalized, **options)
    runs = (lambda xs: _LAYER_NORM(xs[0], normalized, g, b), lambda xs: _RMS_NORM(xs[0], normalized, g))
    with _one_thread():
        before, after = measure(*runs, [x], rounds_within(_BUDGET_MS, *runs, [x]), statistic=min)
    where = f"at {list(shape)} on this {norms.device.type}{' (one thread)' if norms.device.type == 'cpu' else ''}, measured"
    note = f"one LayerNorm takes {before:.0f} µs and one RMSNorm {after:.0f} µs {where}"
    return Gain(after <= _NOISE * before, before, after, note)


def _random(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of ``torch.randn`` that leave the user's random state alone."""
    return {"dtype": dtype, "device": device, "generator": torch.Generator(device).manual_seed(0)}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, an op is timed without a thread pool: on a busy machine its barrier costs a time slice, call after call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def recorded_norms(norms: Norms) -> Gain:
    """What was recorded for ONNX Runtime on a CPU at the nearest size."""
    nearest = min(_RECORDED, key=lambda shape: abs(prod(shape) - prod(norms.shape)))
    before, after = _RECORDED[nearest]
    note = f"one LayerNormalization takes {before:.0f} µs and one RMSNormalization {after:.0f} µs at {list(nearest)}, recorded"
    return Gain(after <= before, before, after, note)


def fused_sum(pass_name: str, sums: Sequence[fx.Node], *, on_cpu: bool) -> Gain:
    """What one op for these residual sums and the norms that read them is worth to ONNX Runtime."""
    if not on_cpu:
        return _UNTRIED
    merged = any(total.meta["val"].dtype == torch.float32 and len(total.users) == 1 for total in sums)
    return _SUM_AND_NORM[pass_name] if merged or pass_name == "fuse-add-rms-norm" else _APART


def normalized_sums(program: Program, norm: Any) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """For every norm of this kind that reads a sum, the sum and the gain."""
    for node in program.graph.find_nodes(op="call_function", target=norm):
        total, _, gain, *_ = normal(node)
        if total.target is torch.ops.aten.add.Tensor:
            yield total, gain


def _has_a_kernel(sum_and_gain: tuple[fx.Node, fx.Node | None]) -> bool:
    """Whether Liger has one for a sum and the RMSNorm that reads it."""
    total, gain = sum_and_gain
    return liger.represents(total.meta["val"], None if gain is None else gain.meta["val"])


def packed_attention(program: Program) -> Gain | None:
    """What one Attention on packed heads is worth to ONNX Runtime on a CPU in the dtype that most attentions have."""
    attentions = program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    dtypes = Counter(node.meta["val"].dtype for node in attentions).most_common(1)
    if not dtypes or dtypes[0][0] not in _RECORDED_ATTENTIONS:
        return None
    dtype = dtypes[0][0]
    before, after = _RECORDED_ATTENTIONS[dtype]
    forms = f"an Attention with transpositions takes {before:.0f} µs and one on packed heads {after:.0f} µs"
    where = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
    return Gain(_NOISE * after <= before, before, after, f"{forms} at [1, 128, 768]{where}, recorded")


def commonest_norm(program: Program) -> Norms | None:
    """The LayerNorm that a program has most of, with the sizes of its example; None if it has none."""
    sizes = example_sizes(program)
    found: Counter[Norms] = Counter()
    for node in program.graph.find_nodes(op="call_function", target=_LAYER_NORM):
        x = node.args[0].meta["val"]
        found[Norms(tuple(number(s, sizes) for s in x.shape), len(node.args[1]), x.dtype, x.device)] += 1
    return found.most_common(1)[0][0] if found else None


def _affordable(norms: Norms) -> tuple[int, ...]:
    """The shape with its first dimension cut so that one norm takes no more than about a millisecond."""
    first, *rest = norms.shape
    if len(norms.shape) == norms.dims:
        return norms.shape
    return max(1, min(first, _LARGEST // max(1, prod(rest)))), *rest


# -- what linear layers with one input cost -------------------------------------------------------------------


def measured_layers(layers: Layers) -> Gain:
    """The layers one by one, and one with a split, timed here and now, alternately."""
    rows = max(1, min(layers.rows, _LARGEST_PRODUCT // (layers.width * sum(layers.features))))
    options = _random(layers.dtype, layers.device)
    x, weights = torch.randn(rows, layers.width, **options), [torch.randn(n, layers.width, **options) for n in layers.features]
    whole, sizes = torch.cat(weights), list(layers.features)
    runs = (lambda xs: [_LINEAR(xs[0], w) for w in weights], lambda xs: _LINEAR(xs[0], whole).split(sizes, -1))
    with _one_thread():
        before, after = measure(*runs, [x], rounds_within(_BUDGET_MS, *runs, [x]), statistic=min)
    where = f"at {rows} rows on this {layers.device.type}{' (one thread)' if layers.device.type == 'cpu' else ''}, measured"
    return _layers_gain(layers, before, after, where)


def recorded_layers(layers: Layers) -> Gain:
    """What was recorded for ONNX Runtime on a CPU at the nearest size."""
    wanted = layers.rows * layers.width * sum(layers.features)
    nearest = min(_RECORDED_LAYERS, key=lambda size: abs(prod(size) - wanted))
    rows, width, features = nearest
    return _layers_gain(layers, *_RECORDED_LAYERS[nearest], f"at {rows} rows from {width} to {features} features, recorded")


def _layers_gain(layers: Layers, before: float, after: float, where: str) -> Gain:
    note = f"{len(layers.features)} linear layers take {before:.0f} µs and one with a split {after:.0f} µs {where}"
    return Gain(after <= _WORTH * before, before, after, note)


def commonest_layers(program: Program) -> Layers | None:
    """The linear layers with one input that a program has most of; None if it has none."""
    sizes, found = example_sizes(program), Counter[Layers]()
    for group in parallel_linears(program):
        *rows, width = (number(s, sizes) for s in group[0].args[0].meta["val"].shape)  # type: ignore[union-attr]
        outputs = [layer.meta["val"] for layer in group]
        features = tuple(int(y.shape[-1]) for y in outputs)
        found[Layers(prod(rows), width, features, outputs[0].dtype, outputs[0].device)] += 1
    return found.most_common(1)[0][0] if found else None
