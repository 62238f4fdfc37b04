"""What a model must be before anyone computes with it: complete, finite, and of one mind with its tokenizer.

Hashes and the files' own words are checked before (`pipeline/handover.py`); probes follow when the model computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.content import special_ids
from data.template import tokenizer_digest, tokenizer_record
from data.tokenizer import load_tokenizer
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError
from pipeline.terminal import printable

RELIED_ON = {"config.json": ("eos", "pad"), "generation_config.json": ("eos",)}
"""The special tokens that are taken from a configuration; when it generates, Baton sets the padding itself."""
LOADING = {
    "missing_keys": "missing",
    "unexpected_keys": "not of this model",
    "mismatched_keys": "of another shape",
}
"""How `transformers` calls tensors that do not fit, and how they are told of."""


def require_complete(report: Mapping[str, Any], directory: Path) -> None:
    """Raise ArtifactError when `transformers` did not load exactly the tensors of a model."""
    for problem, said in LOADING.items():
        found = sorted(map(_tensor, report.get(problem, ())))
        if found:
            raise ArtifactError(
                f"tensors {said}: {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}",
                where=directory,
                hint="the weights do not fit the configuration beside them; fetch or train the model again",
            )


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Raise ArtifactError when there are tokens that the model has no embedding of."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    needed = max([len(tokenizer), *(1 + number for number in tokenizer.get_vocab().values())])
    if rows < needed:
        raise ArtifactError(
            f"the tokenizer has {needed} tokens, the model's embedding {rows} rows",
            where=directory,
            hint="use the tokenizer that the model was trained with",
        )


def require_special_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ArtifactError when a configuration means another token than the tokenizer by a name that Baton relies on.

    That is the end of a text, and in `config.json` the padding, whose embedding is never trained. What is left out is
    not compared; of several end tokens one must be the tokenizer's. Where texts begin, only the tokenizer says.
    """
    for file, names in RELIED_ON.items():
        for name, found in _ids(directory / file, names):
            own = special_ids(tokenizer)[name]
            if own is not None and own not in (found if isinstance(found, list) else [found]):
                raise ArtifactError(
                    f"{name}_token_id is {found}, the tokenizer's {name} token is {own}",
                    where=directory / file,
                    hint=f"give both the same token: they decide what is learnt and where it ends; the tokenizer's is "
                    f"`{printable(str(tokenizer.convert_ids_to_tokens(own)))}`",
                )


def open_tokenizer(artifact: Artifact) -> PreTrainedTokenizerBase:
    """An artefact's own tokenizer: the one that its manifest tells of, with the tokens of the base, where it has one.

    The chat template may be another than the base's, which an adapter was given.

    Raises:
        ArtifactError: It is another.
    """
    tokenizer = load_tokenizer(artifact.directory)
    if artifact.manifest is not None:
        recorded, found = artifact.manifest.tokenizer, _record(tokenizer, artifact.directory)
        for name, value in found.items():
            if recorded.get(name) != value:
                what = name.replace("digest", "tokenizer").replace("_", " ")
                raise ArtifactError(
                    f"the {what} is not the stage's own: recorded {recorded.get(name)}, found {value}",
                    where=artifact.directory,
                    hint="bring back the tokenizer's files, or run the stage again with `--force`",
                )
    if artifact.base is not None:
        _require_tokens(artifact, tokenizer, artifact.base)
    return tokenizer


def require_same_tokens(reward: Artifact, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ArtifactError unless a reward model, which scores a policy's own tokens, has learnt the same structure.

    Args:
        reward: The reward model.
        tokenizer: The policy's.
    """
    expected, found = tokenizer_record(tokenizer), _record(open_tokenizer(reward), reward.directory)
    for name, what in (("digest", "tokenizer"), ("chat_template", "chat template")):
        if found[name] != expected[name]:
            raise ArtifactError(
                f"the reward model reads the {what} {found[name][:12]}, the policy writes {expected[name][:12]}",
                where=reward.directory,
                hint="train the reward stage on the same `policy` as this stage",
            )


def _record(tokenizer: PreTrainedTokenizerBase, directory: Path) -> dict[str, Any]:
    """What a manifest says of a tokenizer; where it cannot be used, the directory is named."""
    try:
        return tokenizer_record(tokenizer)
    except ArtifactError as error:
        raise ArtifactError(error.what, where=directory, hint=error.hint) from error


def _require_tokens(artifact: Artifact, tokenizer: PreTrainedTokenizerBase, base: Artifact) -> None:
    own, of_base = tokenizer_digest(tokenizer), tokenizer_digest(load_tokenizer(base.directory))
    if own != of_base:
        raise ArtifactError(
            f"its tokenizer is {own[:12]}, that of its base {of_base[:12]}",
            where=artifact.directory,
            hint="bring back the tokenizer's files: an adapter has the tokens of its base",
        )


def _ids(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Names and ids of the special tokens that a configuration states; defaults of its class are not in the file."""
    if not path.is_file():
        return
    settings: Any = json.loads(path.read_bytes())
    settings = settings | (settings.get("text_config") or {})
    for name in names:
        found = settings.get(f"{name}_token_id")
        if found is not None and found != -1:  # older models write -1 where there is none
            yield name, found


def _tensor(named: Any) -> str:
    """A tensor's name; of another shape, with the shape in the file and in the model."""
    if isinstance(named, str):
        return printable(named)
    name, in_file, in_model = named
    return f"{printable(str(name))} {tuple(in_file)} in the file, {tuple(in_model)} in the model"
