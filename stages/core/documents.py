"""How likely documents are to a model, each from its first token on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from data.document_store import encoded
from data.schema import Text
from data.tree import Branch, Tree
from pipeline.manifest import Metric
from reward.intervals import ratio_interval
from stages.core.models import LanguageModel
from stages.core.scoring import exponential, logprobs


@dataclass(frozen=True)
class Likelihood:
    """What a document costs a model.

    Attributes:
        loss: Nats in all.
        tokens: That were predicted.
        bytes: Of the text.
    """

    loss: float
    tokens: int
    bytes: int

    @property
    def bits(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)


def text_likelihoods(
    language_model: LanguageModel, texts: Sequence[Text], max_length: int, tokens_per_batch: int
) -> dict[int, Likelihood]:
    """By the texts' places; those that do not fit are left out, as `text_trees` has it."""
    trees = text_trees(language_model.tokenizer, texts, language_model.longest(max_length))
    found = logprobs(language_model, trees, tokens_per_batch, "plain")
    return {
        tree.number: Likelihood(-found[tree.number][0], tree.reads, len(texts[tree.number].text.encode()))
        for tree in trees
    }


def perplexity(found: Collection[Likelihood]) -> Metric:
    """Of documents, per token that was predicted; comparable between models that make the same tokens of a text."""
    return exponential(ratio_interval([each.loss for each in found], [each.tokens for each in found]))


def text_trees(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int) -> list[Tree]:
    """Documents, in the tokens of training, as trees of which the first token is the prompt.

    Those of a single token, and those of more than `max_length`, are left out.

    Raises:
        ArtifactError: The tokenizer has no serialised state, or takes plain text for control tokens.
    """
    found = enumerate(encoded(tokenizer, (text.text for text in texts)))
    return [
        Tree((tokens[0],), (Branch.of(tokens[1:]),), number)
        for number, tokens in found
        if 2 <= len(tokens) <= max_length
    ]
