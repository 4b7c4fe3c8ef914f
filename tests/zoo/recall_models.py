"""More families, for what raising finds: each spells its norms or its attention in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from zoo.models import ZOO, Example, _text, _vision, ids, pixels, randomize

_DECODER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40,
}  # fmt: skip
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_ENCODER = {**_DECODER, "embedding_size": 16}
_D_MODEL: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40, "decoder_start_token_id": 0,
}  # fmt: skip
_IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16}
_PATCHES = {**_IMAGE, "patch_size": 8}
_SOUND: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40,
    "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def _seq2seq(kind: str, config: str, **options: Any) -> Callable[[], Example]:
    build = _text(kind, config, **options)

    def both() -> Example:
        model, inputs = build()
        return model, {**inputs, "decoder_input_ids": ids(2, 5)}

    return both


def _sound(kind: str, config: str, **options: Any) -> Callable[[], Example]:
    def build() -> Example:
        settings = getattr(transformers, config)(**{**_SOUND, **options})
        return randomize(getattr(transformers, kind)(settings)), {"input_values": torch.randn(2, 400)}

    return build


def _clip() -> Example:
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "projection_dim": 16}
    text = {**tower, "vocab_size": 99, "max_position_embeddings": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return randomize(transformers.CLIPModel(config)), {"input_ids": ids(), "pixel_values": pixels()}


def _video(kind: str, config: str, **options: Any) -> Callable[[], Example]:
    def build() -> Example:
        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        return randomize(model), {"pixel_values": torch.randn(2, 2, 3, 16, 16)}

    return build


def _levit() -> Example:
    widths = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    return randomize(transformers.LevitModel(transformers.LevitConfig(image_size=64, **widths))), {"pixel_values": pixels(64)}


def _spectrogram() -> Example:
    config = transformers.ASTConfig(**{**_PATCHES, "max_length": 24, "num_mel_bins": 16})
    return randomize(transformers.ASTModel(config)), {"input_values": torch.randn(2, 24, 16)}


def _lxmert() -> Example:
    config = transformers.LxmertConfig(
        vocab_size=99, hidden_size=32, num_attention_heads=4, intermediate_size=48, l_layers=1, x_layers=1, r_layers=1,
        visual_feat_dim=6, max_position_embeddings=40,
    )  # fmt: skip
    boxes = {"visual_feats": torch.randn(2, 5, 6), "visual_pos": torch.rand(2, 5, 4)}
    return randomize(transformers.LxmertModel(config)), {"input_ids": ids(), **boxes}


MORE: dict[str, Callable[[], Example]] = {
    # decoders
    "mistral": _text("MistralForCausalLM", "MistralConfig", **_GROUPED, sliding_window=4),
    "mixtral": _text("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=2),
    "qwen2": _text("Qwen2ForCausalLM", "Qwen2Config", **_DECODER, num_key_value_heads=2),
    "qwen3": _text("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED),
    "olmo": _text("OlmoForCausalLM", "OlmoConfig", **_DECODER),
    "olmo2": _text("Olmo2ForCausalLM", "Olmo2Config", **_DECODER),
    "olmo3": _text("Olmo3ForCausalLM", "Olmo3Config", **_DECODER, sliding_window=4),
    "gemma2": _text("Gemma2ForCausalLM", "Gemma2Config", **_GROUPED, sliding_window=4),
    "gemma3": _text("Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED, sliding_window=4),
    "phi3": _text("Phi3ForCausalLM", "Phi3Config", **_DECODER),
    "stablelm": _text("StableLmForCausalLM", "StableLmConfig", **_DECODER, num_key_value_heads=4, qk_layernorm=True),
    "cohere": _text("CohereForCausalLM", "CohereConfig", **_DECODER, use_qk_norm=True),
    "cohere2": _text("Cohere2ForCausalLM", "Cohere2Config", **_GROUPED, sliding_window=4),
    "granite": _text("GraniteForCausalLM", "GraniteConfig", **_DECODER, num_key_value_heads=2),
    "glm": _text("GlmForCausalLM", "GlmConfig", **_GROUPED),
    "glm4": _text("Glm4ForCausalLM", "Glm4Config", **_GROUPED),
    "gpt-bigcode": _text("GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "gpt-neo": _text(
        "GPTNeoForCausalLM", "GPTNeoConfig", hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=40,
        attention_types=[[["global", "local"], 1]], window_size=4,
    ),
    "codegen": _text("CodeGenForCausalLM", "CodeGenConfig", n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4),
    "openai-gpt": _text("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "xglm": _text("XGLMForCausalLM", "XGLMConfig", d_model=32, num_layers=2, attention_heads=4, ffn_dim=48),
    "biogpt": _text("BioGptForCausalLM", "BioGptConfig", **_DECODER),
    "ctrl": _text("CTRLLMHeadModel", "CTRLConfig", n_embd=32, n_layer=2, n_head=4, n_positions=40, dff=48),
    "persimmon": _text("PersimmonForCausalLM", "PersimmonConfig", **_DECODER),
    "nemotron": _text("NemotronForCausalLM", "NemotronConfig", **_GROUPED),
    "gpt-oss": _text("GptOssForCausalLM", "GptOssConfig", **_GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "helium": _text("HeliumForCausalLM", "HeliumConfig", **_GROUPED),
    "smollm3": _text("SmolLM3ForCausalLM", "SmolLM3Config", **_DECODER, num_key_value_heads=2),
    "exaone4": _text("Exaone4ForCausalLM", "Exaone4Config", **_GROUPED, sliding_window=4),
    "deepseek-v3": _text(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", **_DECODER, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2,
    ),
    "diffllama": _text("DiffLlamaForCausalLM", "DiffLlamaConfig", **_DECODER, num_key_value_heads=2),
    "bert-generation": _text("BertGenerationDecoder", "BertGenerationConfig", **_DECODER, is_decoder=True),
    # encoders
    "albert": _text("AlbertModel", "AlbertConfig", **_ENCODER),
    "electra": _text("ElectraModel", "ElectraConfig", **_ENCODER),
    "roberta": _text("RobertaModel", "RobertaConfig", **_DECODER),
    "mpnet": _text("MPNetModel", "MPNetConfig", **_DECODER),
    "deberta": _text("DebertaModel", "DebertaConfig", **_DECODER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _text("DebertaV2Model", "DebertaV2Config", **_DECODER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "fnet": _text("FNetModel", "FNetConfig", hidden_size=32, num_hidden_layers=2, intermediate_size=48),
    "convbert": _text("ConvBertModel", "ConvBertConfig", **_ENCODER),
    "squeezebert": _text("SqueezeBertModel", "SqueezeBertConfig", **_ENCODER | {"embedding_size": 32}),
    "layoutlm": _text("LayoutLMModel", "LayoutLMConfig", **_DECODER),
    "nystromformer": _text("NystromformerModel", "NystromformerConfig", **_DECODER, num_landmarks=40, segment_means_seq_len=40),
    "roformer": _text("RoFormerModel", "RoFormerConfig", **_ENCODER),
    "ibert": _text("IBertModel", "IBertConfig", **_DECODER),
    "xlm": _text("XLMModel", "XLMConfig", emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=40),
    "xlnet": _text("XLNetModel", "XLNetConfig", d_model=32, n_layer=2, n_head=4, d_inner=48),
    "rembert": _text("RemBertModel", "RemBertConfig", **_DECODER, input_embedding_size=16),
    "megatron-bert": _text("MegatronBertModel", "MegatronBertConfig", **_DECODER),
    "mobilebert": _text(
        "MobileBertModel", "MobileBertConfig", **_ENCODER, intra_bottleneck_size=32, true_hidden_size=32,
    ),
    "funnel": _text("FunnelModel", "FunnelConfig", block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48),
    "lxmert": _lxmert,
    "nomic-bert": _text("NomicBertModel", "NomicBertConfig", **_DECODER),
    "eurobert": _text("EuroBertModel", "EuroBertConfig", **_DECODER),
    # encoders and decoders
    "pegasus": _seq2seq("PegasusModel", "PegasusConfig", **_D_MODEL),
    "mbart": _seq2seq("MBartModel", "MBartConfig", **_D_MODEL),
    "m2m-100": _seq2seq("M2M100Model", "M2M100Config", **_D_MODEL),
    "marian": _seq2seq("MarianModel", "MarianConfig", **_D_MODEL),
    "blenderbot": _seq2seq("BlenderbotModel", "BlenderbotConfig", **_D_MODEL),
    "umt5": _seq2seq("UMT5Model", "UMT5Config", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "prophetnet": _seq2seq(
        "ProphetNetModel", "ProphetNetConfig", hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_encoder_attention_heads=4, num_decoder_attention_heads=4, max_position_embeddings=40,
    ),
    # vision and sound
    "swinv2": _vision("Swinv2Model", "Swinv2Config", image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2],
                      window_size=4),
    "dinov2-registers": _vision("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **_PATCHES, mlp_ratio=2),
    "dinov3-vit": _vision("DINOv3ViTModel", "DINOv3ViTConfig", **_PATCHES),
    "yolos": _vision("YolosModel", "YolosConfig", **{**_PATCHES, "image_size": [16, 16]}, num_detection_tokens=3),
    "ijepa": _vision("IJepaModel", "IJepaConfig", **_PATCHES),
    "segformer": _vision("SegformerModel", "SegformerConfig", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                         hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    "pvt": _vision("PvtModel", "PvtConfig", image_size=16, num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1],
                   hidden_sizes=[8, 16], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    "poolformer": _vision("PoolFormerModel", "PoolFormerConfig", depths=[1, 1], hidden_sizes=[8, 16], num_encoder_blocks=2,
                          patch_sizes=[3, 3], strides=[2, 2], padding=[1, 1]),
    "levit": _levit,
    "mobilevit": _vision("MobileViTModel", "MobileViTConfig", image_size=32, hidden_sizes=[16, 16, 16],
                         neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16], num_attention_heads=2),
    "clip": _clip,
    "videomae": _video("VideoMAEModel", "VideoMAEConfig", **_PATCHES, num_frames=2, tubelet_size=2),
    "vivit": _video("VivitModel", "VivitConfig", **_IMAGE, num_frames=2, tubelet_size=[2, 8, 8]),
    "timesformer": _video("TimesformerModel", "TimesformerConfig", **_PATCHES, num_frames=2),
    "ast": _spectrogram,
    "hubert": _sound("HubertModel", "HubertConfig"),
    "wavlm": _sound("WavLMModel", "WavLMConfig"),
}  # fmt: skip

RECALL = {**ZOO, **MORE}
