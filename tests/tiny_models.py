"""The smallest member of each of timm's families, and tiny random models of transformers' architectures."""

from __future__ import annotations

import inspect
from typing import Any

import torch

# Module of timm.models -> its smallest member that takes small images: of side 32, where SIDES says nothing else.
TIMM_FAMILIES: dict[str, str] = {
    "beit": "beit_base_patch16_224",
    "byoanet": "lambda_resnet26t",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
SIDES = {  # the smallest that the network takes
    "crossvit": 240,  # two fixed patch sizes
    "csatv2": 64,
    "deepseek_vit": 126,
    "efficientformer": 224,  # no img_size argument, tables of positions for 7 x 7
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}
_VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3}
SHRUNK: dict[str, dict[str, Any]] = {  # families whose smallest member is large: the same network with fewer channels
    "beit": _VIT,
    "deepseek_vit": _VIT,
    "gemma4_vit": _VIT,
    "naflexvit": _VIT,
    "qwen3_vit": _VIT,
    "vision_transformer_sam": {**_VIT, "global_attn_indexes": (1,)},
    "vgg": {"mlp_ratio": 1 / 64},
}


def timm_side(family: str) -> int:
    return SIDES.get(family, 32)


def timm_arguments(family: str) -> dict[str, Any]:
    """Arguments of timm.create_model for the smallest network and image."""
    import timm

    fixed = timm.models.get_pretrained_cfg(TIMM_FAMILIES[family]).fixed_input_size
    size = {"img_size": timm_side(family)} if fixed and timm_side(family) == 32 else {}
    return {**SHRUNK.get(family, {}), **size}


def timm_model(family: str, labels: int = 7) -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(TIMM_FAMILIES[family], num_classes=labels, **timm_arguments(family)).eval()


def images(side: int = 32, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


_SMALL = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "embedding_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"], 3),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 64),
    **dict.fromkeys(["max_target_positions", "max_source_positions"], 64),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    "num_decoder_layers": 3,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {  # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SPECIAL: dict[str, dict[str, Any]] = {  # model type -> what its configuration demands beside the sizes above
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text"), _LINEAR_ATTENTION),
    "mistral4": {**_LATENT, "qk_head_dim": 16, "head_dim": 16},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 8),
        "num_buckets": 2,
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attention_head_size": 8,
        "is_decoder": False,
    },
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32, "patch_size": 16},
    "lilt": {"hidden_size": 48},
    "t5": {"decoder_start_token_id": 0},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "markuplm": {"xpath_unit_hidden_size": 8, "max_depth": 4},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "mamba_d_state": 4,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_d_state": 4,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": False,
    },
    "longformer": {"attention_window": 4},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "wav2vec2": {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2},
    "swin": {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "image_size": 32, "window_size": 2},
    "vit": {"image_size": 32},
    "whisper": {"num_mel_bins": 8},
}
_REFUSED = {  # sizes that a configuration derives from others and refuses
    "falcon": ("head_dim",),
    "funnel": ("num_hidden_layers", "n_layers", "num_layers"),
    "xlnet": ("max_position_embeddings", "n_layers"),
}


def tiny_config(model_type: str, **options: Any) -> Any:
    """A configuration of an architecture with three layers of width 32, where it lets itself be shrunk so."""
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], options)


def _shrunk(kind: Any, options: dict[str, Any]) -> Any:
    default = kind()
    values = {
        key: value
        for key, value in _SMALL.items()
        if hasattr(default, key)
        and key not in _REFUSED.get(default.model_type, ())
        and not isinstance(getattr(default, key), list | tuple)
    }
    for name, part in getattr(kind, "sub_configs", {}).items():
        if hasattr(getattr(default, name, None), "to_dict"):
            values[name] = _shrunk(type(getattr(default, name)) or part, {}).to_dict()
    return kind(**{**values, **_SPECIAL.get(default.model_type, {}), **options})


def tiny_model(model_type: str, class_name: str, **options: Any) -> Any:
    """A random model in eval mode; `class_name` is one of transformers' classes."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, class_name)(tiny_config(model_type, **{"num_labels": 5, **options})).eval()


def inputs_for(model: Any, n: int = 2) -> dict[str, torch.Tensor]:
    """What the model's forward takes, n examples."""
    draw = torch.Generator().manual_seed(2)
    config, key = model.config, model.main_input_name
    takes = inspect.signature(model.forward).parameters
    if key == "pixel_values":
        return {key: images(config.image_size, n)}
    if key == "input_values":
        return {key: torch.randn(n, 2000, generator=draw)}
    if key == "input_features":
        return {key: torch.randn(n, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)}
    # Canine, Reformer and Perceiver want whole chunks of characters or tokens
    length = {"canine": 32, "reformer": 64, "perceiver": 64}.get(config.model_type, 8)
    tokens = torch.randint(3, 100, (n, length), generator=draw)
    eos = getattr(config.get_text_config(), "eos_token_id", None)
    if isinstance(eos, int):
        tokens[:, -1] = eos  # BART reads the sentence off its last one
    values = {key: tokens, "attention_mask": torch.ones_like(tokens)}
    return {**values, "bbox": torch.zeros(n, length, 4, dtype=torch.long)} if "bbox" in takes else values
