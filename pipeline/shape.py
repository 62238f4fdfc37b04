"""The shape of a model, read from its configuration and the list of its tensors; no weights are loaded.

The tensors of a model that a stage of the run has yet to train from nothing are listed here, for the architectures of
`PLANNED`; of other architectures nothing is known before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import handover, model_files
from pipeline.config import Lora
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError

Tensors = Mapping[str, tuple[int, ...]]
"""Name -> shape."""

GATED = ("llama", "mistral", "qwen2", "qwen3")
PLANNED = (*GATED, "gpt2")
"""Model types whose tensors are known before they are trained."""
DEFAULTS = {"qwen3": {"head_dim": 128}}
"""Sizes that follow from no others, where an architecture leaves them out."""
_LAYER = re.compile(r"(?P<path>.*\.\d+\..+)\.weight")
_ALIASES = {
    "hidden": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "positions": ("max_position_embeddings", "n_positions"),
}


class UnknownShape(Exception):
    """The shape of a model is not known; the message says why."""


@dataclass(frozen=True)
class Shape:
    """What the memory of a model depends on."""

    parameters: int
    """Numbers of all weights, tied ones once."""
    quantizable: int
    """Numbers of the matrices in the layers, which quantization stores in few bits."""
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    matrices: Mapping[str, int]
    """Path of each linear layer in the decoder layers -> the sum of its inputs and outputs."""
    positions: int | None = None
    """Tokens of the longest sequence; None where the configuration names no limit."""

    def adapter(self, lora: Lora) -> int:
        """Numbers of an adapter; DoRA's vectors, which are small, are left out."""
        _, ends = self._adapted(lora)
        return lora.rank * ends

    def adapted_matrices(self, lora: Lora) -> float:
        """Adapted linear layers of one decoder layer, on average."""
        count, _ = self._adapted(lora)
        return count / self.adapted_layers(lora)

    def adapted_layers(self, lora: Lora) -> int:
        """Decoder layers that are computed backwards."""
        return min(lora.top_layers or self.layers, self.layers)

    def _adapted(self, lora: Lora) -> tuple[int, int]:
        """How many matrices an adapter is beside, and the sum of their inputs and outputs."""
        adapted = [ends for path, ends in self.matrices.items() if _is_target(path, lora.targets)]
        share = self.adapted_layers(lora) / self.layers
        return round(len(adapted) * share), round(sum(adapted) * share)


@dataclass(frozen=True)
class Base:
    """The model that a stage computes with, and how."""

    shape: Shape
    identity: str
    """Equal for roles that share a model in memory."""
    adapter: Lora | None = None
    """The adapter of an artifact that is one."""
    quantization: str = "none"


def of_artifact(artifact: Artifact) -> Base:
    """The base of an input.

    Raises:
        UnknownShape: Its files do not say.
    """
    base = artifact.base or artifact
    adaptation = artifact.manifest.adaptation if artifact.manifest else None
    quantization = adaptation.quantization if adaptation and artifact.kind != "model" else "none"
    return Base(of_directory(base.directory), base.digest, adapter_of(artifact), quantization)


def adapter_of(artifact: Artifact) -> Lora | None:
    """The settings of the adapter that an input is, itself a copy of another one where it was trained from that."""
    if artifact.kind == "model" or artifact.manifest is None:
        return None
    settings = artifact.manifest.settings.get("lora")
    return Lora.model_validate(settings) if settings else Lora()


def of_directory(directory: Path) -> Shape:
    """The shape of the model in a directory.

    Raises:
        UnknownShape: It has no configuration or no weights, or these do not say.
    """
    with _readable():
        return of_tensors(model_files.json_object(directory / "config.json"), handover.tensors(directory))


def planned(architecture: Mapping[str, Any], vocabulary: int) -> Shape:
    """The shape of a model that is to be trained from nothing.

    Raises:
        UnknownShape: The architecture is none of `PLANNED`, or leaves sizes to the library's defaults.
    """
    kind = architecture.get("model_type")
    config = {**DEFAULTS.get(str(kind), {}), **architecture, "vocab_size": vocabulary}
    if kind not in PLANNED:
        raise UnknownShape(f"the tensors of `{kind}` are not known before it is trained")
    with _readable():
        return of_tensors(config, dict(_gpt2(config) if kind == "gpt2" else _gated(config, str(kind))))


