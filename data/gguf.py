"""A GGUF file as a base: its blocks are dequantized once into a model directory, which the cache keeps.

What GGUF stores in 4 or 8 bits becomes bfloat16, what it stores in float32 stays float32; the architecture, tokenizer
and chat template are read from the file's header by `transformers`. The directory is found again by the digest of the
file and the versions of the libraries that read it, so a changed file or library converts again.

Left out: training in the file's own blocks, and writing GGUF.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
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
LIBRARIES = ("gguf", "tokenizers", "torch", "transformers")
"""Libraries that the converted model depends on."""
ARCHITECTURE, TOKENS, SPLITTING = "general.architecture", "tokenizer.ggml.tokens", "tokenizer.ggml.pre"
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
NO_ARCHITECTURES = {"general", "tokenizer"}
"""What `transformers` keeps beside the architectures in its table."""
FLOAT32_FILE = 0
"""The value of `general.file_type` for a file whose weights are all float32."""
DIGITS_APART = ("smollm",)
"""Pre-tokenizers that split numbers into digits, which `transformers` passes over when it reads a GGUF file."""


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
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=stored, quantization_config=GgufConfig(dequantize=True), **options
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
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
    if TOKENS not in header.fields:
        raise ArtifactError(
            "the file holds no tokenizer",
            where=path,
            hint="use a file that was converted together with its tokenizer, or a model directory",
        )
    return header


def outline(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The sizes of the model in a file, as a configuration names them, and its tensors' shapes; from the header.

    Raises:
        ArtifactError: The file is damaged, of an architecture that is not known, or without a tokenizer.
    """
    header = header_of(path)
    prefix = header.fields[ARCHITECTURE].contents()
    config = {
        setting: int(field.contents())
        for setting, name in SIZES.items()
        if (field := header.get_field(f"{prefix}.{name}")) is not None
    }
    return config, {each.name: tuple(map(int, each.shape[::-1])) for each in header.tensors}


def _require_known(path: Path, architecture: str) -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    known = sorted(GGUF_CONFIG_MAPPING.keys() - NO_ARCHITECTURES)
    if architecture not in known:
        raise ArtifactError(
            f"the architecture `{printable(architecture)}` cannot be read from GGUF",
            where=path,
            hint=f"use the model's directory with safetensors, or one of {', '.join(known)}",
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the libraries that read a file into an error that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"no readable GGUF file: {printable(f'{type(error).__name__}: {error}', 200)}",
            where=path,
            hint="download or convert the file again; its sha256 is beside it where it was published",
        ) from error
