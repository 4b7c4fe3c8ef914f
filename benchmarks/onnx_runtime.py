"""What a model costs on ONNX Runtime, exported by us and by others, against its products and attentions alone.

    python benchmarks/onnx_runtime.py [--layers 4] [--seconds 8] [--only attention dtypes bert gpt2 vit]

One thread, medians of calls that take turns in one run. The first table is one attention, as torch writes it (heads apart, with
transpositions) and with heads side by side. The second is what a target is asked about, by dtype, as the fastest of its calls:
a form that pays in float32 need not in float16. The last is models at full width, every figure a ratio to the floor: the same
linear layers and attentions in one ONNX file, without norms, activations, biases, sums and embeddings. A way that does not run
has no figure, and its reason is printed below.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir
import torch
import transformers
from onnxruntime.transformers import optimizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

import tautomer
from tautomer.backends.onnx_check import open_session
from tautomer.backends.to_onnx import to_onnx
from tautomer.rewrite.measure import in_turns
from tautomer.rewrite.program import Program

VOCABULARY = 50257
Run = Callable[[Sequence[Tensor]], Any]


class Heads(nn.Module):
    """One attention between views and transpositions, from [batch, t, width] and back."""

    def __init__(self, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


class Sums(nn.Module):
    """Two residual sums and their LayerNorms; of a pre-norm model others read the sums too."""

    def __init__(self, pre: bool) -> None:
        super().__init__()
        self.norms, self.pre = nn.ModuleList([nn.LayerNorm(768), nn.LayerNorm(768)]), pre

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        for norm in self.norms:
            total = x + r
            normed = norm(total)
            x, r = (total if self.pre else normed), normed.relu()
        return x + r if self.pre else r


class Floor(nn.Module):
    """The linear layers and attentions of a transformer, one after the other, and nothing else."""

    def __init__(self, case: Case, layers: int) -> None:
        super().__init__()
        d = case.width
        self.heads = Heads(case.heads, case.causal)
        self.embed = nn.Linear(case.embeds, d, bias=False) if case.embeds else nn.Identity()
        self.qkvo = nn.ModuleList(nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(4)) for _ in range(layers))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)) for _ in range(layers)
        )
        self.head = nn.Linear(d, case.classes, bias=False) if case.classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for (q, k, v, o), ffn in zip(self.qkvo, self.ffn, strict=True):  # type: ignore[misc]
            x = ffn(o(self.heads(q(x), k(x), v(x))))
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """A model at full width, and what its floor is made of.

    Attributes:
        embeds: entries of a patch, 0 if embedding is a lookup.
        classes: features of a head over every position, 0 if there is none.
    """

    make: Callable[[int], nn.Module]
    example: Callable[[int, int], dict[str, Tensor]]
    kind: str
    causal: bool = False
    embeds: int = 0
    classes: int = 0
    width: int = 768
    heads: int = 12


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1000, (batch, length))}


CASES: Mapping[str, Case] = {
    "bert": Case(lambda n: transformers.BertModel(transformers.BertConfig(num_hidden_layers=n)), tokens, "bert"),
    "gpt2": Case(
        lambda n: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n, use_cache=False)),
        tokens, "gpt2", causal=True, classes=VOCABULARY,
    ),
    "vit": Case(
        lambda n: transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=n)),
        lambda batch, _: {"pixel_values": torch.randn(batch, 3, 224, 224)}, "vit", embeds=768,
    ),
}  # fmt: skip
SIZES = {"bert": ((1, 128), (8, 128), (1, 512)), "gpt2": ((1, 128), (8, 128), (1, 512)), "vit": ((1, 197), (8, 197))}


# -- ways to run a model --------------------------------------------------------------------------------------


def session(file: Path) -> Run:
    opened = open_session(file, "cpu", threads=1)
    names = [x.name for x in opened.get_inputs()]
    return lambda inputs: opened.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def ours(model: nn.Module, example: Mapping[str, Tensor], file: Path) -> Run:
    tautomer.export_onnx(tautomer.optimize(model, (), example, target="onnxruntime", check=False), file, check=False)
    return session(file)


def unpacked(model: nn.Module, example: Mapping[str, Tensor], file: Path) -> Run:
    skipped = ("move-transpose", "pack-attention", "pack-cached-attention")
    fast = tautomer.optimize(model, (), example, target="onnxruntime", skip=skipped, check=False)
    tautomer.export_onnx(fast, file, check=False)
    return session(file)


def merged(model: nn.Module, example: Mapping[str, Tensor], file: Path) -> Run:
    passes = (*tautomer.catalogue().recipes["inference"], "merge-parallel-linears")
    fast = tautomer.optimize(model, (), example, target="onnxruntime", passes=passes, check=False)
    tautomer.export_onnx(fast, file, check=False)
    return session(file)


def stock(opset: int | None) -> Callable[..., Run]:
    def way(model: nn.Module, example: Mapping[str, Tensor], file: Path) -> Run:
        torch.onnx.export(model, (), file, kwargs=dict(example), dynamo=True, opset_version=opset, verbose=False)
        return session(file)

    return way


def runtime_optimizer(kind: str, heads: int, width: int) -> Callable[..., Run]:
    def way(model: nn.Module, example: Mapping[str, Tensor], file: Path) -> Run:
        torch.onnx.export(model, (), file, kwargs=dict(example), dynamo=True, verbose=False)
        fused = file.with_name("fused.onnx")
        optimizer.optimize_model(str(file), kind, heads, width).save_model_to_file(str(fused))
        return session(fused)

    return way


def transformers_exporter(model: nn.Module, example: Mapping[str, Tensor], file: Path) -> Run:
    exported = OnnxExporter().export(model, dict(example), config=OnnxConfig(ort_fusions="cpu"))  # type: ignore[arg-type]
    onnx_ir.save(exported.program, str(file))
    return session(file)


def torch_way(compiled: bool) -> Callable[..., Run]:
    def way(model: nn.Module, example: Mapping[str, Tensor], file: Path) -> Run:
        run: Any = torch.compile(model) if compiled else model
        return lambda inputs: run(**dict(zip(example, inputs, strict=True)))

    return way


def quietly(build: Callable[[], Run]) -> Run | str:
    """What ``build`` makes, or in one line why it makes nothing; what exporters print is not shown."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return build()
    except Exception as failure:
        return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:160]}"
    finally:
        logging.disable(logging.NOTSET)


