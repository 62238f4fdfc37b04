"""Tiny models with random weights of the families that Baton is checked on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from data.batch import Layout
from stages import tokenizer as tokenizer_stage
from stages.core.device import Compute
from stages.core.models import LanguageModel

POSITIONS = 256
_TEXTS = ["Where does Ada live? Ada lives in Oslo.", "What is 2 plus 2? It is 4."]
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_CAPPED = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0}
_FULL, _WINDOW = {"sliding_window": POSITIONS}, {"sliding_window": 8}
_GEMMA3 = {**_SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SHAPE),
    "qwen2": ("qwen2", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_SHAPE, "head_dim": 8}),
    "gemma2": ("gemma2", {**_SHAPE, **_CAPPED, **_FULL, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**_GEMMA3, **_FULL}),
    "mistral": ("mistral", {**_SHAPE, "sliding_window": None}),
    "gpt2": ("gpt2", _GPT2),
    "phi": ("phi", {**_SHAPE, "resid_pdrop": 0.0, "attention_dropout": 0.0}),
    "olmo2": ("olmo2", _SHAPE),
    "granite": ("granite", {**_SHAPE, "logits_scaling": 3.0}),
    "gemma2 with a window": ("gemma2", {**_SHAPE, **_CAPPED, **_WINDOW, "head_dim": 8}),
    "gemma3 with a window": ("gemma3_text", {**_GEMMA3, **_WINDOW}),
    "mistral with a window": ("mistral", {**_SHAPE, **_WINDOW}),
}
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(_SHAPES, "packed"),
    "gemma2": "tree",
    **dict.fromkeys([name for name in _SHAPES if "window" in name], "plain"),
}
"""The layout that each is given. Gemma 2 caps its scores, which packed attention does not. Windows count tokens of the
row, so that in a tree they would reach back to another branch."""
FAMILIES = tuple(_SHAPES)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Baton's chat template."""
    return tokenizer_stage.wrap(tokenizer_stage._train(_TEXTS, 300))


def tiny(family: str, dtype: torch.dtype, seed: int = 0) -> LanguageModel:
    """A model in evaluation mode whose weights are large enough for its predictions to differ."""
    model_type, shape = _SHAPES[family]
    config = AutoConfig.for_model(
        model_type,
        **shape,
        vocab_size=len(tokenizer()),
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
    return LanguageModel(model, tokenizer(), Compute(torch.device("cpu"), dtype))
