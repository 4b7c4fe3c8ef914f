"""Adapters of peft attach to a model that was rewritten in place, train, merge and come off; and adapters are rewritten too."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo.models import randomize

import tautomer
from tautomer.rewrite.errors import UsageError

LATE = "comes after the model was rewritten for training: what an adapter adds would not be edited"
IDS = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return randomize(transformers.GPT2LMHeadModel(config)).double().train()


def adapted(model: nn.Module) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def steps(model: nn.Module, count: int = 3) -> list[float]:
    trained, losses = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(input_ids=IDS).logits.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_adapter_trains_merges_and_comes_off(tmp_path: Path) -> None:
    model = gpt2()
    done = tautomer.optimize_(model, (), {"input_ids": IDS}, target="onnxruntime", dynamic_shapes="static")
    assert done.report.fired("layer-norm-to-rms-norm") == 5
    wanted, state = logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    wrapped = adapted(model)
    assert torch.equal(logits(wrapped), wanted)
    losses = steps(wrapped)
    assert losses[-1] < losses[0] and all("lora" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    trained = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = gpt2()
    tautomer.optimize_(again, (), {"input_ids": IDS}, target="onnxruntime", dynamic_shapes="static")
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(again, tmp_path, autocast_adapter_dtype=False)), trained)

    twin = copy.deepcopy(wrapped)
    bare = twin.unload()
    assert torch.equal(logits(bare), wanted) and all(torch.equal(p, state[name]) for name, p in bare.state_dict().items())
    merged = wrapped.merge_and_unload()
    assert type(merged) is transformers.GPT2LMHeadModel and torch.allclose(logits(merged), trained, rtol=0, atol=1e-12)
    assert isinstance(merged.transformer.ln_f, nn.LayerNorm) and type(merged.transformer.ln_f) is not nn.LayerNorm
    with pytest.raises(UsageError, match="was rewritten in place"):
        merged.load_state_dict(gpt2().state_dict())


def test_an_adapted_model_is_rewritten_for_training_and_keeps_its_trajectory() -> None:
    wrapped = adapted(gpt2())
    original = copy.deepcopy(wrapped)
    done = tautomer.optimize_(wrapped, (), {"input_ids": IDS}, recipe="training", target="inductor", dynamic_shapes="static")
    assert done.report.fired("layer-norm-to-rms-norm") == 5 and type(wrapped) is type(original)
    assert max(abs(a - b) for a, b in zip(steps(original), steps(wrapped), strict=True)) < 1e-12
    ours, theirs = (peft.get_peft_model_state_dict(m) for m in (wrapped, original))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-10) for name in theirs)
    with pytest.raises(UsageError, match=LATE):
        wrapped.add_adapter("beside", wrapped.peft_config["default"])


def test_an_adapter_that_comes_too_late_is_refused_until_the_model_is_folded() -> None:
    model, call = gpt2(), {"input_ids": IDS}
    tautomer.optimize_(model, (), call, recipe="training", target="inductor", dynamic_shapes="static")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UsageError, match=LATE):
            adapted(twin)
    tautomer.fold_(model, (), call)
    wrapped = adapted(model)
    losses = steps(wrapped)
    trained = logits(wrapped)
    assert losses[-1] < losses[0] and torch.allclose(logits(wrapped.merge_and_unload()), trained, rtol=0, atol=1e-12)
