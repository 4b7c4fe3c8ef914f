"""Training a rewritten model is training the original: any optimizer follows the same trajectory, under the same names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.models import randomize

import tautomer
from tautomer.backends.rewritten import Rewritten
from tautomer.passes.recipes import Training
from tautomer.rewrite.errors import UsageError

STEPS = 50
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd with momentum and decay": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "adam with l2": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1),
}

Batch = tuple[dict[str, Tensor], Tensor]


def gpt2(dropout: float = 0.0) -> tuple[nn.Module, list[Batch]]:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=1,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,
    )  # fmt: skip
    tokens = torch.randint(31, (4, 3, 9), generator=torch.Generator().manual_seed(1))
    return randomize(transformers.GPT2LMHeadModel(config)), [({"input_ids": x[:, :-1]}, x[:, 1:]) for x in tokens]


def vit() -> tuple[nn.Module, list[Batch]]:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4, 3, 3, 16, 16, generator=generator), torch.randint(7, (4, 3), generator=generator)
    model = randomize(transformers.ViTForImageClassification(config))
    return model, [({"pixel_values": x.double()}, y) for x, y in zip(images, labels, strict=True)]


MODELS = {"gpt2": gpt2, "vit": vit}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    inputs, labels = batch
    logits = model(**inputs).logits
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def train(
    model: nn.Module, batches: list[Batch], make: Callable[[Any], torch.optim.Optimizer], steps: int = STEPS
) -> list[float]:
    model.train()
    optimizer, losses = make(model.parameters()), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batches[step % len(batches)])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def rewritten(model: nn.Module, batches: list[Batch], recipe: Any = "training", **options: Any) -> Rewritten:
    fast = tautomer.optimize(copy.deepcopy(model), (), batches[0][0], recipe=recipe, target="inductor", **options)
    assert fast.report.fired("layer-norm-to-rms-norm") == 5
    return fast


def computes_edits(module: Rewritten) -> bool:
    """Whether the graph centres a weight."""
    means = module.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)
    return any(mean.args[0].op == "get_attr" for mean in means)


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: Any) -> tuple[nn.Module, Rewritten, list[Batch]]:
    model, batches = MODELS[request.param]()
    model = model.double()
    return model, rewritten(model, batches), batches


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_follows_the_trajectory_of_the_original(pair: Any, name: str) -> None:
    model, fast, batches = (copy.deepcopy(x) for x in pair)
    losses, ours = (train(m, batches, OPTIMIZERS[name]) for m in (model, fast))
    assert abs(losses[-1] - losses[0]) > 1e-2  # it learned something
    assert max(abs(a - b) for a, b in zip(losses, ours, strict=True)) <= 1e-12
    learned, state = model.state_dict(), fast.state_dict()
    assert list(learned) == list(state)
    for key, value in learned.items():
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-10)


class CentredOnce(Training):
    live = False


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_centring_once_and_training_the_result_does_not(pair: Any, name: str) -> None:
    model, _, batches = pair
    model = copy.deepcopy(model)
    naive = rewritten(model, batches, recipe=CentredOnce())
    losses, ours = (train(m, batches, OPTIMIZERS[name]) for m in (model, naive))
    assert abs(losses[0] - ours[0]) <= 1e-12
    assert max(abs(a - b) for a, b in zip(losses, ours, strict=True)) > 1e-6


def test_folding_what_was_trained_gives_the_inference_form(pair: Any) -> None:
    model, fast, batches = (copy.deepcopy(x) for x in pair)
    train(model, batches, OPTIMIZERS["adamw"], 10)
    fast = tautomer.optimize(model, (), batches[0][0], recipe="training", target="inductor")
    train(fast, batches, OPTIMIZERS["adamw"], 10)
    before = loss_of(fast.eval(), batches[0])
    folded = tautomer.fold(fast)
    assert not folded.training and folded.report.evidence.forward <= 1e-12
    assert abs(loss_of(folded, batches[0]) - before) <= 1e-12
    assert computes_edits(fast) and not computes_edits(folded)


def test_a_module_that_computes_no_edit_at_every_call_cannot_be_folded(pair: Any) -> None:
    _, fast, _ = pair
    with pytest.raises(UsageError, match="nothing to fold"):
        tautomer.fold(tautomer.fold(fast))


def test_a_checkpoint_of_either_loads_into_the_other(pair: Any, tmp_path: Path) -> None:
    model, fast, batches = (copy.deepcopy(x) for x in pair)
    train(fast, batches, OPTIMIZERS["adamw"], 5)
    torch.save(fast.state_dict(), tmp_path / "trained.pt")
    model.load_state_dict(torch.load(tmp_path / "trained.pt"))
    assert abs(loss_of(model.eval(), batches[0]) - loss_of(fast.eval(), batches[0])) <= 1e-12
    fresh = copy.deepcopy(pair[1])
    fresh.load_state_dict(model.state_dict())
    assert abs(loss_of(fresh.eval(), batches[0]) - loss_of(fast, batches[0])) <= 1e-15
    tautomer.save(fast, tmp_path / "saved")
    again = tautomer.load(tmp_path / "saved")
    losses, ours = (train(m, batches, OPTIMIZERS["adamw"], 5) for m in (fast, again))
    assert max(abs(a - b) for a, b in zip(losses, ours, strict=True)) <= 1e-12


def test_accumulation_and_clipping_follow_too(pair: Any) -> None:
    def run(model: nn.Module) -> list[float]:
        model.train()
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
        for _ in range(5):
            optimizer.zero_grad()
            for batch in batches:
                (loss_of(model, batch) / len(batches)).backward()  # type: ignore[no-untyped-call]
            losses.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
        return [*losses, loss_of(model, batches[0]).item()]

    model, fast, batches = (copy.deepcopy(x) for x in pair)
    for a, b in zip(run(model), run(fast), strict=True):
        assert abs(a - b) <= 1e-11 * abs(a)


def test_under_autocast_it_is_as_accurate_as_the_original() -> None:
    model, batches = gpt2()
    fast, exact = rewritten(model, batches), copy.deepcopy(model).double()
    wanted = loss_of(exact, batches[0])

    def errors(m: nn.Module) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(m.train(), batches[0])
        loss.backward()  # type: ignore[no-untyped-call]
        named, true = dict(m.named_parameters()), dict(exact.named_parameters())
        key = "transformer.h.0.mlp.c_proj.weight"
        (gradient,) = torch.autograd.grad(wanted, true[key], retain_graph=True)
        return abs(loss - wanted).item(), float((named[key].grad - gradient).abs().max() / gradient.abs().max())

    original, ours = errors(model), errors(fast)
    assert all(b <= 2 * a + 0.02 for a, b in zip(original, ours, strict=True))


def test_compiled_it_follows_as_well() -> None:
    model, batches = (x.double() if isinstance(x, nn.Module) else x for x in gpt2())
    fast = torch.compile(rewritten(model, batches), backend="aot_eager", fullgraph=True)
    losses, ours = (train(m, batches, OPTIMIZERS["adamw"], 8) for m in (model, fast))
    assert max(abs(a - b) for a, b in zip(losses, ours, strict=True)) <= 1e-12


def test_residual_dropout_is_refused_with_its_reason() -> None:
    model, batches = gpt2(dropout=0.1)
    fast = tautomer.optimize(model.train(), (), batches[0][0], recipe="training", target="inductor")
    assert not fast.report.fired("layer-norm-to-rms-norm")
    assert any("residual dropout" in refusal.reason and "centre" in refusal.reason for refusal in fast.report.refusals)


def test_residual_dropout_is_centred_after_when_asked_to() -> None:
    model, batches = (x.double() if isinstance(x, nn.Module) else x for x in gpt2(dropout=0.1))
    fast = rewritten(model.train(), batches, Training(dropout="centre"))
    assert sum("a mean and a difference over" in note.text for note in fast.report.notes) == 5
    for training in (True, False):
        outputs, gradients = [], []
        for m in (model.train(training), fast.train(training)):
            torch.manual_seed(3)
            loss = loss_of(m, batches[0])
            outputs.append(loss.item())
            gradients.append(torch.autograd.grad(loss, dict(m.named_parameters())["transformer.h.0.mlp.c_proj.weight"])[0])
        assert abs(outputs[0] - outputs[1]) <= 1e-13
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


class DroppedAttention(nn.Module):
    """The queries are scaled by hand, the weights are dropped out by the kernel, and so is what comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        p = 0.2 if self.training else 0.0
        y = F.scaled_dot_product_attention(q * 0.5, k, v, dropout_p=p, scale=1.0)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))


def test_a_rewritten_attention_draws_what_the_original_drew() -> None:
    model, x = DroppedAttention(), torch.randn(3, 5, 8)
    fast = tautomer.optimize(model, (x,), recipe="training")
    assert fast.report.fired("absorb-attention-scale") == 1
    assert len(fast.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)) == 1
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fast(x), expected)


def test_an_unknown_treatment_of_dropout_is_refused() -> None:
    with pytest.raises(UsageError, match="dropout"):
        Training(dropout="ignore")  # type: ignore[arg-type]
