"""A model's LayerNorms become UN in place, keep their parameters, and train as well."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.nn import UnifiedNorm, replace_layer_norms
from tautomer.rewrite.errors import UsageError

D = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.Linear(6, 6), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Which of six tokens is the most frequent?"""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(4, D), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(ids))).mean(1))


def train(model: nn.Module, steps: int) -> float:
    """The mean loss over the last steps."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), 3e-3), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        ids = torch.randint(4, (64, 6), generator=generator)
        loss = F.cross_entropy(model(ids), F.one_hot(ids, 4).sum(1).argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    ids = torch.randint(4, (256, 6), generator=torch.Generator().manual_seed(2))
    return float(F.cross_entropy(model(ids), F.one_hot(ids, 4).sum(1).argmax(-1)))


def test_it_trains_as_well() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    replace_layer_norms(twin, warmup=30)
    untrained = loss_of(model)
    ours, theirs = train(twin, 250), train(model, 250)
    assert theirs < 0.4 * untrained and ours < 1.25 * theirs + 0.02, (untrained, theirs, ours)
    at_inference = loss_of(twin.eval())
    assert at_inference < 1.5 * ours + 0.05, (ours, at_inference)


def test_parameters_names_and_mode_stay() -> None:
    model = Model().eval()
    before, parameters = set(model.state_dict()), list(model.parameters())
    weight = model.blocks[0].norm.weight
    paths = replace_layer_norms(model)
    assert paths == ("norm", "blocks.0.norm", "blocks.0.norm2", "blocks.1.norm", "blocks.1.norm2")
    assert model.blocks[0].norm.weight is weight and model.blocks[0].norm.eps == 1e-6 and not model.norm.training
    assert before < set(model.state_dict())
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}


def test_only_below_a_path() -> None:
    model = Model()
    assert replace_layer_norms(model, ["blocks.1"]) == ("blocks.1.norm", "blocks.1.norm2")
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.blocks[1].norm, UnifiedNorm)


def test_a_module_in_two_places_is_replaced_by_one() -> None:
    norm = nn.LayerNorm(D)
    model = nn.Sequential(norm, nn.Linear(D, D), norm)
    assert replace_layer_norms(model) == ("0", "2") and model[0] is model[2]


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def test_what_is_no_plain_layer_norm_is_left() -> None:
    model = nn.Sequential(
        nn.LayerNorm((4, D)), ChannelsFirst(D), nn.LayerNorm(D, elementwise_affine=False), nn.LayerNorm(D, bias=False)
    )
    assert replace_layer_norms(model) == ("2", "3")
    assert model[2].weight is None and model[3].bias is None


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(UsageError, match=r"no nn\.LayerNorm"):
        replace_layer_norms(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"no module(.|\n)*'blocks.0.norm'"):
        replace_layer_norms(Model(), ["block.0.norm"])
    with pytest.raises(UsageError, match="where it stands"):
        replace_layer_norms(nn.LayerNorm(D))
