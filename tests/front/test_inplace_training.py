"""Rewritten in place for training, a model trains as it did: the same object, the same parameters, the same trajectory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.models import randomize

import tautomer
from tautomer.rewrite.errors import UsageError

RMS = "layer-norm-to-rms-norm"
X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
IDS = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3 + 0.1
    return model.double().train()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return randomize(transformers.GPT2LMHeadModel(config)).double().train()


def optimize_(model: nn.Module, call: Any = (X,), kwargs: Any = None, **options: Any) -> tautomer.Rewriting:
    """At one size, where nothing else is said."""
    options = {"recipe": "training", "target": "inductor", "dynamic_shapes": "static", **options}
    return tautomer.optimize_(model, call, kwargs, **options)


def steps(model: nn.Module, batch: Tensor = X, count: int = 5, lr: float = 1e-2) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1), []
    for _ in range(count):
        optimizer.zero_grad()
        result = model(batch)
        loss = (result if isinstance(result, Tensor) else result.logits).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-10) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.allclose(ours[n], theirs[n], rtol=0, atol=tolerance) for n in ours)


@pytest.fixture
def model() -> nn.Module:
    return net()


def test_adamw_follows_the_trajectory_and_the_weights_are_the_users(model: nn.Module) -> None:
    original, before = copy.deepcopy(model), dict(model.named_parameters())
    done = optimize_(model, dynamic_shapes="auto")
    assert done.report.fired(RMS) == 3 and not done.edits and isinstance(model[3], nn.LayerNorm)
    assert all(p is before[name] and p.requires_grad for name, p in model.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), original.parameters(), strict=True))
    losses, ours = steps(original), steps(model)
    assert abs(losses[-1] - losses[0]) > 1e-2 and max(abs(a - b) for a, b in zip(losses, ours, strict=True)) < 1e-12
    assert close(model, original)


def test_the_inference_form_leaves_the_trajectory(model: nn.Module) -> None:
    original = copy.deepcopy(model)
    optimize_(model, recipe="inference")
    assert max(abs(a - b) for a, b in zip(steps(original), steps(model), strict=True)) > 1e-6


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_tied_table_trains_from_both_of_its_readers() -> None:
    model = gpt2()
    original = copy.deepcopy(model)
    done = optimize_(model, (), {"input_ids": IDS}, dynamic_shapes="auto")
    assert done.report.fired(RMS) == 5 and "transformer.wte" in done.modules
    assert model.lm_head.weight is model.transformer.wte.weight
    assert max(abs(a - b) for a, b in zip(steps(original, IDS), steps(model, IDS), strict=True)) < 1e-12
    assert close(model, original)
    tokens = IDS[:, :4]
    generated = [m.eval().generate(tokens, max_new_tokens=4, do_sample=False) for m in (original, model)]
    assert torch.equal(*generated)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert abs(steps(model, IDS, 1)[0] - steps(original.train(), IDS, 1)[0]) < 1e-12 and close(model, original)


def test_state_dicts_of_either_load_into_the_other(model: nn.Module) -> None:
    original = copy.deepcopy(model)
    done = optimize_(model)
    steps(model)
    original.load_state_dict(model.state_dict())
    assert torch.allclose(original(X), model(X), rtol=0, atol=1e-12)
    model.load_state_dict(dict(net().state_dict()))
    assert torch.allclose(net()(X), model(X), rtol=0, atol=1e-12)
    assert done.to_original(model.state_dict()).keys() == original.state_dict().keys()


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_a_copy_trains_on_its_own(model: nn.Module, through: str) -> None:
    optimize_(model)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    steps(twin)
    assert not close(twin, model) and close(model, net(), 0.0)
    steps(model)
    assert close(twin, model, 0.0)


def test_autocast_and_compile(model: nn.Module) -> None:
    original = copy.deepcopy(model).float()
    optimize_(model.float(), (X.float(),))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(X.float()), original(X.float())
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses, ours = steps(original, X.float(), 3), steps(compiled, X.float(), 3)
    assert max(abs(a - b) for a, b in zip(losses, ours, strict=True)) < 1e-5


def test_folding_computes_the_edits_once(model: nn.Module) -> None:
    optimize_(model)
    steps(model)
    wanted = model(X)
    done = tautomer.fold_(model, (X,))
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12) and done.report.fired("fold-weights")
    assert all(block.down.weight.mean(0).abs().max() < 1e-12 for block in model[1:3])
    assert not tautomer.capture(model, (X,)).count(torch.ops.aten.mean.dim)
    stock = net()
    stock.load_state_dict(model.state_dict())
    assert torch.allclose(stock(X), wanted, rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="was rewritten in place"):
        model.load_state_dict(net().state_dict())
    model.load_state_dict(done.from_original(net().state_dict()))
    assert torch.allclose(net()(X), model(X), rtol=0, atol=1e-12)


def test_folding_leaves_a_tied_table_as_it_is() -> None:
    model = gpt2()
    optimize_(model, (), {"input_ids": IDS})
    steps(model, IDS, 2)
    wanted, table = model(IDS).logits, model.lm_head.weight.detach().clone()
    done = tautomer.fold_(model, (), {"input_ids": IDS}, dynamic_shapes="static")
    assert done.report.fired("fold-weights") and torch.allclose(model(IDS).logits, wanted, rtol=0, atol=1e-12)
    assert torch.equal(model.transformer.wte.weight, table) and model.lm_head.weight is model.transformer.wte.weight


def test_there_must_be_something_to_fold(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="no module of this Sequential was rewritten"):
        tautomer.fold_(model, (X,))


class Scaled(nn.Module):
    """A writer whose weight another module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.inner, self.norm, self.head = nn.Linear(8, 8), Borrower(), nn.LayerNorm(8), nn.Linear(8, 3)
        self.inner.__dict__["lender"] = self.other

    def forward(self, x):
        return self.head(self.norm(self.inner(x) + self.other(x)))


class Borrower(nn.Module):
    def forward(self, x):
        return F.linear(x, self.lender.weight)


def test_a_weight_that_its_reader_does_not_hold_cannot_be_edited_there() -> None:
    torch.manual_seed(0)
    model = Scaled().double()
    wanted, kinds = model(X), [type(m) for m in model.modules()]
    done = optimize_(model)
    assert not done.report.fired(RMS) and [type(m) for m in model.modules()] == kinds and torch.equal(model(X), wanted)
    assert any("'other.weight', which Borrower does not hold" in r.reason for r in done.report.refusals if r.rewrite == RMS)
