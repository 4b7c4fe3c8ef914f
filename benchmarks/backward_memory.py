"""What the backward keeps, and what a training step costs, as the model is and after every way to keep less.

    python benchmarks/backward_memory.py [--models vit bert gpt2 llama] [--tuning full lora] [--dtypes float32 bfloat16]
                                         [--ways eager compile checkpoint exact approximate budget]
                                         [--budget 0.5] [--layers 4] [--width 512]
                                         [--batch 4] [--length 128] [--rounds 5]

Bytes are observed: ``torch.autograd.graph.saved_tensors_hooks``, every storage once, without parameters and buffers; ratios to
eager. The hooks see what the whole graph of ``torch.compile`` keeps, and of a checkpointed model the boundaries alone. Steps
(forward and backward) take turns in one run, one thread, medians. Gradients are compared with eager's in the largest norm,
worst parameter, one below a thousandth of the largest on that. "exact" is ``recipe=Finetune(autocast=…)``, "approximate" the same
with ``exact=False``, "budget" the first with ``budget=…``, whose plan is printed. LoRA stands on q and v alone ("lora"), or on
every linear layer of the blocks ("lora-all"); everything else is frozen. Dropout is off.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tautomer

WAYS = ("eager", "compile", "checkpoint", "exact", "approximate", "budget")
BLOCKS = ("ViTLayer", "BertLayer", "GPT2Block", "LlamaDecoderLayer")


@dataclass(frozen=True)
class Case:
    """A model, one call, and the loss of what it returns."""

    model: nn.Module
    call: dict[str, Tensor]

    def loss(self, model: nn.Module) -> Tensor:
        return next(iter(model(**self.call).values())).float().square().mean()


def vit(a: argparse.Namespace) -> Case:
    config = transformers.ViTConfig(**_size(a), intermediate_size=4 * a.width, num_labels=100, hidden_dropout_prob=0.0,
                                    attention_probs_dropout_prob=0.0)  # fmt: skip
    return Case(transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(a.batch, 3, 224, 224)})


def bert(a: argparse.Namespace) -> Case:
    config = transformers.BertConfig(**_size(a), intermediate_size=4 * a.width, vocab_size=1024, hidden_dropout_prob=0.0,
                                     attention_probs_dropout_prob=0.0)  # fmt: skip
    return Case(transformers.BertModel(config, add_pooling_layer=False), {"input_ids": _ids(a)})


def gpt2(a: argparse.Namespace) -> Case:
    config = transformers.GPT2Config(n_embd=a.width, n_layer=a.layers, n_head=a.width // 64, vocab_size=1024, use_cache=False,
                                     bos_token_id=0, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return Case(transformers.GPT2LMHeadModel(config), {"input_ids": _ids(a)})


def llama(a: argparse.Namespace) -> Case:
    config = transformers.LlamaConfig(**_size(a), intermediate_size=a.width * 43 // 16, vocab_size=1024, use_cache=False)
    return Case(transformers.LlamaForCausalLM(config), {"input_ids": _ids(a)})


MODELS: dict[str, Callable[[argparse.Namespace], Case]] = {"vit": vit, "bert": bert, "gpt2": gpt2, "llama": llama}


def _size(a: argparse.Namespace) -> dict[str, int]:
    return {"hidden_size": a.width, "num_hidden_layers": a.layers, "num_attention_heads": a.width // 64}


def _ids(a: argparse.Namespace) -> Tensor:
    return torch.randint(0, 1024, (a.batch, a.length))


class Lora(nn.Module):
    """y = f(x) + B A x, f frozen."""

    def __init__(self, layer: nn.Module, rank: int = 8) -> None:
        super().__init__()
        inputs, outputs = layer.weight.shape if isinstance(layer, transformers.Conv1D) else reversed(layer.weight.shape)
        self.layer, self.A, self.B = layer, nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.B(self.A(x))


def tune(model: nn.Module, tuning: str) -> None:
    if tuning == "full":
        return
    model.requires_grad_(False)
    for block in [m for m in model.modules() if type(m).__name__ in BLOCKS]:
        for path, layer in [(p, m) for p, m in block.named_modules() if isinstance(m, nn.Linear | transformers.Conv1D)]:
            name = path.rpartition(".")[2]
            if tuning == "lora-all" or name in ("q_proj", "v_proj", "query", "value", "c_attn"):
                block.set_submodule(path, Lora(layer))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kept(model: nn.Module, step: Callable[[], Tensor]) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}

    def see(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        step()
    return sum(storage.nbytes() for key, storage in seen.items() if key not in own)


def ways(case: Case, names: Sequence[str], dtype: torch.dtype | None, budget: float) -> dict[str, nn.Module]:
    def recipe(exact: bool = True, budget: float | None = None) -> nn.Module:
        recipe = tautomer.Finetune(exact=exact, autocast=dtype, budget=budget)
        lean = tautomer.optimize(copy.deepcopy(case.model), kwargs=case.call, recipe=recipe, check=False)
        if lean.report.plan is not None:
            print(lean.report.plan)
        return lean

    def checkpointed() -> nn.Module:
        model = copy.deepcopy(case.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
        return model

    make: dict[str, Callable[[], nn.Module]] = {
        "eager": lambda: copy.deepcopy(case.model),
        "compile": lambda: torch.compile(copy.deepcopy(case.model)),  # type: ignore[return-value]
        "checkpoint": checkpointed,
        "exact": recipe,
        "approximate": lambda: recipe(False),
        "budget": lambda: recipe(budget=budget),
    }
    return {name: make[name]().train() for name in names}


def compare(case: Case, a: argparse.Namespace, dtype: torch.dtype | None) -> None:
    made = ways(case, a.ways, dtype, a.budget)

    def forward(name: str) -> Tensor:
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            return case.loss(made[name])

    def step(name: str) -> float:
        made[name].zero_grad()
        start = time.perf_counter()
        forward(name).backward()
        return time.perf_counter() - start

    for name in made:
        step(name)  # compiles
    gradients = {name: [p.grad for p in trainable(model).values()] for name, model in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(a.rounds):
        for name in made:
            times[name].append(step(name))
    base, seconds = kept(made["eager"], lambda: forward("eager")), statistics.median(times["eager"])
    for name, model in made.items():
        size, took = kept(model, lambda name=name: forward(name)), statistics.median(times[name])  # type: ignore[misc]
        pairs = [(g, e) for g, e in zip(gradients[name], gradients["eager"], strict=True) if g is not None and e is not None]
        floor = 1e-3 * max(float(e.abs().max()) for _, e in pairs)  # the bias of a key has no gradient but rounding noise
        error = max(float((g - e).abs().max()) / max(float(e.abs().max()), floor) for g, e in pairs)
        print(f"  {name:<12} {size:>13,} {size / base:>7.3f} {took * 1e3:>9.1f} ms {took / seconds:>7.3f} {error:>10.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tuning", nargs="+", default=["full", "lora", "lora-all"], choices=["full", "lora", "lora-all"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    for name, value in (("layers", 4), ("width", 512), ("batch", 4), ("length", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--budget", type=float, default=0.5)
    a = parser.parse_args()
    a.ways = ["eager", *(way for way in a.ways if way != "eager")]
    torch.set_num_threads(1)
    print(f"  {'way':<12} {'bytes':>13} {'ratio':>7} {'step':>12} {'ratio':>7} {'gradients':>10}")
    for name in a.models:
        for tuning in a.tuning:
            for dtype in a.dtypes:
                torch.manual_seed(0)
                case = MODELS[name](a)
                tune(case.model, tuning)
                print(f"{name}, {tuning}, {dtype}: {a.layers} layers, width {a.width}, batch {a.batch}")
                compare(case, a, torch.bfloat16 if dtype == "bfloat16" else None)


if __name__ == "__main__":
    main()
