"""Equal blocks are found with and without provenance; a block with another eps, width or mask is another block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.models import ids, pixels, randomize

from tautomer.rewrite.blocks import Block, blocks, repeated
from tautomer.rewrite.capture import capture
from tautomer.rewrite.program import Program

D = 8
CAUSAL = torch.ones(16, 16, dtype=torch.bool).tril()
WINDOW = CAUSAL & ~CAUSAL.tril(-3)


class Layer(nn.Module):
    def __init__(self, eps: float = 1e-5, inner: int = 12, mask: Tensor | None = None, scale: float = 0.5):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D, eps=eps), nn.Linear(D, 3 * inner), nn.Linear(inner, D)
        self.scale = scale
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mask = self.mask if mask is None else mask
        scores = q @ k.transpose(-1, -2) * self.scale
        if mask is not None:
            kept = mask[: x.shape[1], : x.shape[1]]
            scores = scores.masked_fill(~kept, -1e9) if mask.dtype is torch.bool else scores + kept
        return x + self.out(scores.softmax(-1) @ v)


class Stack(nn.Module):
    def __init__(self, layers: Sequence[nn.Module], masks: Sequence[Callable[[int], Tensor]] = ()):
        super().__init__()
        self.layers, self.masks, self.stem = nn.ModuleList(layers), masks, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        masks = [make(x.shape[1]) for make in dict.fromkeys(self.masks)]
        for i, layer in enumerate(self.layers):
            x = layer(x, masks[list(dict.fromkeys(self.masks)).index(self.masks[i])]) if masks else layer(x)
        return x


X = torch.randn(2, 5, D)


def program(layers: Sequence[nn.Module], masks: Sequence[Callable[[int], Tensor]] = ()) -> Program:
    return capture(Stack(layers, masks).eval(), (X,))


def without_provenance(found: Program) -> Program:
    for node in found.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return found


def paths(groups: Sequence[Sequence[Block]]) -> list[list[str]]:
    return [[str(block) for block in group] for group in groups]


def sizes(groups: Sequence[Sequence[Block]]) -> list[int]:
    return [len(group) for group in groups]


BOTH = pytest.mark.parametrize("strip", [lambda p: p, without_provenance], ids=["provenance", "repetition"])


@BOTH
def test_equal_layers_are_one_group_with_an_interface(strip: Callable[[Program], Program]) -> None:
    found = strip(program([Layer() for _ in range(4)]))
    (group,) = repeated(found)
    assert len(group) == 4 and len({len(block.nodes) for block in group}) == 1
    for before, block in pairwise(group):
        assert before.outputs == block.inputs[:1] and len(block.inputs) == 1 and len(block.weights) == 6


@BOTH
@pytest.mark.parametrize(
    "other",
    [{"eps": 1e-6}, {"inner": 16}, {"mask": CAUSAL}, {"scale": 0.25}],
    ids=["eps", "width", "mask", "literal"],
)
def test_another_layer_is_not_equal(strip: Callable[[Program], Program], other: dict[str, Any]) -> None:
    found = strip(program([Layer(), Layer(), Layer(), Layer(**other)]))
    assert sizes(repeated(found)) == [3]


@BOTH
@pytest.mark.parametrize("floating", [False, True])
def test_a_table_that_selects_is_part_of_the_block(strip: Callable[[Program], Program], floating: bool) -> None:
    masks = [torch.zeros(16, 16).masked_fill(~m, -torch.inf) if floating else m for m in (CAUSAL, CAUSAL, WINDOW, WINDOW)]
    found = strip(program([Layer(mask=mask.clone()) for mask in masks]))
    groups = repeated(found)
    assert sizes(groups) == [2, 2] and groups[0][1].outputs[0] in groups[1][0].inputs


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def window(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril().triu(-2)


@BOTH
def test_a_mask_from_outside_tells_blocks_apart_and_the_stream_does_not(strip: Callable[[Program], Program]) -> None:
    one = strip(program([Layer() for _ in range(4)], [causal] * 4))
    assert sizes(repeated(one)) == [4]
    two = strip(program([Layer() for _ in range(4)], [causal, window, causal, window]))
    groups = repeated(two)
    assert sizes(groups) == [2, 2] and [block.inputs[1] for block in groups[0]] == [groups[0][0].inputs[1]] * 2


def test_one_module_called_three_times_is_three_blocks_of_one_path() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.layers[0](self.layers[0](x)))

    (group,) = repeated(capture(Recurrent().eval(), (X,)))
    assert [block.path for block in group] == ["layers.0"] * 3 and len({block.weights for block in group}) == 1


def test_modules_of_one_call_are_parts_of_a_period() -> None:
    model = nn.Sequential(*(module for _ in range(3) for module in (nn.Linear(D, D), nn.ReLU()))).eval()
    (group,) = repeated(capture(model, (X,)))
    assert [[node.target for node in block.nodes] for block in group] == [
        [torch.ops.aten.linear.default, torch.ops.aten.relu.default]
    ] * 3


def test_equal_blocks_inside_unequal_stages() -> None:
    class Stage(nn.Module):
        def __init__(self, depth: int):
            super().__init__()
            self.blocks = nn.ModuleList(Layer() for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    expected = [f"layers.{stage}.blocks.{i}" for stage, depth in enumerate((2, 3)) for i in range(depth)]
    assert paths(repeated(program([Stage(2), Stage(3)]))) == [expected]


class Loop(nn.Module):
    """A Pre-LN decoder without a module: lists of parameters and a Python loop."""

    def __init__(self, depth: int = 4, gates: Sequence[float] = ()):
        super().__init__()
        shapes = {"g": (D,), "b": (D,), "qkv": (3 * D, D), "o": (D, D), "g2": (D,), "up": (4 * D, D), "down": (D, 4 * D)}
        self.tables = nn.ModuleDict({k: nn.ParameterList(torch.randn(s) for _ in range(depth)) for k, s in shapes.items()})
        self.tokens, self.depth, self.gates = nn.Parameter(torch.randn(20, D)), depth, gates or [1.0] * depth

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = F.embedding(ids, self.tokens), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for i in range(self.depth):
            w = {name: table[i] for name, table in self.tables.items()}
            q, k, v = F.linear(F.layer_norm(x, [D], w["g"], w["b"]), w["qkv"]).chunk(3, -1)
            x = x + F.linear((q @ k.mT * 0.3).masked_fill(~mask, -1e9).softmax(-1) @ v, w["o"])
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, [D], w["g2"]), w["up"])), w["down"]) * self.gates[i]
        return F.linear(F.layer_norm(x, [D]), self.tokens)


IDS = torch.randint(20, (2, 7))


@pytest.mark.parametrize("exported", [False, True])
def test_a_loop_without_modules(exported: bool) -> None:
    model = Loop().eval()
    found = capture(torch.export.export(model, (IDS,)).module() if exported else model, (IDS,))
    (group,) = repeated(found)
    assert len(group) == 4 and len(group[0].weights) == 7
    assert all(len(block.outputs) == 1 and len(block.inputs) == 2 for block in group), "the stream and the mask"
    assert group[0].nodes[0].target is torch.ops.aten.layer_norm.default and group[0].outputs == group[1].inputs[:1]


def test_a_turn_of_the_loop_with_another_literal_stands_apart() -> None:
    (group,) = repeated(capture(Loop(5, gates=[0.5, 1.5, 1.5, 1.5, 1.5]).eval(), (IDS,)))
    assert len(group) == 4


def test_q_k_and_v_are_no_loop() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return (q @ k.mT).softmax(-1) @ v

    assert repeated(capture(Attention().eval(), (X,))) == ()


def test_one_and_one_point_zero_are_two_literals() -> None:
    class Powers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for i in (1, 1.0):
                x = torch.sin(torch.ops.aten.add.Scalar(x, i) if x.dtype is torch.int64 else torch.add(x, x, alpha=i))
            return x

    assert repeated(capture(Powers().eval(), (X,))) == ()


def test_the_blocks_are_all_calls_in_order() -> None:
    for found in (program([Layer(), Layer(eps=1e-3)]), capture(Loop().eval(), (IDS,))):
        calls = [node for node in found.graph.nodes if node.op == "call_function"]
        assert [node for block in blocks(found) for node in block.nodes] == calls


TINY: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": False}


def test_gpt2() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=12, n_head=2, n_positions=16, **TINY)
    found = capture(transformers.GPT2LMHeadModel(config).eval(), (), {"input_ids": ids()})
    assert paths(repeated(found)) == [[f"transformer.h.{i}" for i in range(12)]]
    assert sizes(repeated(without_provenance(found))) == [12]


def test_vit() -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    found = capture(transformers.ViTModel(config).eval(), (), {"pixel_values": pixels()})
    (group,) = repeated(found)
    assert [block.path.rsplit(".", 1)[-1] for block in group] == ["0", "1", "2"]
    assert sizes(repeated(without_provenance(found))) == [3]


def test_t5_has_two_groups_and_the_first_blocks_compute_the_position_bias() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, decoder_start_token_id=0, **TINY)
    model = randomize(transformers.T5ForConditionalGeneration(config))
    found = capture(model, (), {"input_ids": ids(), "decoder_input_ids": ids(2, 5)})
    assert paths(repeated(found)) == [[f"{side}.block.{i}" for i in (1, 2, 3)] for side in ("encoder", "decoder")]
    assert sizes(repeated(without_provenance(found))) == [3, 3]
