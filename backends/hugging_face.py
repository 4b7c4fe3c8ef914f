"""Raise the attention of a Hugging Face model through the model's own registry of attention functions.

    config._attn_implementation:  "eager"  ->  "tautomer"

    tautomer(q, k, v, mask) = scaled_dot_product_attention(q, k, v, mask)      the mask that "eager" makes, so that rows which
                              the model's own eager function                   it hides entirely stay what they were

The model's own function goes on where its probabilities are asked for (``output_attentions=True``), dropped out, or computed from
anything that is not named here: a soft cap, sinks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "tautomer"
_IGNORED = {
    "position_ids", "cache_position", "position_embeddings", "encoder_hidden_states", "encoder_attention_mask", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict", "is_causal", "sliding_window", "num_items_in_batch",
    "logits_to_keep",
}  # fmt: skip
"""What passes through to the attention function and what eager attention does not read, or has in its mask."""


class _Registered(str):
    """The name, which registers the function wherever it is unpickled."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return registered, ()


def registered() -> str:
    """The name under which the attention function and its mask are registered, which is done now."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    return _Registered(NAME)


def implementations(model: nn.Module) -> list[tuple[Any, str]]:
    """The configurations below ``model`` that name an attention function, with the name."""
    stack: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    found: dict[int, tuple[Any, str]] = {}
    while stack:
        config = stack.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = (config, config._attn_implementation_internal)
            stack += [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
    return list(found.values())


def runs_eager(model: nn.Module) -> bool:
    """Whether all attention of a Hugging Face model is its own eager code, and may be another."""
    names = {name for _, name in implementations(model)}
    return names == {"eager"} and hasattr(model, "set_attn_implementation")


def set_attention(model: Any) -> None:
    """Let the attention of a Hugging Face model go through the registry; ``restore_attention`` takes it back."""
    name = registered()
    model.set_attn_implementation(name)
    for config, now in implementations(model):
        if now == name:
            config._attn_implementation_internal = name


def restore_attention(before: Sequence[tuple[Any, str]]) -> None:
    for config, name in before:
        config._attn_implementation_internal = name


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    unknown = any(x is not None for name, x in kwargs.items() if name not in _IGNORED)
    if dropout or unknown or _wants_probabilities(kwargs):
        given = kwargs if position_bias is None else {**kwargs, "position_bias": position_bias}
        result: tuple[Tensor, Tensor] = _eager(module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given
        )
        return result
    mask = attention_mask if position_bias is None else position_bias
    if attention_mask is not None and position_bias is not None:
        mask = position_bias + attention_mask
    grouped = key.shape[1] != query.shape[1]
    output = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous(), None


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager function of the file that the module's class comes from."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    own: Callable[..., Any] = next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
    return own


def _wants_probabilities(kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller asked for attention probabilities: some models say it here, others collect what modules return."""
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()  # type: ignore[no-untyped-call]
    return bool(kwargs.get("output_attentions")) or any("attentions" in name for name in collected or ())
