"""A GGUF file as a base: its blocks are dequantized once into a model directory, which the cache keeps.

A file whose weights are all float32 stays float32, any other becomes bfloat16; the architecture, tokenizer
and chat template are read from the file's header by `transformers`. The directory is found again by the digest of the
file and the versions of the libraries that read it, so a changed file or library converts again.

Left out: training in the file's own blocks, and writing GGUF.
"""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data import cache
from pipeline import fingerprint
from pipeline.errors import ArtifactError
from pipeline.terminal import console, printable

if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL = "model"
"""The directory of the model within the cache's entry."""
DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error)
"""What the libraries raise for bytes that they do not expect."""
AGAIN = "download or convert the file again; its sha256 is beside it where it was published"
LIBRARIES = ("gguf", "tokenizers", "torch", "transformers")
"""Libraries that the converted model depends on."""
ARCHITECTURE, SPLIT = "general.architecture", "split.count"
TOKENS, KIND, SPLITTING = "tokenizer.ggml.tokens", "tokenizer.ggml.model", "tokenizer.ggml.pre"
"""Fields of the header."""
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}
"""Settings of a configuration -> fields of the header, behind the architecture's name."""
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A layer's matrices in a file -> in the model, where adapters name them."""
NO_ARCHITECTURES = {"general", "tokenizer", "t5", "umt5"}
"""What `transformers` keeps in its table beside the architectures of causal models."""
RENAMED = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2"}
"""Architectures that a file calls otherwise than the table does."""
FLOAT32_FILE = 0
"""The value of `general.file_type` for a file whose weights are all float32."""
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Pre-tokenizers that split numbers into digits, which `transformers` passes over when it reads a GGUF file."""
LIKE_GPT2 = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
"""Pre-tokenizers that split like GPT-2's, which is what `transformers` takes for those that it does not know."""
BYTE_LEVEL = "gpt2"
"""The value of `tokenizer.ggml.model` for tokenizers whose text is split first."""
INCOMPLETE = {"missing_keys": "missing", "mismatched_keys": "of another shape", "unexpected_keys": "of no layer"}
"""What `transformers` reports of tensors -> what it means."""


def place(digest: str) -> Path:
    """Where the converted model of a file with this digest is, or will be."""
    return cache.place(_key(digest), cache.MODELS) / MODEL


def converted(path: Path, digest: str) -> Path:
    """The model directory of a file, made if it is not there.

    Args:
        path: The file.
        digest: Its sha256.

    Raises:
        ArtifactError: It cannot be read as a model with a tokenizer.
        StorageError: The cache directory cannot be written.
    """

    def make(directory: Path) -> dict[str, Any]:
        _convert(path, directory / MODEL)
        return {"file": path.name, "sha256": digest}

    return cache.cached(_key(digest), make, console(stderr=True).print, cache.MODELS).directory / MODEL


def _key(digest: str) -> str:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return fingerprint.digest({"gguf": digest, "libraries": versions, "code": fingerprint.modules("data/gguf.py")})