# -- tables ---------------------------------------------------------------------------------------------------


def attentions(seconds: float, folder: Path) -> None:
    print("\n| one attention, 12 heads of 64 | heads apart | heads side by side |\n|---|---|---|")
    for batch, length in ((1, 128), (1, 512), (8, 197)):
        for causal in (False, True):
            model, x = Heads(12, causal).eval(), [torch.randn(batch, length, 768) for _ in range(3)]
            example = dict(zip("qkv", x, strict=True))
            files = [folder / f"{name}-{batch}-{length}-{causal}.onnx" for name in ("apart", "packed")]
            runs = [unpacked(model, example, files[0]), ours(model, example, files[1])]
            apart, packed = in_turns(runs, x, 5, milliseconds=1e3 * seconds)
            print(
                f"| [{batch}, {length}, 768]{', causal' if causal else ''} | {apart:,.0f} µs | {packed / apart:.2f} |",
                flush=True,
            )


PACK, FUSE = ("move-transpose", "pack-attention", "merge-views"), ("fuse-add-layer-norm",)
FORMS: Mapping[str, tuple[nn.Module, int, tuple[str, ...]]] = {
    "one attention, heads side by side": (Heads(12, False), 3, PACK),
    "two sums that LayerNorms alone read": (Sums(pre=False), 2, FUSE),
    "three sums, of which LayerNorms read two": (Sums(pre=True), 2, FUSE),
}


