"""The matrices of feedforward layers become structured: the nearest to the pretrained ones, or fresh; all else stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.lowrank.structure_ffn import StructureFfn
from tautomer.passes.recipes import EXACT
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.structured import BlockDense, BlockShuffle, LowRank

D, W = 8, 16
NAMING = ["drop-unused-weights", "name-weights"]
X = torch.randn(2, 5, D, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, W), nn.Linear(W, D, bias=False)

    def forward(self, x):
        x = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


def model(blocks=2):
    return nn.Sequential(*(Block() for _ in range(blocks))).double().eval()


def optimize(model, *args, check=True, **options):
    return tautomer.optimize(model, (X,), passes=[StructureFfn(*args, **options), *NAMING], check=check)


def factors(model, *args, context=None, **options):
    """The new weights of a captured model, by name, and the log."""
    program, context = tautomer.capture(model, (X,)), context or Context()
    StructureFfn(*args, **options).run(program, context)
    return {name: program.weights.value(name) for name in program.weights if name.endswith((".V", ".U"))}, context.log


@pytest.mark.parametrize("form", [LowRank(3), BlockDense(2, 6), BlockShuffle(4)])
def test_it_is_the_model_with_the_nearest_matrices_at_every_size(form):
    original = model()
    expected = copy.deepcopy(original)
    for block in expected:
        for layer in (block.up, block.down):
            layer.weight.data.copy_(form.merged(*form.nearest(layer.weight.detach())))
    fast = optimize(original, form)
    assert fast.report.fired("structure-ffn") == 4
    for x in (X, torch.randn(1, 9, D, dtype=torch.float64)):
        assert torch.allclose(fast(x), expected(x), atol=1e-12) and not torch.allclose(fast(x), original(x), atol=1e-3)
    count = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in fast.parameters())
    assert count == 2 * (2 * D * W - form.numel(W, D) - form.numel(D, W))
    assert all(p.requires_grad for p in fast.parameters())


def test_the_factors_are_parameters_of_their_own(tmp_path):
    one, other = model(), model()
    fast = optimize(one, LowRank(3))
    mapped = fast.weights.from_original(other.state_dict())
    assert torch.equal(mapped["0.up.V"], fast.state_dict()["0.up.V"]) and torch.equal(mapped["0.q.bias"], other[0].q.bias)
    assert {"0.up.V", "0.up.U", "0.up.bias", "0.down.V", "0.down.U"} < set(fast.state_dict())
    assert "0.up.weight" not in fast.state_dict()
    with torch.no_grad():
        fast.get_parameter("0.up.V").mul_(2)
    tautomer.save(fast, tmp_path)
    assert torch.equal(tautomer.load(tmp_path)(X), fast(X))
    one[0].up.weight.requires_grad_(False)
    assert not optimize(one, LowRank(3)).get_parameter("0.up.U").requires_grad


def test_a_fresh_start_is_drawn_per_layer_and_the_same_every_time():
    one = model(1)
    first, again, other = (factors(one, LowRank(4), "spectral", seed=seed)[0] for seed in (0, 0, 1))
    assert list(first) == ["0.up.V", "0.up.U", "0.down.V", "0.down.U"]
    for name in first:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    twice, _ = factors(model(2), LowRank(4), "plain")
    assert not torch.equal(twice["0.up.V"], twice["1.up.V"])


def test_the_first_may_stay_and_places_can_be_chosen():
    _, log = factors(model(3), LowRank(3), keep_first=True)
    assert [a.id.split("@")[1].split("/")[0] for a in log.applications] == ["1.up", "1.down", "2.up", "2.down"]
    _, log = factors(model(2), LowRank(3), context=Context(only=("1.down",)))
    assert [a.id for a in log.applications] == ["structure-ffn@1.down/linear_9"]


@pytest.mark.zoo
def test_gated_and_stored_transposed():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=17, hidden_size=D, intermediate_size=W, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    ).eval()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=D, n_layer=2, n_head=2)).eval()
    ids = torch.arange(6)[None] % 17
    for network, layers in ((llama, 3), (gpt2, 2)):
        fast = tautomer.optimize(network, (), {"input_ids": ids, "use_cache": False}, passes=[StructureFfn(), *NAMING])
        assert fast.report.fired("structure-ffn") == 2 * layers
        assert fast(input_ids=torch.cat([ids, ids]), use_cache=False).logits.shape == (2, 6, 17)
        assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in network.parameters())


def test_it_trains_with_dropout_after_it():
    both = tautomer.capture(model(1), (X,), mode="both")
    fast = tautomer.optimize(both, passes=[StructureFfn(BlockShuffle(2)), *NAMING])
    assert torch.equal(fast.eval()(X), fast(X)) and not torch.equal(fast.train()(X), fast(X))
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    before = {name: value.detach().clone() for name, value in fast.named_parameters()}
    fast.train()(X).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in fast.named_parameters() if "k.bias" not in name)


class Transposed(Block):
    """Weights stored as the Conv1D of transformers does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(D, W)), nn.Parameter(torch.randn(W, D))

    def forward(self, x):
        y = torch.addmm(self.up.bias, x.view(-1, D), self.a)
        return x + (F.gelu(y) @ self.b).view(x.shape)


@pytest.mark.parametrize("form", [BlockDense(2, 4), BlockShuffle(4)])
def test_weights_stored_transposed(form):
    original = Transposed().double().eval()
    expected = copy.deepcopy(original)
    for weight in (expected.a, expected.b):
        weight.data.copy_(form.merged(*form.nearest(weight.detach().t())).t())
    fast = optimize(original, form)
    assert fast.report.fired("structure-ffn") == 2 and torch.allclose(fast(X), expected(X), atol=1e-12)
    assert not {"a", "b"} & set(fast.state_dict())


class Tied(Block):
    def __init__(self):
        super().__init__()
        self.down.weight = nn.Parameter(self.up.weight.detach().t().clone())

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x))) + F.linear(x, self.up.weight).mean(-1, keepdim=True)


class Normed(Block):
    def forward(self, x):
        return x + self.down(F.gelu(F.linear(x, self.up.weight * x.mean())))


@pytest.mark.parametrize(
    ("block", "form", "reason"),
    [
        (Block, LowRank(9), "a matrix [16, 8] has no rank 9"),
        (Block, LowRank(6), "the factors would have 144 parameters, the matrix has 128"),
        (Block, BlockShuffle(5), "5 blocks do not divide the 8 of inputs"),
        (Tied, LowRank(2), "aten.linear 'linear_2' also reads 'up.weight', and would learn apart from the factors"),
        (Normed, LowRank(2), "the weight is computed at run time"),
    ],
)
def test_refusals(block, form, reason):
    _, log = factors(block().double().eval(), form)
    assert reason in [refusal.reason for refusal in log.refusals]


def test_weights_that_are_edited_at_every_call_are_refused():
    report = tautomer.optimize(model(), (X,), recipe="training", passes=[StructureFfn(LowRank(2))]).report
    assert not report.applications and "trains the model's own matrices" in report.refusals[0].reason


@pytest.mark.zoo
def test_it_is_in_no_recipe_and_survives_export(tmp_path):
    assert StructureFfn not in EXACT
    fast = tautomer.optimize(model().float(), (X.float(),), passes=[StructureFfn(BlockShuffle(4)), *NAMING])
    tautomer.export_onnx(fast, tmp_path / "model.onnx", (X.float(),))  # which runs the file and compares