def _convert(path: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    header = header_of(path)
    file_type = header.get_field("general.file_type")
    stored = torch.float32 if file_type is not None and file_type.contents() == FLOAT32_FILE else torch.bfloat16
    options = {"local_files_only": True, "trust_remote_code": False, "gguf_file": path.name}
    # transformers also reads what lies beside a GGUF file: tokenizers, adapters, code. The digest does not cover that.
    with TemporaryDirectory() as folder, _readable(path), redirect_stderr(StringIO()):  # it draws progress bars
        Path(folder, path.name).symlink_to(path.resolve())
        # With `output_loading_info` it returns a pair, which its annotation leaves out.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=stored,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
    model, report = loaded
    _require_complete(path, report)
    if (splitting := header.get_field(SPLITTING)) is not None and splitting.contents() in DIGITS_APART:
        _split_digits(tokenizer)
    with redirect_stderr(StringIO()):
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _split_digits(tokenizer: Any) -> None:
    """Have every digit be a token of its own, as the file asks for."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


def header_of(path: Path) -> GGUFReader:
    """The header of a file, which takes some seconds to read; nothing is converted.

    Raises:
        ArtifactError: The file is damaged, of an architecture that is not known, or without a tokenizer.
    """
    from gguf import GGUFReader

    with _readable(path):
        header = GGUFReader(path)
        architecture = header.fields[ARCHITECTURE].contents() if ARCHITECTURE in header.fields else ""
    _require_known(path, str(architecture))
    if (split := header.get_field(SPLIT)) is not None and split.contents() > 1:
        what = f"the file is one of {split.contents()} parts"
        raise ArtifactError(what, where=path, hint="join them with `llama-gguf-split --merge`, and use the whole")
    if TOKENS not in header.fields:
        raise ArtifactError(
            "the file holds no tokenizer",
            where=path,
            hint="use a file that was converted together with its tokenizer, or a model directory",
        )
    _require_known_splitting(path, header)
    return header


def outline(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The sizes of the model in a file, as a configuration names them, and its tensors' shapes; from the header.

    Raises:
        ArtifactError: The file is damaged, of an architecture that is not known, or without a tokenizer.
    """
    header = header_of(path)
    prefix = header.fields[ARCHITECTURE].contents()
    named = {setting: header.get_field(f"{prefix}.{name}") for setting, name in SIZES.items()}
    sizes = {setting: field.contents() for setting, field in named.items() if field is not None}
    config = {setting: size for setting, size in sizes.items() if isinstance(size, int)}  # some differ by layer
    return config, {_module(each.name): tuple(map(int, each.shape[::-1])) for each in header.tensors}


def _module(tensor: str) -> str:
    """What most architectures call a layer's tensor; others keep the file's name."""
    block, _, name = tensor.removesuffix(".weight").rpartition(".")
    if block.startswith("blk.") and name in MODULES:
        return f"model.layers.{block.removeprefix('blk.')}.{MODULES[name]}.weight"
    return tensor


def _require_known(path: Path, architecture: str) -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    read = (GGUF_CONFIG_MAPPING.keys() | GGUF_CONFIG_ARCHS.keys()) - NO_ARCHITECTURES
    known = sorted(RENAMED.get(name, name) for name in read)
    if architecture not in known:
        raise ArtifactError(
            f"the architecture `{printable(architecture)}` cannot be read from GGUF",
            where=path,
            hint=f"use the model's directory with safetensors, or one of {', '.join(known)}",
        )


def _require_known_splitting(path: Path, header: GGUFReader) -> None:
    """Raise ArtifactError where text would be split otherwise than the tokenizer was trained for."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, splitting = (header.get_field(name) for name in (KIND, SPLITTING))
    if kind is None or kind.contents() != BYTE_LEVEL or splitting is None:
        return
    if splitting.contents() not in {*GGUF_PRE_TOKENIZER_SPLITS, *DIGITS_APART, *LIKE_GPT2}:
        raise ArtifactError(
            f"the pre-tokenizer `{printable(str(splitting.contents()))}` is not known: tokens would be other ones",
            where=path,
            hint="use the model's directory with its own tokenizer.json",
        )


def _require_complete(path: Path, report: Mapping[str, Any]) -> None:
    """Raise ArtifactError where the file does not hold exactly the tensors of the model."""
    for problem, said in INCOMPLETE.items():
        names = sorted(each if isinstance(each, str) else each[0] for each in report.get(problem, ()))
        if names:
            what = f"tensors {said}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            raise ArtifactError(what, where=path, hint=AGAIN)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the libraries that read a file into an error that names it."""
    try:
        yield
    except MemoryError as error:
        what = "no memory for as much as the file says that it holds"
        raise ArtifactError(what, where=path, hint=f"free memory; or {AGAIN}") from error
    except DAMAGE as error:
        raise ArtifactError(
            f"no readable GGUF file: {printable(f'{type(error).__name__}: {error}', 200)}", where=path, hint=AGAIN
        ) from error
