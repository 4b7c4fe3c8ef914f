"""``optimize_`` on Hugging Face models: the class, ``generate``, saving and loading, hooks and wrappers keep working."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from zoo.models import ZOO

import tautomer
from tautomer.rewrite.errors import UsageError

RMS = "layer-norm-to-rms-norm"


def answers(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**call)[0]


def written(name: str) -> tuple[nn.Module, dict[str, Any], torch.Tensor, Any, tautomer.Rewriting]:
    """A model rewritten in place, its call, what it answered and generated before, and what was done: at any size, or at one."""
    model, call = ZOO[name]()
    sizes = "auto" if name in ("gpt2", "vit") else "static"
    model.config.use_cache = True
    before, tokens = answers(model, call), generated(model, call)
    model.config.use_cache = False
    return model, call, before, tokens, tautomer.optimize_(model, (), call, target="onnxruntime", dynamic_shapes=sizes)


def generated(model: nn.Module, call: dict[str, Any]) -> torch.Tensor | None:
    if not hasattr(model, "generate"):
        return None
    given = {name: value for name, value in call.items() if not name.startswith("decoder")}
    return model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=True)


@pytest.mark.parametrize(("name", "norms"), [("gpt2", 5), ("vit", 5), ("whisper", 5), ("opt", 5)])
def test_class_answers_tokens_and_files(name: str, norms: int, tmp_path: Path) -> None:
    model, call, before, tokens, done = written(name)
    kind = type(model)
    assert kind is type(ZOO[name]()[0]) and done.report.fired(RMS) == norms and len(done.modules) >= norms
    torch.testing.assert_close(answers(model, call), before, rtol=1e-4, atol=1e-4)
    if tokens is not None:
        assert torch.equal(generated(model, call), tokens)

    model.save_pretrained(tmp_path)
    stock = kind.from_pretrained(tmp_path).eval()
    assert not any(type(module).__name__.startswith("Rewritten") for module in stock.modules())
    torch.testing.assert_close(answers(stock, call), before, rtol=1e-4, atol=1e-4)
    tautomer.save_form(model, tmp_path)
    tautomer.load_form(stock, tmp_path)
    assert torch.equal(answers(stock, call), answers(model, call))


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "norms"), [("llama", 5), ("t5", 12)])
def test_norms_that_are_written_by_hand(name: str, norms: int, tmp_path: Path) -> None:
    model, call = ZOO[name]()
    kind, before, tokens = type(model), answers(model, call), generated(model, call)
    done = tautomer.optimize_(model, (), call, mode="eval", dynamic_shapes="static")
    assert done.report.fired("raise-rms-norm") == norms == len(done.modules) and type(model) is kind
    torch.testing.assert_close(answers(model, call), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(model, call), tokens)
    model.save_pretrained(tmp_path)
    tautomer.save_form(model, tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    tautomer.load_form(again, tmp_path)
    assert torch.equal(answers(again, call), answers(model, call))


FRESH = """
import sys, torch, transformers, tautomer
folder = sys.argv[1]
call, wanted = torch.load(folder + "/call.pt")
model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
tautomer.load_form(model, folder)
pickled = torch.load(folder + "/model.pt", weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**call)[0], wanted) and torch.equal(pickled(**call)[0], wanted)
print(type(model.transformer.ln_f).__name__, type(pickled.transformer.ln_f).__name__)
"""


def test_a_fresh_process_loads_what_was_saved(tmp_path: Path) -> None:
    model, call = ZOO["gpt2"]()
    tautomer.optimize_(model, (), call, target="onnxruntime", dynamic_shapes="static")
    model.save_pretrained(tmp_path)
    tautomer.save_form(model, tmp_path)
    torch.save((call, answers(model, call)), tmp_path / "call.pt")
    torch.save(model, tmp_path / "model.pt")
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.split() == ["RewrittenLayerNorm"] * 2, run.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_and_embeddings_are_the_models_own() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20, use_cache=False,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model, call = transformers.GPT2LMHeadModel(config).train(), {"input_ids": torch.arange(10).view(2, 5)}
    tautomer.optimize_(model, (), call, target="onnxruntime", dynamic_shapes="static")
    model(**call, labels=call["input_ids"]).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**call, labels=call["input_ids"]).loss.backward()
    assert plain.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.allclose(p.grad, plain[name], atol=1e-6) for name, p in model.named_parameters() if name in plain)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: object(), "only a module can be rewritten in place, not a object"),
        (lambda: tautomer.optimize(nn.Linear(2, 2).eval(), (torch.randn(2, 2),)), "made by tautomer.optimize"),
    ],
)
def test_what_is_no_model_of_the_users_is_refused(model: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        tautomer.optimize_(model(), (torch.randn(2, 2),))
