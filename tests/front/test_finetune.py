"""The recipe "finetune" in the settings people fine-tune in: the losses of the original, and fewer bytes, in each."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo.models import randomize

import tautomer
from tautomer.backends.rewritten import Rewritten

IDS = [ids.clone() for ids in torch.randint(31, (4, 3, 9), generator=torch.Generator().manual_seed(1))]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name


def gpt2(dropout: float = 0.1) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=1,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,
    )  # fmt: skip
    return randomize(transformers.GPT2LMHeadModel(config)).train()


def lora(*layers: str) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=list(layers), fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config, autocast_adapter_dtype=False).train()


def frozen_backbone() -> nn.Module:
    """A backbone that does not train but for the MLP of its last block, and a head."""
    model = gpt2().requires_grad_(False)
    model.transformer.h[0].mlp.requires_grad_()
    model.lm_head = nn.Linear(24, 31)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "full": gpt2,
    "lora on q, k, v": lambda: lora("c_attn"),
    "lora on all": lambda: lora("c_attn", "c_fc", "c_proj"),
    "frozen backbone": frozen_backbone,
}


SLOW = {"lora on q, k, v"}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.zoo] * (name in SLOW)) for name in MODELS])
def pair(request: Any) -> tuple[nn.Module, Rewritten]:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    return model, tautomer.optimize(copy.deepcopy(model), (), {"input_ids": IDS[0]}, recipe="finetune")


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def losses(model: nn.Module, autocast: bool = False, accumulate: int = 1, clip: float | None = None) -> list[float]:
    torch.manual_seed(0)
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.1)
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = loss_of(model, IDS[step])
        (loss / accumulate).backward()
        found.append(loss.item())
        if (step + 1) % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad()
    return found


SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 1e-5),
    "accumulated and clipped": ({"accumulate": 2, "clip": 0.1}, 1e-5),
    "autocast": ({"autocast": True}, 2e-2),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_losses_are_the_originals_dropout_and_all(pair: Any, setting: str) -> None:
    model, lean = copy.deepcopy(pair)
    options, tolerance = SETTINGS[setting]
    ours, theirs = losses(lean, **options), losses(model, **options)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= tolerance


def test_fewer_bytes_are_kept_and_the_names_are_the_originals(pair: Any, observed: Any) -> None:
    model, lean = pair
    assert observed(lean, input_ids=IDS[0]) == tautomer.saved_tensors(lean).bytes
    assert observed(lean, input_ids=IDS[0]) < 0.8 * observed(model, input_ids=IDS[0])
    assert lean.state_dict().keys() == model.state_dict().keys()
    trains = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, lean)]
    assert trains[0] == trains[1]


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return result


class Mlp(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


def test_below_a_checkpoint_gradients_are_right_and_nothing_more_is_saved(observed: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Mlp()).train(), torch.randn(5, 8)
    lean = copy.deepcopy(model)
    lean[1] = tautomer.optimize(lean[1], (x,), recipe="finetune")
    found = []
    for form in (model, lean):
        form[1] = Checkpointed(form[1])
        torch.manual_seed(0)
        form.zero_grad()
        form(x).square().sum().backward()
        found.append([p.grad for p in form.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert observed(lean, x) == observed(model, x), "a checkpoint keeps its input, whatever is in it"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.zoo)])
def test_what_the_model_checkpoints_itself_stays_so_and_nothing_in_it_is_rewritten(reentrant: bool, observed: Any) -> None:
    inner, x = nn.Sequential(Mlp(), Mlp()), torch.randn(50, 8)
    model = nn.Sequential(nn.Linear(8, 8), Checkpointed(inner, reentrant), Mlp()).train()
    lean = tautomer.optimize(copy.deepcopy(model), (x,), recipe="finetune")
    assert {a.id.partition("@")[2][0] for a in lean.report.applications} == {"2"}
    refused = {r.reason for r in lean.report.refusals if "@1." in r.id and r.rewrite == "pack-dropout-masks"}
    assert refused == {
        "it is in a checkpoint, which keeps what it is given and nothing of what it computes: nothing would be freed"
    }
    assert not [note for note in lean.report.notes if note.rewrite == "finetune"]
    forced, dissolved = copy.deepcopy(model), copy.deepcopy(model)
    forced[1].inner = tautomer.optimize(copy.deepcopy(inner), (x,), recipe="finetune")
    dissolved[1] = inner
    assert forced[1].inner.report.fired("pack-dropout-masks") == 2 and observed(forced, x) == observed(model, x), (
        "it would free nothing"
    )
    assert tautomer.saved_tensors(lean).bytes == observed(lean, x) < observed(model, x) < observed(dissolved, x)
    gradients = []
    for form in (model, lean):
        torch.manual_seed(0)
        form(x).square().sum().backward()
        gradients.append([p.grad for p in form.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_hugging_faces_own_checkpoints_stay(observed: Any) -> None:
    model, ids = gpt2(), IDS[0]
    model.activation_checkpointing_enable({"use_reentrant": False})
    lean = tautomer.optimize(copy.deepcopy(model), (), {"input_ids": ids}, recipe="finetune")
    assert observed(lean, input_ids=ids) == tautomer.saved_tensors(lean).bytes <= observed(model, input_ids=ids)
    assert losses(lean) == pytest.approx(losses(model), abs=1e-5)


def test_a_checkpoint_that_the_capture_dissolves_is_told(observed: Any) -> None:
    """A second run would move the statistics of a batch norm twice: a captured graph does not."""
    inner = nn.Sequential(nn.BatchNorm1d(8), Mlp(), Mlp())
    model, x = nn.Sequential(nn.Linear(8, 8), Checkpointed(inner)).train(), torch.randn(50, 8)
    lean = tautomer.optimize(copy.deepcopy(model), (x,), recipe="finetune")
    as_written, ours = observed(model, x), observed(lean, x)
    assert as_written < ours
    (note,) = [note.text for note in lean.report.notes if note.rewrite == "finetune"]
    assert note == (
        f"the forward as it is written keeps {as_written:,} bytes, this one {ours:,}: what it checkpoints is not checkpointed "
        "here; checkpoint the rewritten module, or rewrite what is not checkpointed"
    )
    plain = tautomer.optimize(nn.Sequential(nn.Linear(8, 8), Mlp()).train(), (x,), recipe="finetune")
    assert not [note for note in plain.report.notes if note.rewrite == "finetune"]


def test_compiled_saved_and_copied_it_has_the_gradients_of_the_original(tmp_path: Path, observed: Any) -> None:
    model, x = nn.Sequential(Mlp(0.0), Mlp(0.0)), torch.randn(5, 8)
    lean = tautomer.optimize(copy.deepcopy(model), (x,), recipe="finetune")
    tautomer.save(lean, tmp_path / "lean")
    forms = {
        "compiled": torch.compile(lean, fullgraph=True, backend="aot_eager_decomp_partition"),
        "loaded": tautomer.load(tmp_path / "lean").train(),
        "copied": copy.deepcopy(lean),
    }
    model(x).square().sum().backward()
    for name, form in forms.items():
        form.zero_grad()
        if name != "compiled":
            assert observed(form, x) == observed(lean, x)
        form(x).square().sum().backward()
        gradients = [p.grad for p in form.parameters()]
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-4)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_trainer_of_hugging_face_takes_it_like_any_model(byte_lm: Any, held_out: Tensor, tmp_path: Path) -> None:
    from train_byte_lm import windows

    byte_lm.transformer.h = byte_lm.transformer.h[:1]
    byte_lm.config.use_cache = False
    model = byte_lm.train()
    (ids,) = windows(held_out, 1, 8)
    data = [{"input_ids": row[:16], "labels": row[:16]} for row in ids]
    call = {"input_ids": ids[:2, :16], "labels": ids[:2, :16], "num_items_in_batch": torch.tensor(32.0)}
    lean = copy.deepcopy(tautomer.optimize(model, (), call, recipe="finetune"))
    found = []
    for name, form in (("lean", lean), ("model", model)):
        options = transformers.TrainingArguments(
            str(tmp_path / name), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.5, max_steps=2,
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=form, args=options, train_dataset=data)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], abs=1e-4)
