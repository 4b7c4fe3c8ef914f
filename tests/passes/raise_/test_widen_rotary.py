"""A rotary embedding of the first channels beside the rest is one of the whole; of other channels it is not."""

from __future__ import annotations

import pytest
import torch
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama.modeling_llama import rotate_half
from transformers.models.nemotron import modeling_nemotron
from transformers.models.phi3 import modeling_phi3
from zoo.rotations import run


def parted(q, k, cos, sin):
    q, rest = q.split([4, 4], dim=-1)
    return torch.cat([q * cos + rotate_half(q) * sin, rest], -1), k


@pytest.mark.parametrize("kind", [modeling_gpt_neox, modeling_phi3, modeling_nemotron, modeling_glm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_transformers(kind, dtype):
    nodes, program, _ = run(kind.apply_rotary_pos_emb, dtype, width=4)
    outputs = program.output.args[0]
    assert len(nodes) == 2 and set(outputs) == set(nodes)
    assert all(node.args[0].op == "placeholder" for node in nodes)


def test_a_split():
    nodes, _, _ = run(lambda q, k, c, s: parted(q, k, c[:, None], s[:, None]), width=4)
    assert nodes[0].args[0].op == "placeholder"


def test_the_last_channels_stay_cut_off():
    """DeepSeek rotates the last channels."""

    def function(q, k, cos, sin):
        rest, q = q.split([4, 4], dim=-1)
        return torch.cat([rest, q * cos[:, None] + rotate_half(q) * sin[:, None]], -1), k

    nodes, _, log = run(function, width=4)
    assert len(nodes) == 1 and {a.rewrite for a in log.applications} == {"raise-rotary"}


def test_another_rest_is_refused():
    def function(q, k, cos, sin):
        a = q[..., :4]
        return torch.cat([a * cos[:, None] + rotate_half(a) * sin[:, None], q[..., 4:6]], -1), k

    _, _, log = run(function, width=4)
    assert "a slice ends at channel 6 of 8" in [refusal.reason for refusal in log.refusals]


def test_a_wider_result_is_refused():
    """bfloat16 rotated by float32: the rest would be rounded up with it, but apart it is not."""

    def function(q, k, cos, sin):
        q = q.bfloat16()
        a, rest = q[..., :4], q[..., 4:]
        return torch.cat([a * cos[:, None] + rotate_half(a) * sin[:, None], rest], -1), k

    _, _, log = run(function, width=4)
    assert "the rotated channels are torch.float32, the others torch.bfloat16" in [r.reason for r in log.refusals]
