"""Log-probabilities under the reference: computed in each step, or once before training and kept on disk.

What is kept does not depend on the loss, its strength or the order of the pairs, only on the reference, the tokens of
the set of pairs that a run takes, and how they are computed; so a run with another beta reads what the first one
computed. It is found by the digest of all that, in the cache where tokens are. A run that takes another set computes
all of its pairs: with `steps`, or where a mixture draws a part of a source, another seed is another set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import cache
from data.arrays import ArrayWriter, mapped
from data.batch import Layout, TreeBatch
from data.tree import Tree
from pipeline import fingerprint
from pipeline.contract import Artifact
from stages.core.forward import token_logprobs
from stages.core.models import LanguageModel
from stages.core.roles import REFERENCE, Roles, base_of
from stages.core.scoring import on_device

Reference = Callable[[TreeBatch], Tensor]
"""Summed log-probabilities of a batch's pairs under the reference: [pairs, 2], float32, without a gradient."""

FILE_NAME = "logprobs.f4"
LOGPROB = np.dtype("<f4")
PORTION = 4096
"""Pairs in memory at once while they are computed; batches are packed from them."""


def pair_logprobs(language_model: LanguageModel, batch: TreeBatch) -> Tensor:
    """Summed log-probabilities of (chosen, rejected) under the role in use: [pairs, 2], float32."""
    with language_model.compute.autocast():
        return batch.sum_by_branch(token_logprobs(language_model.model, batch)).view(-1, 2)


def in_each_step(roles: Roles) -> Reference:
    """The reference computed when it is asked for."""

    @torch.no_grad()
    def compute(batch: TreeBatch) -> Tensor:
        with roles.use(REFERENCE):
            return pair_logprobs(roles.base, batch)

    return compute


class KeptReference:
    """The reference's log-probabilities of certain pairs, read from the cache, where they are put if need be.

    Args:
        roles: The base with the reference.
        artifact: The reference; it was verified.
        pairs: Gives the pairs anew at each call, in any order and any number of times each; a number stands for one
            tree.
        tokens_per_batch: Tokens that go through the model at once.
        layout: How trees are laid out.
        say: Prints one line for the user.
    """

    def __init__(
        self,
        roles: Roles,
        artifact: Artifact,
        pairs: Callable[[], Iterable[Tree]],
        *,
        tokens_per_batch: int,
        layout: Layout,
        say: Callable[[str], None],
    ) -> None:
        contents = _contents(pairs())
        distinct = {content: place for place, content in enumerate(sorted(set(contents.values())))}
        self._places = {number: distinct[content] for number, content in contents.items()}

        def make(directory: Path) -> Mapping[str, Any]:
            say(f"reference: computing log-probabilities of {len(distinct):,} pairs once")
            self._compute(directory, roles, pairs(), len(distinct), tokens_per_batch, layout)
            return {"pairs": len(distinct)}

        entry = cache.cached(_key(artifact, roles, distinct, layout), make, say)
        self._values: NDArray[Any] = mapped(entry.directory / FILE_NAME, LOGPROB).reshape(-1, 2)

    def __call__(self, batch: TreeBatch) -> Tensor:
        places = [self._places[tree.number] for tree in batch.trees]
        return torch.from_numpy(self._values[places]).to(batch.tokens.device)

    @torch.no_grad()
    def _compute(
        self, directory: Path, roles: Roles, pairs: Iterable[Tree], count: int, budget: int, layout: Layout
    ) -> None:
        values = np.full((count, 2), np.nan, LOGPROB)
        reference = in_each_step(roles)
        for portion in _portions(self._first_of_each(pairs)):
            for batch in on_device(roles.base, portion, budget, layout):
                places = [self._places[tree.number] for tree in batch.trees]
                values[places] = reference(batch).cpu().numpy()
        with ArrayWriter(directory / FILE_NAME, LOGPROB) as writer:
            writer.append(values)

    def _first_of_each(self, pairs: Iterable[Tree]) -> Iterator[Tree]:
        seen: set[int] = set()
        for tree in pairs:
            place = self._places[tree.number]
            if place not in seen:
                seen.add(place)
                yield tree


def _contents(pairs: Iterable[Tree]) -> dict[int, bytes]:
    """Number -> digest of a tree's tokens and of which are read."""
    found: dict[int, bytes] = {}
    for tree in pairs:
        if tree.number not in found:
            found[tree.number] = _content(tree)
    return found


def _content(tree: Tree) -> bytes:
    digest = hashlib.sha256()
    for tokens, read in ((tree.prompt, ()), *((branch.tokens, branch.read) for branch in tree.branches)):
        digest.update(np.array([len(tokens), *tokens], "<i8").tobytes() + bytes(read))
    return digest.digest()


def _key(artifact: Artifact, roles: Roles, distinct: Iterable[bytes], layout: Layout) -> str:
    base, quantization = base_of(artifact)
    parts = {
        "what": "reference log-probabilities",
        "reference": artifact.digest,
        "base": base.digest,
        "quantization": quantization,
        "pairs": hashlib.sha256(b"".join(distinct)).hexdigest(),
        "compute": roles.base.compute.record,
        "layout": layout,
        "code": fingerprint.sources("dpo"),
        "libraries": fingerprint.environment()["libraries"],
    }
    return fingerprint.digest(parts)


def _portions(trees: Iterator[Tree]) -> Iterator[list[Tree]]:
    while portion := list(islice(trees, PORTION)):
        yield portion
