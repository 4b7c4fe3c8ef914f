"""Whole models in one call: which attentions a method takes, which it leaves and why, and that the result runs as ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from zoo.models import ids, pixels, randomize

import tautomer
from tautomer.passes.attention.transfer import Transfer

Call = Callable[[], dict[str, Any]]
_HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_BOTH = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


def model(kind: str, config: str, **options: Any) -> nn.Module:
    return randomize(getattr(transformers, kind)(getattr(transformers, config)(**options)))


def padded() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    return {"input_ids": ids(2, 12), "attention_mask": mask}


def bert() -> tuple[nn.Module, Call]:
    return model("BertForMaskedLM", "BertConfig", **_TEXT, **_HEADS, max_position_embeddings=40), padded


def gpt2() -> tuple[nn.Module, Call]:
    return model("GPT2LMHeadModel", "GPT2Config", **_TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=40), padded


def mistral() -> tuple[nn.Module, Call]:
    options = {**_TEXT, **_HEADS, "num_key_value_heads": 2, "sliding_window": 8}
    return model("MistralForCausalLM", "MistralConfig", **options), padded


def deit() -> tuple[nn.Module, Call]:
    kinds = "DeiTForImageClassification", "DeiTConfig"
    return model(*kinds, **_HEADS, image_size=16, patch_size=4), lambda: {"pixel_values": pixels()}


def whisper() -> tuple[nn.Module, Call]:
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20}
    options = {**_TEXT, **_BOTH, **sizes, "max_target_positions": 40, "decoder_start_token_id": 0}
    subject = model("WhisperForConditionalGeneration", "WhisperConfig", **options)
    return subject, lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(2, 10)}


def t5() -> tuple[nn.Module, Call]:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    subject = model("T5ForConditionalGeneration", "T5Config", **_TEXT, **sizes)
    return subject, lambda: {**padded(), "decoder_input_ids": ids(2, 9)}


_LEARN = Transfer(steps=6)
_CROSS = "its queries and keys are not of one sequence"
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Call]], str, dict[str, Any], int, dict[str, str]]] = {
    "bert-ponet": (bert, "ponet", {"segments": 4, "transfer": _LEARN}, 2, {}),
    "bert-nystrom": (bert, "nystrom", {"landmarks": 4}, 2, {}),
    "gpt2-hybrid": (gpt2, "hybrid", {"window": 4, "transfer": _LEARN}, 2, {}),
    "gpt2-window": (gpt2, "window", {"window": 4}, 2, {}),
    "mistral-hybrid": (mistral, "hybrid", {"window": 4, "transfer": _LEARN}, 0, {"self_attn": "its mask is a window of 8"}),
    "bert-poolformer": (bert, "poolformer", {"grid": (), "architecture": True}, 2, {}),
    "deit-poolformer": (deit, "poolformer", {"prefix": 2, "architecture": True}, 2, {}),
    "deit-linformer": (deit, "linformer", {"slots": 4, "longest": 18, "transfer": _LEARN}, 2, {}),
    "whisper-window": (whisper, "window", {"window": 4}, 4, {"encoder_attn": _CROSS}),
    "whisper-ponet": (
        whisper,
        "ponet",
        {"transfer": _LEARN},
        2,
        {"encoder_attn": _CROSS, "self_attn": "it is causal"},
    ),
    "t5-window": (t5, "window", {"window": 4}, 0, {"SelfAttention": "a bias of positions", "EncDecAttention": _CROSS}),
    "t5-qknorm": (t5, "qknorm", {"transfer": _LEARN}, 6, {}),
}
FIRST = ("deit-poolformer", "whisper-ponet")


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.zoo) for n in CASES])
def test_one_call_is_enough(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    build, method, options, replaced, left = CASES[name]
    torch.manual_seed(0)
    subject, call = build()
    data = [call() for _ in range(3)]
    fast = tautomer.optimize(subject, (), data[0], recipe=tautomer.LongContext(method, **options), data=data)
    (found,) = fast.report.attentions
    assert len(found.replaced) == replaced, str(fast.report)
    for place in found.places:
        assert place.replaced or any(part in place.path and reason in place.reason for part, reason in left.items()), place
    for part in left:
        assert any(part in place.path and not place.replaced for place in found.places)
    assert len(json.loads(json.dumps(fast.report.as_dict()))["log"]["attentions"][0]["places"]) == len(found.places)
    assert (found.moved is None) == (replaced == 0)
    if found.moved is not None:
        assert found.moved.mean > 0 and found.moved.agree is not None
        assert tautomer.draw(fast.report, tmp_path / "attentions.svg").stat().st_size > 1000
    if replaced and request.node.get_closest_marker("zoo"):  # an export takes seconds
        tautomer.export_onnx(fast, tmp_path / "model.onnx", (), data[0])
