"""GGUF files of tiny models, written tensor by tensor with the `gguf` package."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer


def write(
    model: Path,
    file: Path,
    *,
    quantized: bool = False,
    architecture: str = "qwen2",
    tokens: bool = True,
    splitting: str = "qwen2",
    left_out: str = "",
    parts: int = 1,
    key_heads: list[int] | None = None,
    hidden: int | None = None,
) -> Path:
    """Write a Qwen2-shaped model directory as a GGUF file; matrices in 8 bits if asked for. Returns the file.

    `left_out` is a tensor that the file lacks; `parts`, `key_heads` and `hidden` are what the header says.
    """
    config = AutoConfig.from_pretrained(model)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden or config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(key_heads or config.num_key_value_heads)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(7 if quantized else 0)
    if tokens:
        _add_tokenizer(writer, model, splitting)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in load_file(model / "model.safetensors").items():
        if name == left_out:
            continue
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert given, name
        if quantized and tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor, GGMLQuantizationType.Q8_0)
            writer.add_tensor(given, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(given, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: GGUFWriter, model: Path, splitting: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    content = json.loads((model / "tokenizer.json").read_text())
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens) | {each["content"] for each in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL if word in special else TokenType.NORMAL for word in words])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
