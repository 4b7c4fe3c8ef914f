"""The attention of a Hugging Face model is raised through its own registry, and is the eager one wherever that says more."""

from __future__ import annotations

import copy
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
from tautomer.backends.hugging_face import NAME, implementations
from tautomer.rewrite.errors import UsageError

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def eager(name: str) -> tuple[Any, dict[str, Any]]:
    model, call = ZOO[name]()
    model.set_attn_implementation("eager")
    if name == "llama":  # its norms are written in float32, too, and say so
        return model, call
    return model.double(), {key: x.double() if x.is_floating_point() else x for key, x in call.items()}


def within(name: str, x: torch.Tensor) -> dict[str, float]:
    """ViT and OPT write their softmax in float32, whatever the model."""
    exact = 1e-6 if name in ("vit", "opt") else 1e-12
    return {"rtol": 0, "atol": exact if x.dtype is torch.float64 else 2e-5}


def optimize_(model: nn.Module, call: dict[str, Any], **options: Any) -> tautomer.Rewriting:
    """One mode and one size, where nothing else is said: what is proven at all sizes is not what these tests are about."""
    options = {"mode": "eval", "dynamic_shapes": "static", "passes": ["raise-attention"], **options}
    return tautomer.optimize_(model, (), call, **options)


def names(model: nn.Module) -> set[str]:
    return {name for _, name in implementations(model)}


LAYERS = {"gpt2": 2, "bert": 2, "t5": 6, "whisper": 6, "llama": 2, "vit": 2, "opt": 2}


FAMILIES = [name if name in ("gpt2", "t5") else pytest.param(name, marks=pytest.mark.zoo) for name in LAYERS]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_the_same_and_still_gives_probabilities(name: str) -> None:
    model, call = eager(name)
    with torch.no_grad():
        wanted, probabilities = model(**call)[0], model(**call, output_attentions=True)
        done = optimize_(model, call)
        assert done.report.fired("raise-attention") == LAYERS[name] and names(model) == {NAME}
        torch.testing.assert_close(model(**call)[0], wanted, **within(name, wanted))
        again = model(**call, output_attentions=True)
    for key in [key for key in probabilities if key.endswith("attentions")]:
        torch.testing.assert_close(again[key], probabilities[key], **within(name, wanted))


def test_padded_prompts_generate_the_same_tokens() -> None:
    model, call = eager("llama")
    original, mask = copy.deepcopy(model), torch.ones_like(call["input_ids"])
    mask[0, :3] = 0
    assert optimize_(model, call, dynamic_shapes="auto").report.fired("raise-attention") == 2
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(**call, **options), original.generate(**call, **options))
    with torch.no_grad():
        ours, theirs = model(**call, attention_mask=mask)[0], original(**call, attention_mask=mask)[0]
    torch.testing.assert_close(ours, theirs, **within("llama", theirs))  # hidden rows too


def test_dropout_of_probabilities_is_the_models_own() -> None:
    model, call = eager("gpt2")
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    original = copy.deepcopy(model).train()
    optimize_(model, call)
    model.train()
    drawn = []
    for m in (model, original):
        torch.manual_seed(0)
        drawn.append(m(**call)[0])
    assert torch.equal(*drawn) and not torch.equal(drawn[0], original.eval()(**call)[0])


def test_whoever_forbids_it_or_runs_another_function_keeps_it() -> None:
    model, call = eager("gpt2")
    original = copy.deepcopy(model)
    done = optimize_(model, call, skip=["transformer.h.1.attn"])
    # The registry is for all of them; the block of the other one takes it by itself.
    assert names(model) == {"eager"} and done.report.fired("raise-attention") == 1
    torch.testing.assert_close(model(**call)[0], original(**call)[0])
    model = original
    optimize_(model, call, skip=["raise-attention"])
    assert names(model) == {"eager"}
    model.set_attn_implementation("sdpa")
    optimize_(model, call)
    assert names(model) == {"sdpa"}


def test_a_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import tautomer.backends.hugging_face as file

    real = file.scaled_dot_product_attention
    monkeypatch.setattr(file, "scaled_dot_product_attention", lambda q, k, v, mask, **options: real(q, k, v, **options))
    model, call = eager("gpt2")
    original = copy.deepcopy(model)
    done = optimize_(model, call)
    assert names(model) == {"eager"} and done.report.fired("raise-attention") == 2  # in the blocks, with the right one
    torch.testing.assert_close(model(**call)[0], original(**call)[0])
    assert any("not through the registry of attention functions" in refusal.reason for refusal in done.report.refusals)


FRESH = """
import sys, torch, transformers
model, call, wanted = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**call)[0], wanted)
print(model.config._attn_implementation)
"""


def test_copies_files_and_forms_keep_it(tmp_path: Path) -> None:
    model, call = eager("gpt2")
    optimize_(model, call)
    assert names(copy.deepcopy(model)) == {NAME}
    with torch.no_grad():
        wanted = model(**call)[0]
    torch.save((model, call, wanted), tmp_path / "model.pt")
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert run.stdout.strip() == NAME, run.stderr[-2000:]
    model.save_pretrained(tmp_path)
    tautomer.save_form(model, tmp_path)
    stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert names(stock) == {"sdpa"}
    tautomer.load_form(stock, tmp_path)
    assert names(stock) == {NAME} and torch.equal(stock(**call)[0], wanted)
    with pytest.raises(UsageError, match="no module of this Linear was rewritten"):
        tautomer.save_form(nn.Linear(2, 2), tmp_path)
