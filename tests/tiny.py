"""What whole stages are tried on: a chain on the embedded world, and foreign models as `transformers` saves them."""

from __future__ import annotations

from pathlib import Path

from pipeline import cli

ONE_STAGE = """\
output: {root}/{name}
device: cpu
dtype: float32
checkpoint_minutes: 0
data:
  corpus: {{source: "world:corpus", rows: 60, held_out: 0.2}}
  demonstrations: {{source: "world:demonstrations", rows: 30, held_out: 0.2}}
  preferences: {{source: "world:preferences", rows: 30, held_out: 0.2}}
  prompts: {{source: "world:prompts", rows: 30, held_out: 0.2}}
"""
"""A run that leaves a checkpoint after every step, without its `stages`."""
CHAIN = """\
output: {root}/run
device: cpu
dtype: float32
data:
  corpus: {{source: "world:corpus", rows: 200, held_out: 0.2}}
  demonstrations: {{source: "world:demonstrations", rows: 100, held_out: 0.2}}
  preferences: {{source: "world:preferences", rows: 100, held_out: 0.2}}
  prompts: {{source: "world:prompts", rows: 100, held_out: 0.2}}
stages:
  tokenizer: {{kind: tokenizer, data: corpus, vocab_size: 320}}
  base:
    kind: pretrain
    tokenizer: tokenizer
    data: corpus
    architecture:
      model_type: llama
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
      num_key_value_heads: 2
      max_position_embeddings: 512
      tie_word_embeddings: true
    max_length: 64
    steps: 12
    examples_per_step: 8
    optimizer: {{learning_rate: 0.01}}
  sft: {{kind: sft, policy: base, data: demonstrations, steps: 6, examples_per_step: 8,
    optimizer: {{learning_rate: 0.01}}}}
  reward: {{kind: reward, policy: sft, data: preferences, steps: 6, examples_per_step: 8, lora: {{rank: 4}},
    optimizer: {{learning_rate: 0.01}}}}
  dpo: {{kind: dpo, policy: sft, data: preferences, steps: 4, examples_per_step: 8, lora: {{rank: 4}},
    optimizer: {{learning_rate: 0.01}}}}
  ppo: {{kind: ppo, policy: sft, reward: reward, data: prompts, steps: 2, examples_per_step: 8, minibatches: 2,
    max_new_tokens: 8, lora: {{rank: 4}}, optimizer: {{learning_rate: 0.01}}}}
  evaluate: {{kind: evaluate, models: [base, sft, dpo, ppo], reward: reward, prompts: prompts, pairs: preferences,
    text: corpus, gold: world, best_of: 3, rows: 12, max_new_tokens: 8}}
"""

FINISHED = "FINISHED_CHAIN"
"""The variable that names the configuration of a finished chain: the mutation run makes one for all its tests."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's models write a conversation."""

HEADERS = (
    "{{ '<|begin_of_text|>' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""As Llama 3's models write a conversation."""

CONTROL = {
    "qwen2": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
    "llama": (
        HEADERS,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_pad|>"],
        "<|eot_id|>",
        "<|finetune_pad|>",
    ),
}
"""Model type -> chat template, control tokens, the one that ends a turn, the one that pads."""


def write_chain(root: Path) -> Path:
    """The configuration of all seven stages on the embedded world; returns its path."""
    path = root / "chain.yaml"
    path.write_text(CHAIN.format(root=root))
    return path


def finish_chain(root: Path) -> Path:
    """Train the chain of all seven stages; returns its configuration's path."""
    path = write_chain(root)
    assert cli.execute(cli.app, ["run", str(path)]) == 0
    return path


def save_model(directory: Path, model_type: str, texts: list[str]) -> Path:
    """A random model of two layers and a tokenizer trained on the texts; returns the directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    template, control, end, pad = CONTROL[model_type]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad)
    wrapped.chat_template = template
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=model_type == "qwen2",
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    wrapped.save_pretrained(directory)
    return directory
