"""Rotary embeddings over halves, in the spellings of transformers and timm: raised; what turns otherwise stays."""

from __future__ import annotations

import pytest
import torch
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.esm import modeling_esm
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert
from transformers.models.olmo2 import modeling_olmo2
from zoo.rotations import run, turned


def halves(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), dim=-1)


ACROSS = {
    "llama": modeling_llama.rotate_half,
    "timm": halves,
    "split": lambda x: (lambda a, b: torch.cat((-b, a), dim=-1))(*x.split(4, dim=-1)),
    "split sizes": lambda x: (lambda a, b: torch.cat((b.neg(), a), dim=3))(*x.split([4, 4], dim=-1)),
    "narrow": lambda x: torch.cat((-x.narrow(-1, 4, 4), x.narrow(-1, 0, 4)), dim=-1),
    "slices to the end": lambda x: torch.cat((-x[..., 4:8], x[..., 0:4]), dim=-1),
}


@pytest.mark.parametrize("across", ACROSS.values(), ids=ACROSS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated(across, dtype):
    nodes, program, _ = run(turned(across), dtype)
    assert len(nodes) == 2 and all(len(node.args) == 3 for node in nodes)
    assert not {torch.ops.aten.neg.default, torch.ops.aten.add.Tensor} & {node.target for node in program.graph.nodes}


MODELS = {
    "llama": modeling_llama.apply_rotary_pos_emb,
    "modernbert": modeling_modernbert.apply_rotary_pos_emb,
    "olmo2": modeling_olmo2.apply_rotary_pos_emb,
    "esm": modeling_esm.apply_rotary_pos_emb,
    "gemma3n": lambda q, k, c, s: (
        modeling_gemma3n.apply_rotary_pos_emb(q, c, s),
        modeling_gemma3n.apply_rotary_pos_emb(k, c, s),
    ),
}


@pytest.mark.parametrize("function", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_transformers(function, dtype):
    nodes, _, _ = run(function, dtype)
    assert len(nodes) == 2


def test_positions_before_heads():
    nodes, _, _ = run(lambda q, k, c, s: modeling_llama.apply_rotary_pos_emb(q, k, c, s, unsqueeze_dim=2), heads_first=False)
    assert len(nodes) == 2


def test_the_other_direction_negates_the_sine():
    """nanochat: [b, -a]."""
    nodes, _, _ = run(turned(lambda x: torch.cat((x[..., 4:], -x[..., :4]), dim=-1)))
    assert len(nodes) == 2 and all(node.args[2].target is torch.ops.aten.neg.default for node in nodes)


def test_image_tokens_behind_prefix_tokens():
    """DINOv3 rotates patches only."""

    def function(q, k, cos, sin):
        return modeling_dinov3_vit.apply_rotary_pos_emb(q, k, cos[0, 1:], sin[0, 1:])

    nodes, _, _ = run(function)
    assert len(nodes) == 2


NEAR_MISSES = {
    "both signs": lambda x: torch.cat((-x[..., 4:], -x[..., :4]), dim=-1),
    "no sign": lambda x: torch.cat((x[..., 4:], x[..., :4]), dim=-1),
    "not swapped": lambda x: torch.cat((-x[..., :4], x[..., 4:]), dim=-1),
    "another axis": lambda x: torch.cat((-x[:, :1], x[:, 1:]), dim=1),
    "another tensor": lambda x: halves(x.tanh()),
}


@pytest.mark.parametrize("across", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(across):
    nodes, _, log = run(turned(across))
    assert not nodes and not log.applications


def test_unequal_parts_are_refused():
    _, _, log = run(turned(lambda x: torch.cat((-x[..., 2:], x[..., :2]), dim=-1)))
    assert log.refusals[0].reason == "the first part has 2 of 8 channels, not half of them"


def test_a_cosine_without_channels_is_refused():
    _, _, log = run(lambda q, k, c, s: (q * c[..., :1] + halves(q) * s[..., :1], k))
    assert "cos and sin are 1 and 1 wide, what they rotate 8" in log.refusals[0].reason


def test_a_rotation_of_complex_numbers_stays():
    def function(q, k, cos, sin):
        turn = torch.complex(cos[..., :4], sin[..., :4])
        return torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (4, 2))) * turn).flatten(-2), k

    nodes, _, log = run(function)
    assert not nodes and not log.applications
    assert [r.reason for r in log.refusals] == ["a rotation of complex numbers is one product already, and stays as it is"]


def test_complex_numbers_that_do_not_turn_are_no_miss():
    _, _, log = run(lambda q, k, c, s: (torch.view_as_complex(q.unflatten(-1, (4, 2))).abs(), k))
    assert not log.refusals
