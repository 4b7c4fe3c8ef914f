"""A model's linear layers become structured ones in place; what is not meant stays, what cannot be is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.nn import BlockDenseLinear, BlockShuffleLinear, LowRankLinear, SelfGuidedLinear, replace_linears
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.structured import BlockDense, BlockShuffle, LowRank

D = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(D, D), nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table, self.h = nn.Embedding(10, D), nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(D, 10, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.h:
            x = block(x)
        return self.head(x)


MLPS = tuple(f"h.{i}.mlp.{j}" for i in range(3) for j in (0, 2))


@pytest.mark.parametrize(
    ("form", "kind"), [(LowRank(4), LowRankLinear), (BlockDense(2, 6), BlockDenseLinear), (BlockShuffle(4), BlockShuffleLinear)]
)
def test_the_feedforward_layers(form, kind):
    model = Model().eval()
    before, biases = copy.deepcopy(model), [block.mlp[0].bias for block in model.h]
    assert replace_linears(model, form, ["h.*.mlp"], merge_below=2) == MLPS
    for i, block in enumerate(model.h):
        assert type(block.mlp[0]) is kind and block.mlp[0].bias is biases[i] and block.mlp[0].merge_below == 2
        assert type(block.attn) is nn.Linear and not block.mlp[2].training
        W = before.h[i].mlp[2].weight
        expected = form.merged(*form.nearest(W.detach().double()))
        assert torch.allclose(block.mlp[2].merged(), expected.float(), atol=1e-6)


def test_the_first_block_may_keep_its_own():
    model = Model()
    assert replace_linears(model, LowRank(4), ["h.*.mlp"], keep_first=True) == MLPS[2:]
    stack = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
    assert replace_linears(stack, LowRank(4), keep_first=True) == ("0", "2"), "a layer is no block"


def test_only_and_skip_and_a_form_by_size():
    model = Model()
    paths = replace_linears(model, LowRank.at(0.5), skip=["head", "h.*.attn", "h.2"])
    assert paths == MLPS[:4] and model.h[0].mlp[0].form == LowRank(3) == model.h[0].mlp[2].form


@pytest.mark.parametrize(("init", "guide"), [("spectral", False), ("orthogonal", True), ("nearest", True)])
def test_starts_and_guides(init, guide):
    model = Model()
    weight, bias = model.h[0].mlp[0].weight, model.h[0].mlp[0].bias
    replace_linears(model, LowRank(4), ["h.*.mlp"], init=init, guide=guide, std=0.1)
    guided = model.h[0].mlp[0]
    layer = guided.layer if guide else guided
    assert isinstance(guided, SelfGuidedLinear) is guide and layer.bias is bias
    if guide:
        assert (guided.weight is weight) is (init == "nearest")
        assert init == "nearest" or torch.equal(guided.weight, layer.merged())
    if init == "spectral":
        assert torch.allclose(layer.V.norm(dim=1), layer.U.norm(dim=0), rtol=1e-4) and layer.V.norm() < 2


def test_a_layer_in_two_places_is_replaced_by_one_and_a_frozen_one_stays_frozen():
    layer = nn.Linear(D, D).requires_grad_(False)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert replace_linears(model, LowRank(2)) == ("0", "2") and model[0] is model[2]
    assert not any(p.requires_grad for p in model.parameters())


def test_transformers_conv1d_and_the_weight_that_a_model_asks_for():
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
    ids = torch.arange(6)[None]
    expected = gpt2(ids).logits
    paths = replace_linears(gpt2, LowRank(8), ["transformer.h.*.mlp"])
    assert paths == tuple(f"transformer.h.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj"))
    assert torch.allclose(gpt2(ids).logits, expected, atol=1e-5), "of full rank it is the same function"
    with pytest.raises(UsageError, match=r"'lm_head' is tied to that of 'transformer.wte'"):
        replace_linears(gpt2, LowRank(2), ["lm_head"])
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    replace_linears(t5, LowRank(4), ["*.block.*.layer.*.DenseReluDense"])
    assert t5(input_ids=ids, labels=ids).loss.isfinite()


def test_attention_of_torch_keeps_its_last_layer():
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval()
    assert replace_linears(layer, LowRank(8)) == ("linear1", "linear2")
    assert layer(torch.randn(1, 3, D)).shape == (1, 3, D)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (nn.Sequential(nn.ReLU()), {}, "no linear layer there"),
        (nn.Linear(D, D), {}, "where it stands"),
        (Model(), {"only": ["h.*.mpl"]}, r"'h\.\*\.mpl' is no module"),
        (Model(), {"skip": ["h.9"]}, r"'h\.9' is no module"),
        (Model(), {"only": ["h"], "skip": ["h"]}, "no linear layer there"),
        (Model(tied=True), {}, r"'head' is tied to that of 'table'\n.*skip=\['head'\]"),
        (Model(), {"form": LowRank(9)}, r"'h\.0\.attn': a matrix \[8, 8\] has no rank 9"),
        (Model(), {"init": "ones", "only": ["h"]}, "init='ones'"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_has_changed(model, options, sentence):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=sentence):
        replace_linears(model, **{"form": LowRank(4), **options})
    assert list(before) == list(model.state_dict())


def test_it_trains():
    model, generator = Model(), torch.Generator().manual_seed(1)
    replace_linears(model, LowRank(4), ["h.*.mlp"], init="spectral")
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(120):
        ids = torch.randint(10, (32, 4), generator=generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), (3 * ids.flatten() + 1) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
