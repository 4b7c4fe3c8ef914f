"""How an attention goes on from its past: the state behind the last position, and one position from a state.

    window_attention   the last w keys and values, and the first ones
    block_attention    the keys and values since the last multiple of w
    kernel_attention   S = Σ w k_jᵀ (v_j, 1)
    hybrid_attention   S of what left the window, and the window
    softmax            all keys and values: the one state that grows

What is causal and reads no mask has a state. Any other attention has none, and a sentence that says why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .errors import require
from .library import tautomer

aten = torch.ops.aten
Given = Mapping[str, Any]
"""The arguments of an attention by name."""
Emit = Callable[..., fx.Node]
"""``emit(target, *args, **kwargs)`` makes a node."""


@dataclass(frozen=True)
class AttentionStep:
    """One kind of attention, position by position.

    Attributes:
        state: emits the tensors of the state behind the last position.
        step: emits the attention at one position, from the position and a state, and then the tensors of the new state.
        size: how many tensors a state is.
        fits: refuses what has no state.
        grows: whether the state becomes longer with every position.
    """

    state: Callable[[Emit, Given], list[fx.Node]]
    step: Callable[[Emit, Given, fx.Node, Sequence[fx.Node]], list[fx.Node]]
    size: int
    fits: Callable[[Given], None]
    grows: bool = False


def _parts(emit: Emit, count: int, target: Any, *args: Any) -> list[fx.Node]:
    whole = emit(target, *args)
    return [emit(operator.getitem, whole, i) for i in range(count)]


def _causal(x: Given) -> None:
    require(x.get("causal", x.get("is_causal", True)), "it is not causal: a position sees those after it")
    masks = [x.get(name) for name in ("keep", "mask", "attn_mask")]
    require(masks == [None] * 3, "it reads a mask over all positions; captured without one, it takes prompts of one length")
    require(not x.get("terraced", False), "its window ends at blocks, and keys leave it a block at a time: terraced=False")
    require(x.get("dropout_p", 0.0) == 0.0, "its weights are dropped out")


def _window(emit: Emit, x: Given) -> list[fx.Node]:
    return _parts(emit, 2, tautomer.window_attention_state.v1, x["key"], x["value"], x["window"], x["sinks"])


def _window_step(emit: Emit, x: Given, position: fx.Node, past: Sequence[fx.Node]) -> list[fx.Node]:
    heads = (x["query"], x["key"], x["value"])
    return _parts(emit, 3, tautomer.window_attention_step.v1, *heads, *past, position, x["scale"], x["sinks"])


def _block(emit: Emit, x: Given) -> list[fx.Node]:
    return _parts(emit, 2, tautomer.window_attention_state.v1, x["key"], x["value"], x["block"])


def _block_step(emit: Emit, x: Given, position: fx.Node, past: Sequence[fx.Node]) -> list[fx.Node]:
    heads = (x["query"], x["key"], x["value"])
    return _parts(emit, 3, tautomer.window_attention_step.v1, *heads, *past, position, x["scale"], 0, True)


def _kernel(emit: Emit, x: Given) -> list[fx.Node]:
    heads = (x["query"], x["key"], x["value"])
    return [emit(tautomer.kernel_attention_state.v1, *heads, x["log_decay"], x["normalized"])]


def _kernel_step(emit: Emit, x: Given, position: fx.Node, past: Sequence[fx.Node]) -> list[fx.Node]:
    heads = (x["query"], x["key"], x["value"])
    return _parts(emit, 2, tautomer.kernel_attention_step.v1, *heads, *past, x["log_decay"], x["normalized"])


def _hybrid(emit: Emit, x: Given) -> list[fx.Node]:
    heads = (x["query"], x["key"], x["value"], x["key_features"])
    return _parts(emit, 4, tautomer.hybrid_attention_state.v1, *heads, x["window"])


def _hybrid_step(emit: Emit, x: Given, position: fx.Node, past: Sequence[fx.Node]) -> list[fx.Node]:
    heads = (x["query"], x["key"], x["value"], x["query_features"], x["key_features"], x["gate"])
    return _parts(emit, 5, tautomer.hybrid_attention_step.v1, *heads, *past, position, x["scale"])


def _softmax(emit: Emit, x: Given) -> list[fx.Node]:
    return [x["key"], x["value"]]


def _softmax_step(emit: Emit, x: Given, position: fx.Node, past: Sequence[fx.Node]) -> list[fx.Node]:
    keys, values = (emit(aten.cat.default, [old, x[name]], -2) for old, name in zip(past, ("key", "value"), strict=True))
    options = {"scale": x["scale"], "enable_gqa": x["enable_gqa"]}
    return [emit(SOFTMAX, x["query"], keys, values, None, 0.0, False, **options), keys, values]


SOFTMAX = aten.scaled_dot_product_attention.default
STEPS: Mapping[Any, AttentionStep] = {
    tautomer.window_attention.v1: AttentionStep(_window, _window_step, 2, _causal),
    tautomer.block_attention.v1: AttentionStep(_block, _block_step, 2, _causal),
    tautomer.kernel_attention.v1: AttentionStep(_kernel, _kernel_step, 1, _causal),
    tautomer.hybrid_attention.v1: AttentionStep(_hybrid, _hybrid_step, 4, _causal),
    SOFTMAX: AttentionStep(_softmax, _softmax_step, 2, _causal, grows=True),
}
_SIDE_BY_SIDE = "its heads lie side by side, as ONNX Runtime reads them: optimize with target='eager'"
STATELESS: Mapping[Any, str] = {
    tautomer.top_attention.v1: "every position chooses among all keys before it, so that none may be forgotten",
    tautomer.hyper_attention.v3: "which keys a position sees depends on how all of them hash, so that none may be forgotten",
    tautomer.nystrom_attention.v1: "it is not causal: its landmarks stand for positions after one, too",
    tautomer.linformer_attention.v1: "it is not causal: its slots hold positions after one, too",
    tautomer.packed_attention.v1: _SIDE_BY_SIDE,
    tautomer.cached_attention.v1: _SIDE_BY_SIDE,
}
