"""Rotary embeddings that turn two halves and join them, as in GPT-OSS: raised; what turns otherwise stays."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss
from zoo.rotations import run


def rotation(turn, q, k, cos, sin):
    return tuple(torch.cat(turn(*x.chunk(2, -1), cos[..., :4], sin[..., :4]), -1) for x in (q, k))


def turned(turn):
    return lambda q, k, cos, sin: rotation(turn, q, k, cos, sin)


SPELLINGS = {
    "gpt-oss": lambda q, k, c, s: modeling_gpt_oss.apply_rotary_pos_emb(q, k, c[..., :4], s[..., :4]),
    "sums in any order": turned(lambda a, b, c, s: (c * a - s * b, a * s + b * c)),
    "slices": lambda q, k, c, s: tuple(
        torch.cat((x[..., :4] * c[..., :4] - x[..., 4:] * s[..., :4], x[..., 4:] * c[..., :4] + x[..., :4] * s[..., :4]), -1)
        for x in (q, k)
    ),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated(function, dtype):
    nodes, program, _ = run(function, dtype)
    assert len(nodes) == 2 and all(len(node.args) == 3 for node in nodes)
    assert torch.ops.aten.sub.Tensor not in {node.target for node in program.graph.nodes}


NEAR_MISSES = {
    "both signs": lambda a, b, c, s: (a * c - b * s, b * c - a * s),
    "no sign": lambda a, b, c, s: (a * c + b * s, b * c + a * s),
    "not swapped": lambda a, b, c, s: (a * c - a * s, b * c + b * s),
    "sine and cosine exchanged": lambda a, b, c, s: (a * c - b * s, b * s + a * c),
    "joined the other way": lambda a, b, c, s: (b * c + a * s, a * c - b * s),
    "other angles": lambda a, b, c, s: (a * c - b * s, b * c.tanh() + a * s),
}


@pytest.mark.parametrize("turn", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(turn):
    nodes, _, log = run(turned(turn))
    assert not nodes and not log.applications


def test_an_angle_for_all_channels_is_refused():
    nodes, _, log = run(turned(lambda a, b, c, s: (a * c[..., :1] - b * s[..., :1], b * c[..., :1] + a * s[..., :1])))
    assert not nodes
    assert "cos and sin are 1 and 1 wide, what they rotate 2 x 4" in log.refusals[0].reason


def test_overlapping_parts_are_refused():
    def function(q, k, c, s):
        a, b, c, s = q[..., :5], q[..., 5:], c[..., :1], s[..., :1]
        return torch.cat((a * c - b[..., :1] * s, b * c + a[..., :3] * s), -1), k

    nodes, _, log = run(function)
    assert not nodes and not log.applications