def dtypes(seconds: float, folder: Path) -> None:
    print("\n| at [1, 128, 768] | dtype | as it is | rewritten |\n|---|---|---|---|")
    for name, (module, inputs, passes) in FORMS.items():
        for dtype in (torch.float32, torch.float16, torch.float64):
            x = [torch.randn(1, 128, 768, dtype=dtype) for _ in range(inputs)]
            program = tautomer.capture(copy.deepcopy(module).eval().to(dtype), x, dynamic_shapes="static")
            runs = [form(program, chosen, _file(folder, f"{name}-{dtype}-{len(chosen)}")) for chosen in ((), passes)]
            before, after = in_turns(runs, x, 5, min, milliseconds=1e3 * seconds)
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {before:,.0f} µs | {after:,.0f} µs |", flush=True)


def form(program: Program, passes: Sequence[str], file: Path) -> Run:
    to_onnx(tautomer.optimize(program, passes=passes, check=False).program, file, check=False)
    return session(file)


def models(name: str, layers: int, seconds: float, folder: Path) -> None:
    case = CASES[name]
    model = case.make(layers).eval()
    ways: Mapping[str, Callable[..., Run]] = {
        "eager": torch_way(False),
        "torch.compile": torch_way(True),
        "stock export": stock(None),
        "stock, opset 23": stock(23),
        "ORT's optimizer": runtime_optimizer(case.kind, case.heads, case.width),
        "transformers' exporter": transformers_exporter,
        "ours": ours,
        "ours, heads apart": unpacked,
        "ours, q k v merged": merged,
    }
    print(f"\n| {layers} layers of | floor | {' | '.join(ways)} |\n|{'---|' * (len(ways) + 2)}")
    reasons: dict[str, str] = {}
    for batch, length in SIZES[name]:
        bottom, found = measured(case, model, ways, layers, (batch, length), seconds, folder / f"{name}-{batch}-{length}")
        reasons |= {way: time for way, time in found.items() if isinstance(time, str)}
        figures = " | ".join("–" if isinstance(time, str) else f"{time / bottom:.2f}" for time in found.values())
        print(f"| {name}, [{batch}, {length}] | {bottom / 1e3:,.1f} ms | {figures} |", flush=True)
    for way, why in reasons.items():
        print(f"\n{way}: {why}", flush=True)


def measured(
    case: Case, model: nn.Module, ways: Mapping[str, Callable[..., Run]], layers: int, size: tuple[int, int], seconds: float,
    folder: Path,
) -> tuple[float, dict[str, float | str]]:  # fmt: skip
    """The time of the floor, and of every way its time or why it has none."""
    example, patches = case.example(*size), torch.randn(*size, case.embeds or case.width)
    floor = ours(Floor(case, layers).eval(), {"x": patches}, _file(folder, "floor"))
    built = {way: quietly(partial(build, model, example, _file(folder, way))) for way, build in ways.items()}
    runs = {way: run for way, run in built.items() if not isinstance(run, str)}
    forms = [lambda _: floor([patches]), *runs.values()]
    bottom, *times = in_turns(forms, list(example.values()), 5, milliseconds=1e3 * seconds)
    found = dict(zip(runs, times, strict=True))
    return bottom, {way: run if isinstance(run, str) else found[way] for way, run in built.items()}


def _file(folder: Path, name: str) -> Path:
    place = folder / name.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    return place / "model.onnx"


TABLES: Mapping[str, Callable[[float, Path], None]] = {"attention": attentions, "dtypes": dtypes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", nargs="*", default=[*TABLES, *CASES], choices=[*TABLES, *CASES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            if name in TABLES:
                TABLES[name](options.seconds / 4, Path(folder))
            else:
                models(name, options.layers, options.seconds, Path(folder))


if __name__ == "__main__":
    main()
