"""``optimize_`` with low rank: class, ``generate``, saving, hooks and adapters stay; a linear layer holds two factors."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo.models import randomize

import tautomer
from tautomer import _inplace
from tautomer.rewrite.errors import ClaimBroken, UsageError

NAME = "factor-linears"
IDS = torch.randint(31, (6, 8, 12), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": ids} for ids in IDS]
CALL = {"input_ids": IDS[0, :2, :7]}
RECIPE = tautomer.Compress(ratio=0.5)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=None, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return randomize(transformers.GPT2LMHeadModel(config)).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=None, use_cache=False, attention_dropout=0.2,
    )  # fmt: skip
    return randomize(transformers.LlamaForCausalLM(config)).eval()


def compressed(model: nn.Module, **options: Any) -> tautomer.Rewriting:
    return tautomer.optimize_(model, (), CALL, recipe=RECIPE, data=DATA, **options)


@pytest.fixture(scope="module")
def once() -> tuple[nn.Module, tautomer.Rewriting]:
    model = gpt2()
    return model, compressed(model)


@pytest.fixture
def model(once: Any) -> nn.Module:
    """A model that was compressed, for one test."""
    return copy.deepcopy(once[0])


def logits(model: nn.Module, ids: Tensor = CALL["input_ids"]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def greedy(model: nn.Module, input_ids: Tensor, count: int) -> Tensor:
    ids = input_ids
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_it_is_the_form_of_optimize_in_the_users_class(model: nn.Module, once: Any) -> None:
    whole, done = tautomer.optimize(gpt2(), (), CALL, recipe=RECIPE, data=DATA), once[1]
    assert type(model) is transformers.GPT2LMHeadModel and isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    assert done.report.fired(NAME) == whole.report.fired(NAME) == len(done.modules) >= 2
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    torch.testing.assert_close(logits(model), logits(whole))
    tokens = model.generate(**CALL, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(tokens, greedy(whole, CALL["input_ids"], 6))


def test_it_saves_loads_and_trains(tmp_path: Path) -> None:
    model, called = llama(), list[str]()
    modules = dict(model.named_modules())
    modules["model.layers.0.mlp.up_proj"].register_forward_hook(lambda *_: called.append("up"))
    done = compressed(model)
    assert dict(model.named_modules()) == modules and done.report.fired(NAME) >= 3 and called
    assert torch.equal(model.generate(**CALL, max_new_tokens=6, do_sample=False, use_cache=True), greedy(model, **CALL, count=6))
    model.save_pretrained(tmp_path)
    tautomer.save_form(model, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]  # nothing is stored twice
    again = type(model).from_pretrained(tmp_path).eval()
    assert not torch.allclose(logits(again), logits(model))
    tautomer.load_form(again, tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.state_dict().keys() == model.state_dict().keys()

    twin, losses = copy.deepcopy(again).train(), list[float]()
    assert not torch.equal(logits(twin), logits(twin))  # it was compressed in eval mode, and its dropout is there
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-2)
    for _ in range(4):
        loss = twin(**DATA[0], labels=DATA[0]["input_ids"]).loss
        loss.backward()
        assert all(p.grad is not None for p in twin.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(logits(again), logits(model))


FRESH = """
import sys, torch, transformers, tautomer
folder = sys.argv[1]
ids, wanted = torch.load(folder + "/call.pt")
model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
tautomer.load_form(model, folder)
pickled = torch.load(folder + "/model.pt", weights_only=False)
with torch.no_grad():
    assert torch.equal(model(ids).logits, wanted) and torch.equal(pickled(ids).logits, wanted)
