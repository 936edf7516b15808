"""Causal language models of transformers beyond those of `conftest.ARCHITECTURES`, tiny, and what becomes of each.

`REFUSED` says with which words; everything else trains. `OFTEN` are those of the ordinary suite.
"""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # logits of a few units
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    # mixtures of experts, under all their names
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SSM = {"mamba_chunk_size": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
DECODER = {"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_layers": 2}


def plain(*names: str) -> dict[str, dict[str, Any]]:
    """Those that need no settings of their own."""
    return {name: {} for name in names}


# by model type; what is not written here comes from SIZES, as far as the config knows it
SETTINGS: dict[str, dict[str, Any]] = {
    # dense transformers
    **plain("apertus", "arcee", "biogpt", "bitnet", "bloom", "ctrl", "diffllama", "ernie4_5", "exaone4", "gemma"),
    **plain("glm", "glm4", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "helium", "hunyuan_v1_dense", "mpt"),
    **plain("nanochat", "nemotron", "olmo", "olmo2", "olmo3", "openai-gpt", "persimmon", "seed_oss", "smollm3"),
    **plain("stablelm", "starcoder2", "vaultgemma", "xglm", "ministral3", "jais2", "internlm3"),
    "codegen": {"rotary_dim": 4},
    "cwm": {"bos_token_id": 0},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "modernbert-decoder": {"bos_token_id": 0},
    "gemma3n_text": {
        "pad_token_id": None,  # or its embedding starts as 0, which is refused
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "bert": {"is_decoder": True},
    # mixtures of experts, of which some jitter what their routers see
    **plain("afmoe", "aria_text", "cohere2_moe", "doge", "ernie4_5_moe", "flex_olmo", "glm4_moe"),
    **plain("gpt_oss", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "jetmoe", "llama4_text"),
    **plain("minimax_m2", "olmoe", "qwen2_moe", "qwen3_moe", "solar_open"),
    "mixtral": {"router_jitter_noise": 0.1, "attention_dropout": 0.2},
    "phimoe": {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1},
    "minimax": {"router_jitter_noise": 0.1},
    "dots1": {"n_shared_experts": 1},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "resid_pdrop": 0.2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
            "moe_jitter_eps": 0.1,
        },
    },
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite"), LATENT),
    "longcat_flash": LATENT
    | {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "moe_topk": 2},
    # recurrent and hybrid
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "falcon_mamba": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": SSM | {"attn_layer_indices": [1]},
    "falcon_h1": SSM | {"mamba_d_ssm": 64},
    "granitemoehybrid": SSM | {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "chunk_size": 4,
        "n_groups": 1,
    },
    "olmo_hybrid": {},
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA,
    "zamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "chunk_size": 4,
        "num_mem_blocks": 1,
    },
    "rwkv": {},
    "xlstm": {},
    "recurrent_gemma": {"num_hidden_layers": 3},
    # decoders that count positions in a way of their own, or can't be called as the others
    **dict.fromkeys(("bart", "plbart", "whisper"), DECODER),
    **plain("blenderbot", "marian", "mbart", "pegasus"),
    "roberta": {"is_decoder": True},
    "camembert": {"is_decoder": True},
    "xlm-roberta": {"is_decoder": True},
    "cpmant": {},
    "trocr": {},
    "moshi": {},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "xlm": {},
    "xlnet": {"d_model": 32, "n_head": 4, "d_inner": 48, "n_layer": 2, "d_head": 8},
}
REFUSED = {
    **dict.fromkeys(("rwkv", "xlstm"), "alone and padded on the left differ by .* it ignores the attention mask"),
    "recurrent_gemma": "behind one and another padding, differ by .* it reads padding",
    **dict.fromkeys(
        ("bart", "plbart", "blenderbot", "marian", "mbart", "pegasus", "trocr"),
        "alone and padded on the left differ by .* or the position ids",
    ),
    **dict.fromkeys(("roberta", "camembert", "xlm-roberta"), "does not count positions from 0"),
    "cpmant": "alone and padded on the left differ by .* it ignores the attention mask",
    **dict.fromkeys(
        ("moshi", "reformer", "whisper", "xlm", "xlnet"), "step by step through its key-value cache, .* differ by"
    ),
}
# a representative of each kind; "rwkv" is refused
OFTEN = (
    *("bloom", "gpt_neox", "olmo2", "glm4", "gemma3n_text", "mixtral", "gpt_oss", "dbrx", "deepseek_v3", "mamba2"),
    *("jamba", "rwkv"),
)


def config_of(name: str, vocab_size: int) -> Any:
    """The config of one of them."""
    kind = CONFIG_MAPPING[name]
    known = {*kind.attribute_map, *vars(kind())}
    settings = {key: value for key, value in SIZES.items() if key in known} | SETTINGS[name]
    if "vocab_size_per_layer_input" in known:
        settings["vocab_size_per_layer_input"] = vocab_size
    return kind(vocab_size=vocab_size, **settings)