def from_nothing(architecture: Mapping[str, Any], tokenizer: Artifact) -> Base:
    """The model that a stage is to train from nothing, with the vocabulary of a tokenizer stage.

    Raises:
        UnknownShape: The architecture does not say.
    """
    vocabulary = tokenizer.manifest.tokenizer.get("vocabulary_size") if tokenizer.manifest else None
    if vocabulary is None:
        raise UnknownShape("the tokenizer does not say how many tokens it has")
    return Base(planned(architecture, int(vocabulary)), "")


def of_tensors(config: Mapping[str, Any], tensors: Tensors) -> Shape:
    """The shape of a model with this configuration and these weights.

    Raises:
        UnknownShape: The configuration has no size or layers, or there are no tensors.
    """
    config = {**config, **(config.get("text_config") or {})}
    if not tensors:
        raise UnknownShape("there are no weights yet")
    hidden, layers = _size(config, "hidden"), _size(config, "layers")
    heads = _known(config, "heads") or 1
    matrices: dict[str, int] = {}
    quantizable = 0
    for name, shape in tensors.items():
        if len(shape) == 2 and (match := _LAYER.fullmatch(name)):
            matrices[match["path"]] = sum(shape)
            quantizable += math.prod(shape)
    return Shape(
        parameters=sum(map(math.prod, tensors.values())),
        quantizable=quantizable,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        intermediate=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        vocabulary=config.get("vocab_size") or max(shape[0] for shape in tensors.values()),
        matrices=matrices,
        positions=_known(config, "positions"),
    )


def _is_target(path: str, targets: str | list[str]) -> bool:
    """Whether `peft` adapts a layer: a pattern is of the whole path, a name of its end."""
    if isinstance(targets, list):
        return any(f".{path}".endswith(f".{target}") for target in targets)
    return targets == "all-linear" or re.fullmatch(targets, path) is not None


@contextmanager
def _readable() -> Iterator[None]:
    """What cannot be read makes no estimate; loading the model then says what is wrong."""
    try:
        yield
    except (ArtifactError, OSError) as error:
        raise UnknownShape(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnknownShape(f"its sizes cannot be read: {type(error).__name__}: {error}") from error


def _known(config: Mapping[str, Any], size: str) -> int | None:
    return next((int(config[name]) for name in _ALIASES[size] if config.get(name)), None)


def _size(config: Mapping[str, Any], size: str) -> int:
    found = _known(config, size)
    if found is None:
        raise UnknownShape(f"the configuration does not give `{_ALIASES[size][0]}`")
    return found


def _required(config: Mapping[str, Any], *names: str) -> list[int]:
    """Sizes that an architecture has to give: the library's defaults are not known here."""
    for name in names:
        if not config.get(name):
            raise UnknownShape(f"the architecture does not give `{name}`")
    return [int(config[name]) for name in names]


def _gated(config: Mapping[str, Any], kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of Llama and its relatives; normalisations under names of our own."""
    hidden, heads, inner = _required(config, "hidden_size", "num_attention_heads", "intermediate_size")
    (keys,) = (
        (heads,)
        if kind == "llama" and not config.get("num_key_value_heads")
        else _required(config, "num_key_value_heads")
    )
    size = config.get("head_dim") or hidden // heads
    outer, key = heads * size, keys * size
    entering = {
        "self_attn.q_proj": (outer, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
    }
    attention = entering | {"self_attn.o_proj": (hidden, outer)}
    gated = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    biased = set(entering) if kind == "qwen2" else set()
    biased |= attention.keys() if config.get("attention_bias") else set()
    biased |= gated.keys() if config.get("mlp_bias") else set()
    yield "embed_tokens.weight", (config["vocab_size"], hidden)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)
    yield "norm.weight", (hidden,)
    for layer in range(_size(config, "layers")):
        for name, shape in (attention | gated).items():
            yield f"model.layers.{layer}.{name}.weight", shape
            if name in biased:
                yield f"model.layers.{layer}.{name}.bias", shape[:1]
        yield f"model.layers.{layer}.norms", (2 * hidden + (2 * size if kind == "qwen3" else 0),)


def _gpt2(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = _size(config, "hidden"), config["vocab_size"]
    inner, positions = (
        config.get("n_inner") or 4 * hidden,
        config.get("n_positions") or config.get("max_position_embeddings", 1024),
    )
    yield "wte.weight", (vocabulary, hidden)
    yield "wpe.weight", (positions, hidden)
    yield "ln_f", (2 * hidden,)
    for layer in range(_size(config, "layers")):
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            yield f"transformer.h.{layer}.{name}.weight", (rows, columns)
            yield f"transformer.h.{layer}.{name}.bias", (columns,)
        yield f"transformer.h.{layer}.norms", (4 * hidden,)