print(*(tuple(m.transformer.h[0].mlp.c_fc.weight.shape) for m in (model, pickled)))
"""


def test_a_fresh_process_loads_what_was_saved(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tautomer.save_form(model, tmp_path)
    torch.save((CALL["input_ids"], logits(model)), tmp_path / "call.pt")
    torch.save(model, tmp_path / "model.pt")
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.strip() == "(32, 128) (32, 128)", run.stderr[-2000:]


def test_any_saver_of_weights_will_do(tmp_path: Path) -> None:
    """The form brings the factors along that no file beside it has, and refuses a folder with others."""
    model, x = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1)).double(), torch.randn(4, 32, 6, 6).double()
    model[0].requires_grad_(False)
    dense = copy.deepcopy(model)
    tautomer.optimize_(model, (x,), recipe=tautomer.Compress(0.5, "uniform"), data=[x])
    assert model[0].V.shape[1:] == (32, 1, 1) and not model[0].U.requires_grad and model[2].U.requires_grad
    tautomer.save_form(model, tmp_path)
    again = copy.deepcopy(dense)
    tautomer.load_form(again, tmp_path)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    torch.testing.assert_close(nn.functional.conv2d(x, model[0].weight, model[0].bias), model[0](x))

    (tmp_path / "tautomer.safetensors").rename(tmp_path / "model.safetensors")
    with torch.no_grad():
        model[0].U.mul_(2)
    with pytest.raises(UsageError, match=r"has another '0\.U'"):
        tautomer.save_form(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no '0\.U'"):
        tautomer.load_form(dense, tmp_path)
    assert type(dense[0]) is nn.Conv2d and "weight" in dense[0]._parameters


def test_state_dicts_say_what_they_hold(model: nn.Module, once: Any) -> None:
    dense, done, wanted = gpt2(), once[1], logits(model)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias.add_(1)
    model.load_state_dict(state)
    assert torch.equal(logits(model), wanted)
    with pytest.raises(UsageError, match="was rewritten in place"):
        model.load_state_dict(dense.state_dict())
    model.load_state_dict(done.from_original(dense.state_dict()))
    torch.testing.assert_close(logits(model), wanted)
    dense.load_state_dict(original := done.to_original(model.state_dict()))
    model.load_state_dict(done.from_original(original))
    torch.testing.assert_close(logits(model), wanted)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_stays_beside_the_factors(model: nn.Module) -> None:
    wanted, held = logits(model), model.transformer.h[0].mlp.c_fc
    torch.testing.assert_close(held.weight, (held.U @ held.V).T)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True))
    assert torch.equal(logits(wrapped), wanted)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        loss = wrapped(**DATA[0], labels=DATA[0]["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(UsageError, match="a merged adapter would be lost"):
        wrapped.merge_and_unload()


def test_whatever_is_raised_the_model_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh()).eval(), torch.randn(400, 64)
    before = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()]
    classes = [type(module) for module in model.modules()]

    def broken(*_: Any) -> None:
        raise ClaimBroken("on purpose")

    monkeypatch.setattr(_inplace, "_compare", broken)
    with pytest.raises(ClaimBroken, match="on purpose"):
        tautomer.optimize_(model, (x[:5],), recipe=RECIPE, data=[x])
    assert classes == [type(module) for module in model.modules()]
    now = [(name, id(p), p) for name, p in model.named_parameters()]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, now, strict=True))
    assert not any("_tautomer_exchanged" in vars(module) for module in model.modules())
    with pytest.raises(UsageError, match=r"data\[0\]"):
        tautomer.optimize_(model, (x[:5],), recipe=RECIPE, data=[{"ids": x}])


def test_factors_are_factored_again() -> None:
    """A second time the factors are layers of their own, and the product of the three is what the layer answers for."""
    model, x = nn.Sequential(nn.Linear(128, 128), nn.Tanh()).eval(), torch.randn(400, 128)
    for ratio in (0.7, 0.5):
        tautomer.optimize_(model, (x[:5],), recipe=tautomer.Compress(ratio=ratio, allocation="uniform"), data=[x])
    whole = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert whole <= 0.5 * 0.7 * 128 * 128 and "weight" not in model[0]._parameters
    torch.testing.assert_close(torch.tanh(nn.functional.linear(x, model[0].weight, model[0].bias)), model(x))


def test_two_layers_of_one_weight_and_layers_without_a_leaf_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.twice = nn.Parameter(torch.randn(32, 32)), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.twice(self.twice(x).tanh()), self.own)

    model, x = Odd().eval(), torch.randn(40, 32)
    keys = set(model.state_dict())
    done = tautomer.optimize_(model, (x,), recipe=RECIPE, data=[x])
    reasons = " ".join(r.reason for r in done.report.refusals)
    assert not done.report.fired(NAME) and set(model.state_dict()) == keys
    assert "also read by aten.linear" in reasons and "stands in the forward of Odd" in reasons


def test_factors_that_were_saved_stay_until_the_new_form_is_written(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tautomer.save_form(model, tmp_path)
    factors = tmp_path / "tautomer.safetensors"
    assert factors.exists()
    model.save_pretrained(tmp_path)  # has them too: the file beside it is not needed any more

    def full(*args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", full)
        with pytest.raises(UsageError, match="No space left"):
            tautomer.save_form(model, tmp_path)
    assert factors.exists()
    tautomer.save_form(model, tmp_path)
    assert not factors.exists()
