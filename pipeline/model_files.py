"""The files of a model directory: which of them are read, and what they may ask of the libraries that read them.

A model may come from anybody. Its weights are safetensors and nothing else, its other files are data, and none of
them can name code to run, a file outside the directory, or another model to fetch. The libraries refuse most of that
themselves, from some version on; here it is refused before they see it. Stage directories are held to the same, as
their manifests say that they are whole, not that they are harmless.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, BatonError
from pipeline.terminal import printable

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""What a foreign model directory is read for; nothing in it can hold code."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""JSON files whose fields decide what the libraries do."""
LARGEST = 50_000_000
"""Bytes of one of them: some tokenizers list all their tokens."""
MOST_LAYERS = 1_000
LARGEST_VOCABULARY = 10_000_000

CODE = frozenset(
    {
        "_auto_class",
        "auto_map",
        "auto_mapping",
        "compression_config",
        "custom_generate",
        "custom_pipelines",
        "distributed_config",
        "kernel_config",
        "quantization_config",
        "transformers_weights",
        "trust_remote_code",
        "use_kernels",
    }
)
"""Fields that name code, classes of other libraries or other files of weights; null, false or empty ask for nothing."""
IMPLEMENTATIONS = frozenset(
    {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm", "dynamic", "static", "sliding_window", "hybrid"}
)
"""What fields such as `attn_implementation` may name: code of transformers itself. Others are fetched from the hub."""
TYPES = frozenset({"auto", "float16", "bfloat16", "float32", "float64"})
"""What `dtype` may name; transformers looks the word up among all that torch has."""

ADAPTER_FIELDS = frozenset(
    {
        "fan_in_fan_out",
        "inference_mode",
        "layers_to_transform",
        "lora_alpha",
        "peft_version",
        "r",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
"""Fields of an adapter's configuration that say what Baton's adapters can be; plain values."""
ADAPTER_DEFAULTS = {
    "bias": "none",
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "qalora_group_size": 16,
}
"""What some other fields hold when they ask for nothing; the rest is null, false or empty then."""


def foreign(directory: Path) -> list[Path]:
    """The files of a foreign model directory, which must be complete and hold its weights as safetensors.

    Raises:
        ArtifactError: Not a model, an adapter without a manifest, weights only as pickles, shards missing, a link that
            leads elsewhere, or a file that asks for more than to be read.
    """
    if (directory / ADAPTER).exists():
        if any(directory.glob("model*.safetensors")):
            refuse_adapter_beside_weights(directory)
        hint = "merge it into its base and give the merged directory"
        raise ArtifactError("an adapter without a manifest: its base cannot be checked", where=directory, hint=hint)
    if not (directory / "config.json").is_file():
        raise ArtifactError("neither a stage (manifest.json) nor a model (config.json)", where=directory)
    files = sorted({path for pattern in PATTERNS for path in directory.glob(pattern) if path.is_file()})
    _require_inside(directory, files)
    names = {path.name for path in files}
    if not names & {WEIGHTS, INDEX}:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        found = f"only pickled weights ({', '.join(map(printable, pickled))})" if pickled else f"no {WEIGHTS}"
        hint = "save it with `model.save_pretrained(directory)`, which writes safetensors"
        raise ArtifactError(f"{found}: safetensors needed", where=directory, hint=hint)
    missing = sorted(shards(directory) - names)
    if missing:
        raise ArtifactError(f"shards missing: {', '.join(map(printable, missing))}", where=directory)
    require_harmless(directory, "model")
    return files


def shards(directory: Path) -> set[str]:
    """File names in a sharded model's index; one that leads out of the directory is never among its files."""
    index = directory / INDEX
    if not index.is_file():
        return set()
    try:
        return set(map(str, json_object(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"not an index of shards: {type(error).__name__}", where=index) from None


def require_harmless(directory: Path, kind: str) -> None:
    """Raise ArtifactError when a file of a model, adapter or tokenizer asks for more than to be read.

    Args:
        directory: The files' place.
        kind: `adapter` and `reward` have an adapter's configuration, which in others would be followed elsewhere.
    """
    if kind == "model":
        refuse_adapter_beside_weights(directory)
    for name in DESCRIPTIONS:
        path = directory / name
        if path.is_file():
            for place, value in _fields(json_object(path), ()):
                _require_plain(path, place, value)
    outside = sorted(name for name in shards(directory) if not (directory / name).is_file() or Path(name).name != name)
    if outside:
        raise _refused(directory / INDEX, f"names `{printable(outside[0])}`, which is no file beside it")
    adapter = directory / ADAPTER
    if adapter.exists() and kind not in ("adapter", "reward"):
        raise _refused(adapter, f"does not belong to a {kind}: loading it would load what it names, too")
    if adapter.is_file():
        _require_plain_adapter(adapter)


def refuse_adapter_beside_weights(directory: Path) -> None:
    """Raise ArtifactError where an adapter lies beside whole weights, to which libraries would apply it."""
    if (directory / ADAPTER).exists():
        raise ArtifactError(
            "an adapter beside whole weights: it may have been merged into them, and would be applied again",
            where=directory / ADAPTER,
            hint="keep the merged weights alone, or the adapter alone in a stage that names its base",
        )


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
        ArtifactError: It is larger than any of a model's, or no JSON object.
    """
    if path.stat().st_size > LARGEST:
        raise ArtifactError(f"larger than {LARGEST:,} bytes", where=path, hint="is it a model's?")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not JSON: {printable(str(error))}", where=path, hint="fetch the model again") from None
    if not isinstance(found, dict):
        raise ArtifactError("not a JSON object", where=path, hint="fetch the model again")
    return found


@contextmanager
def unreadable(directory: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises about files that it cannot read into ArtifactError.

    Their authors can make a library raise nearly anything. `RuntimeError` passes: it is torch's for want of memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BatonError | RuntimeError | MemoryError) and not isinstance(error, RecursionError):
            raise
        reason = printable(" ".join(str(error).split()), 300) or type(error).__name__
        hint = "fetch the model again, or use one of an architecture that transformers has"
        raise ArtifactError(f"the {what} cannot be read: {reason}", where=directory, hint=hint) from error


def _require_inside(directory: Path, files: list[Path]) -> None:
    """Links may lead to a file of the directory or, in the hub's cache, to where that keeps the files."""
    root = directory.resolve()
    places = (root, root.parent.parent / "blobs")
    for path in files:
        found = path.resolve()
        if path.is_symlink() and not any(found.is_relative_to(place) for place in places):
            raise _refused(path, "is a link that leads out of the directory", "put the file itself there")


def _fields(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field, also of objects within objects and lists, with the names that lead to it."""
    if isinstance(value, list):
        for each in value:
            yield from _fields(each, place)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield (*place, name), each
            yield from _fields(each, (*place, name))


def _require_plain(path: Path, place: tuple[str, ...], value: Any) -> None:
    name, dotted = place[-1], printable(".".join(place))
    if name in CODE and value:
        raise _refused(path, f"`{dotted}` may name code or files that do not belong to the model", _ways_out(name))
    if name == "init_inputs" and value:
        raise _refused(path, f"`{dotted}` holds arguments for the tokenizer's class", "remove it")
    if "_implementation" in name and not name.endswith("_autoset"):
        strange = [each for each in _words(value) if each not in IMPLEMENTATIONS]
        if strange:
            raise _refused(path, f"`{dotted}` names `{printable(strange[0])}`, which is no code of transformers'")
    if name in ("dtype", "torch_dtype"):
        strange = [each for each in _words(value) if each.removeprefix("torch.") not in TYPES]
        if strange:
            raise _refused(path, f"`{dotted}` names `{printable(strange[0])}`, which is no type of weights")
    if name.endswith(("layer", "layers")) and isinstance(value, int | float) and value > MOST_LAYERS:
        raise _refused(path, f"`{dotted}` is {printable(str(value))}; no model has so many")
    if name.endswith("_size") and isinstance(value, int | float) and (value < 0 or _is_absurd(name, value)):
        raise _refused(path, f"`{dotted}` is {printable(str(value))}; no model has such a size")


def _is_absurd(name: str, size: float) -> bool:
    return name == "vocab_size" and size > LARGEST_VOCABULARY


def _require_plain_adapter(path: Path) -> None:
    """Only what Baton's adapters can be: peft imports modules, reads files and sizes tensors by other fields."""
    for name, value in json_object(path).items():
        if name in ADAPTER_FIELDS:
            if not _is_plain(value):
                raise _refused(path, f"`{name}` holds {printable(json.dumps(value))}")
        elif value and value != ADAPTER_DEFAULTS.get(name):
            raise _refused(path, f"`{printable(name)}` is {printable(json.dumps(value))}: no adapter of Baton's has it")


def _is_plain(value: Any) -> bool:
    """A number, truth value or name, or a list of those; a pattern is no name."""
    if isinstance(value, list):
        return all(_is_plain(each) and not isinstance(each, list) for each in value)
    return not isinstance(value, dict) and not (isinstance(value, str) and set(value) & set("*+?{}()|[]\\^$"))


def _words(value: Any) -> Iterator[str]:
    """The texts in a value that is one, or a mapping to some."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _words(each)
    elif value is not None:
        yield str(value)


def _ways_out(name: str) -> str:
    if name in ("quantization_config", "compression_config"):
        return "give the model in full precision; `quantization` of a stage loads it in 4 or 8 bits"
    return "remove the field, if the model is of an architecture that transformers has"


def _refused(path: Path, what: str, hint: str = "use a model that asks for nothing of the kind") -> ArtifactError:
    return ArtifactError(what, where=path, hint=hint)
