"""Tiny Hugging Face models in their real architectures, with every gain, bias and table random.

Trained and freshly initialised checkpoints hide mistakes (gains of one, shifts of zero, tables without a mean), so every
floating parameter is redrawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

Example = tuple[nn.Module, dict[str, Any]]

_TEXT: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every floating parameter: gains around 1, everything else around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.dim() == 1 and name.endswith(("weight", "lambda1", "layer_scale_1", "layer_scale_2"))
            fan = max(parameter.shape[-1], 1) if parameter.dim() > 1 else 1
            parameter.copy_(1 + 0.3 * noise if gain else 0.05 + noise * (0.5 if parameter.dim() == 1 else fan**-0.5))
    return model.eval()


def ids(batch: int = 2, length: int = 7, vocabulary: int = 99) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def pixels(size: int = 16, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def _text(kind: str, config: str, **options: Any) -> Callable[[], Example]:
    def build() -> Example:
        settings = getattr(transformers, config)(**{**_TEXT, **options})
        if hasattr(settings, "use_cache"):
            settings.use_cache = False
        return randomize(getattr(transformers, kind)(settings)), {"input_ids": ids()}

    return build


def _vision(kind: str, config: str, **options: Any) -> Callable[[], Example]:
    def build() -> Example:
        return randomize(getattr(transformers, kind)(getattr(transformers, config)(**options))), {"pixel_values": pixels()}

    return build


_DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_ENCODER = {**_DECODER, "max_position_embeddings": 40}
_IMAGE = {**_DECODER, "image_size": 16, "patch_size": 8}


def _whisper() -> Example:
    config = transformers.WhisperConfig(
        vocab_size=99,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        use_cache=False,
    )
    model = randomize(transformers.WhisperForConditionalGeneration(config))
    return model, {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids(2, 5)}


def _t5() -> Example:
    config = transformers.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=2,
        use_cache=False,
    )
    return randomize(transformers.T5ForConditionalGeneration(config)), {"input_ids": ids(), "decoder_input_ids": ids(2, 5)}


def _bart() -> Example:
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return randomize(transformers.BartModel(config)), {"input_ids": ids(), "decoder_input_ids": ids(2, 5)}


def _wav2vec2() -> Example:
    config = transformers.Wav2Vec2Config(
        **_DECODER,
        vocab_size=40,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    return randomize(transformers.Wav2Vec2Model(config)), {"input_values": torch.randn(2, 400)}


def _swin() -> Example:
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4)
    return randomize(transformers.SwinModel(config)), {"pixel_values": pixels(32)}


ZOO: dict[str, Callable[[], Example]] = {
    "gpt2": _text("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "opt": _text(
        "OPTForCausalLM",
        "OPTConfig",
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=40,
    ),
    "neox": _text("GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER),
    "neox-sequential": _text("GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER, use_parallel_residual=False),
    "gptj": _text("GPTJForCausalLM", "GPTJConfig", n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4),
    "bloom": _text("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4),
    "mpt": _text("MptForCausalLM", "MptConfig", d_model=32, n_layers=2, n_heads=4, max_seq_len=40),
    "falcon": _text("FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "phi": _text("PhiForCausalLM", "PhiConfig", **_ENCODER),
    "starcoder2": _text("Starcoder2ForCausalLM", "Starcoder2Config", **_ENCODER, num_key_value_heads=2),
    "llama": _text("LlamaForCausalLM", "LlamaConfig", **_ENCODER, num_key_value_heads=2),
    "gemma": _text("GemmaForCausalLM", "GemmaConfig", **_ENCODER, num_key_value_heads=2, head_dim=8),
    "bert": _text("BertModel", "BertConfig", **_ENCODER),
    "distilbert": _text(
        "DistilBertModel", "DistilBertConfig", dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40
    ),
    "esm": _text("EsmModel", "EsmConfig", **_ENCODER, mask_token_id=4),
    "modernbert": _text(
        "ModernBertModel", "ModernBertConfig", **_ENCODER, cls_token_id=0, sep_token_id=1, global_attn_every_n_layers=2
    ),
    "t5": _t5,
    "bart": _bart,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "vit": _vision("ViTModel", "ViTConfig", **_IMAGE),
    "deit": _vision("DeiTModel", "DeiTConfig", **_IMAGE),
    "beit": _vision("BeitModel", "BeitConfig", **_IMAGE),
    "dinov2": _vision(
        "Dinov2Model",
        "Dinov2Config",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=16,
        patch_size=8,
    ),
    "clip-vision": _vision("CLIPVisionModel", "CLIPVisionConfig", **_IMAGE),
    "siglip-vision": _vision("SiglipVisionModel", "SiglipVisionConfig", **_IMAGE),
    "swin": _swin,
    "convnext": _vision(
        "ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4, image_size=16
    ),
}
