"""Transformers' own causal LMs, tiny and random: the same few sizes set under whatever names a type has."""

import torch

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
    # other names of the same
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_layers": 2, "n_heads": 4, "num_layers": 2,
    "num_heads": 4, "ffn_dim": 48, "n_positions": 64, "word_embed_proj_dim": 32, "n_inner": 48, "ffn_hidden_size": 48,
    "max_seq_len": 64, "rotary_dim": 4,
    # experts, low-rank attention, state spaces
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "shared_expert_intermediate_size": 16,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_dt_rank": 4, "mamba_d_ssm": 64, "state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "lru_width": 32, "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "attention_window_size": 16,
    "use_mamba_kernels": False, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "expert_dim": 16,
}  # fmt: skip
OWN = {
    "falcon": {"num_kv_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt2": {"n_ctx": 64},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "mamba2": {"head_dim": 16, "num_heads": 4, "expand": 2},
    "xlstm": {"embedding_dim": 32, "num_blocks": 2},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "falcon_h1": {"lm_head_multiplier": 0.2, "mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere": {"logit_scale": 0.25},
}


def tiny(kind: str, attention: str | None = None, **changes):
    """A causal LM of a transformers model type, ~2 layers of 32; ValueError and the like where it cannot be built."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    known = set(getattr(cls, "__dataclass_fields__", {})) | set(cls().to_dict()) | set(cls.attribute_map or {})
    settings = {name: value for name, value in SIZES.items() if name in known} | OWN.get(kind, {}) | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(cls(**settings), attn_implementation=attention, dtype=torch.float32)
        for parameter in model.parameters():  # larger than a new model's, so that attention has something to say
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
    return model.eval()
