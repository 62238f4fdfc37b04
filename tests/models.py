"""Tiny models with random weights, and trees to compute on them."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from data.template import tokenizer_record
from data.tree import Branch, Tree
from pipeline.config import Lora
from pipeline.contract import Artifact
from pipeline.manifest import Adaptation, Manifest
from stages import tokenizer as tokenizer_stage
from stages.core.device import Compute
from stages.core.models import LanguageModel
from stages.core.roles import Roles

# Threads cost more than they gain on matrices this small.
torch.set_num_threads(1)

CPU = Compute(torch.device("cpu"), torch.float32)
HALF = Compute(torch.device("cpu"), torch.bfloat16)
KINDS = ("llama", "qwen2", "gpt2")
LORA = Lora(rank=4, alpha=8.0)
TEXTS = ["Where does Ada live? Ada lives in Oslo.", "What is 2 plus 2? It is 4."]

_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {**_SHAPE, "num_key_value_heads": 2},
    "qwen2": {**_SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {**_SHAPE, "num_key_value_heads": 2, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Baton's own byte-level tokenizer with its chat template."""
    return tokenizer_stage.wrap(tokenizer_stage._train(TEXTS, 300))


def model(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in evaluation mode whose weights are large enough for its predictions to differ."""
    config = AutoConfig.for_model(
        kind,
        **_ARCHITECTURES[kind],
        vocab_size=len(tokenizer()),
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return made.requires_grad_(False).eval()


def language_model(kind: str = "llama", seed: int = 0, compute: Compute = CPU) -> LanguageModel:
    """A model with the tokenizer."""
    return LanguageModel(model(kind, seed, compute.dtype), tokenizer(), compute)


def roles(*names: str, kind: str = "llama", compute: Compute = CPU, lora: Lora = LORA) -> Roles:
    """A base with a fresh adapter for each name, in order."""
    made = Roles(language_model(kind, compute=compute))
    for name in names:
        made.add(name, lora)
    return made


def disturb(made: Roles, role: str, seed: int = 1, size: float = 0.1) -> None:
    """Random values in a role's adapter and head, so that it differs from a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in made.parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def save_base(directory: Path, kind: str = "llama", digest: str = "base") -> Artifact:
    """A stored model."""
    directory.mkdir(parents=True)
    language_model(kind).save(directory)
    return Artifact(directory, "model", digest, source=digest)


def save_role(made: Roles, role: str, directory: Path, base: Artifact, kind: str = "adapter") -> Artifact:
    """A stored adapter or reward model on a stored base."""
    directory.mkdir(parents=True)
    made.save(role, directory)
    adaptation = Adaptation(base=base.digest, base_source=base.source)
    known = tokenizer_record(made.base.tokenizer)
    manifest = Manifest.model_construct(adaptation=adaptation, inputs={}, settings={}, tokenizer=known)
    return Artifact(directory, kind, directory.name, manifest, directory.name, base)


def forest(count: int, most_branches: int = 4, seed: int = 0, longest: int = 12) -> list[Tree]:
    """Trees of ragged lengths with random tokens; some tokens of a branch are not read, but never all of them."""
    chance = random.Random(seed)
    return [_tree(chance, number, chance.randint(1, most_branches), longest) for number in range(count)]


def pairs(count: int, seed: int = 0) -> list[Tree]:
    """Preferences: two branches each, every token read."""
    return [
        Tree(tree.prompt, tuple(Branch.of(branch.tokens) for branch in tree.branches), tree.number, origin="row")
        for tree in _exactly(count, 2, seed)
    ]


def responses(count: int, seed: int = 0) -> list[Tree]:
    """Single responses, every token read."""
    return [Tree(tree.prompt, (Branch.of(tree.branches[0].tokens),), tree.number) for tree in _exactly(count, 1, seed)]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the weights that are not bit for bit as before."""
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def _exactly(count: int, branches: int, seed: int) -> list[Tree]:
    chance = random.Random(seed)
    return [_tree(chance, number, branches, 12) for number in range(count)]


def _tree(chance: random.Random, number: int, branches: int, longest: int) -> Tree:
    def tokens(most: int) -> tuple[int, ...]:
        return tuple(chance.randrange(5, len(tokenizer())) for _ in range(chance.randint(1, most)))

    made = []
    for _ in range(branches):
        some = tokens(longest)
        read = [chance.random() < 0.8 for _ in some]
        read[chance.randrange(len(some))] = True
        made.append(Branch(some, tuple(read)))
    return Tree(tokens(longest), tuple(made), number)
