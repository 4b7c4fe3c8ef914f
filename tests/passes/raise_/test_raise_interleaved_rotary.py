"""Rotary embeddings over neighbouring channels, in the spellings of transformers and timm: raised; near misses stay."""

from __future__ import annotations

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.gptj import modeling_gptj
from transformers.models.musicflamingo import modeling_musicflamingo
from zoo.rotations import run, turned


def pairs(x):
    return (lambda a, b: torch.stack((-b, a), -1).flatten(-2))(*x.unflatten(-1, (4, 2)).unbind(-1))


ACROSS = {
    "cohere": modeling_cohere.rotate_half,
    "gptj": modeling_gptj.rotate_every_two,
    "musicflamingo": modeling_musicflamingo.rotate_half,
    "timm": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape),
    "pairs": pairs,
    "select": lambda x: (lambda y: torch.stack((-y[..., 1], y[..., 0]), -1).flatten(-2))(x.view(*x.shape[:-1], 4, 2)),
    "to the end": lambda x: torch.stack((-x[..., 1:8:2], x[..., 0:8:2]), -1).flatten(3),
}


@pytest.mark.parametrize("across", ACROSS.values(), ids=ACROSS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated(across, dtype):
    nodes, program, _ = run(turned(across), dtype)
    assert len(nodes) == 2 and all(node.args[3] is True for node in nodes)
    assert program.count(torch.ops.aten.stack.default) == 0


@pytest.mark.parametrize("kind", [modeling_cohere, modeling_ernie4_5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_transformers_cast_before_or_after(kind, dtype):
    nodes, _, _ = run(kind.apply_rotary_pos_emb, dtype)
    assert len(nodes) == 2


def test_gptj_has_positions_before_heads():
    def function(q, k, cos, sin):
        half = cos[..., :4], sin[..., :4]
        return tuple(modeling_gptj.apply_rotary_pos_emb(x, half[1].expand(2, -1, -1), half[0].expand(2, -1, -1)) for x in (q, k))

    nodes, _, _ = run(function, heads_first=False)
    assert len(nodes) == 2


NEAR_MISSES = {
    "no sign": lambda x: torch.stack((x[..., 1::2], x[..., ::2]), -1).flatten(-2),
    "not swapped": lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2),
    "every fourth": lambda x: torch.stack((-x[..., 1::4], x[..., ::4]), -1).flatten(-2).repeat(1, 1, 1, 2),
    "halves of the stack": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2),
    "another tensor": lambda x: pairs(x.tanh()),
    "pairs of another view": lambda x: pairs(x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)),
}  # fmt: skip


@pytest.mark.parametrize("across", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(across):
    nodes, _, log = run(turned(across))
    assert not nodes and not log.applications


def test_a_view_that_moves_more_than_the_pairs_is_refused():
    def across(x):
        y = x.reshape(x.shape[0], -1, 4, 2)
        return torch.stack((-y[..., 1], y[..., 0]), -1).reshape(x.shape)

    nodes, _, log = run(turned(across))
    assert not nodes and log.refusals[0].reason == "a view moves more than the pairs"
