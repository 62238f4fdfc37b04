"""Tiny models of architectures that differ in attention, normalisation or head, and trees of very different lengths."""

from __future__ import annotations

import random
from typing import Any

import models
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data.tree import Branch, Tree

LENGTHS = (1, 1, 2, 3, 7, 20, 45)
CONTEXT = 256

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GEMMA2 = {
    **_SHAPE,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 3.0,
    "sliding_window": CONTEXT,
}
_HYBRID = {**_SHAPE, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_LATENT = {
    **_SHAPE,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 2,
}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_SHAPE, "num_key_value_heads": 4}),
    "grouped": ("llama", _SHAPE),
    "gpt2": ("gpt2", _GPT2),
    "qwen2": ("qwen2", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _SHAPE),
    "mistral": ("mistral", {**_SHAPE, "sliding_window": 8}),
    "gemma2": ("gemma2", _GEMMA2),
    "granite": ("granite", {**_SHAPE, "logits_scaling": 3.0}),
    "cohere": ("cohere", {**_SHAPE, "logit_scale": 0.3}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "nemotron": ("nemotron", _SHAPE),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "lfm2": ("lfm2", {**_SHAPE, "layer_types": ["conv", "full_attention"]}),
    "bamba": ("bamba", {**_HYBRID, "attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", {**_HYBRID, "mamba_d_ssm": 64}),
    "qwen3_next": ("qwen3_next", {**_SHAPE, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]}),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
PACKED = ("llama", "grouped", "gpt2", "qwen2", "qwen3")
"""Those whose attention can be replaced."""
RECURRENT = ("lfm2", "bamba", "falcon_h1", "qwen3_next", "mamba")
"""Those with layers that look back without an attention's mask."""


def model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode, all weights trained, large enough for its predictions to differ."""
    model_type, shape = _KINDS[kind]
    config = AutoConfig.for_model(
        model_type,
        **shape,
        vocab_size=len(models.tokenizer()),
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=models.tokenizer().eos_token_id,
        pad_token_id=models.tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made.eval()


def ragged(count: int, seed: int = 0, branches: tuple[int, ...] = (1, 2, 3, 4)) -> list[Tree]:
    """Trees with prompts and branches of one token up to many."""
    chance = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(chance.randrange(5, len(models.tokenizer())) for _ in range(chance.choice(LENGTHS)))

    return [
        Tree(tokens(), tuple(Branch.of(tokens()) for _ in range(chance.choice(branches))), number)
        for number in range(count)
    ]
