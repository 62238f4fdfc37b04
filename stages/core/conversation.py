"""Conversations with models: what was said so far, and the answer to the next question, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from data.schema import Message, Prompt
from data.template import ChatTemplate
from pipeline.config import Decoding
from pipeline.contract import Artifact
from pipeline.errors import ConfigError
from stages.core.answers import rewards
from stages.core.decoding import decode, stream
from stages.core.device import Compute
from stages.core.lineup import Contestant, Lineup
from stages.core.models import LanguageModel
from stages.core.roles import Roles

UNLIMITED = 2**20
"""Longest conversation in tokens with a model that knows no limit."""
TOKENS_PER_BATCH = 8192
SHORT_QUESTION = "Hello?"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding makes of a character of which some bytes are still to come."""


@dataclass(frozen=True)
class Manner:
    """How a model answers."""

    decoding: Decoding
    max_new_tokens: int
    best_of: int = 1
    """Of so many answers, the one that the judge gives the highest reward."""


@dataclass
class Conversation:
    """A model, and what was said to it and by it.

    Attributes:
        contestant: The model.
        manner: How it answers.
        judge: The reward model, in the role `reward`, that chooses the best of several answers.
        system: What goes before all turns.
        turns: The user's and the model's, in turn.
        forgotten: How many of them, the oldest ones, the model did not read for its last answer.
    """

    contestant: Contestant
    manner: Manner
    judge: Roles | None = None
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    forgotten: int = 0

    @property
    def name(self) -> str:
        """The model's."""
        return self.contestant.name

    @property
    def room(self) -> int:
        """Tokens that may go before an answer."""
        return self.contestant.roles.base.longest(UNLIMITED) - self.manner.max_new_tokens

    def too_long(self, question: str) -> bool:
        """Whether a question has no room even where all turns before it are forgotten."""
        return len(self._template.prompt(self._messages([], question))) > self.room

    def answer(self, question: str, seed: int) -> Generator[str]:
        """The answer to a question, piece by piece; the conversation stays as it is until `keep`.

        Where there is no room for all that was said, the oldest turns are left out.
        """
        messages = self._fitting(question)
        with self.contestant.use() as language_model, language_model.compute.autocast():
            if self.manner.best_of > 1:
                yield self._best(language_model, messages, seed)
                return
            tokens = stream(
                language_model.model,
                tuple(self._template.prompt(messages)),
                self.manner.decoding,
                stop_id=self._template.stop_id,
                max_new_tokens=self.manner.max_new_tokens,
                seed=seed,
            )
            yield from pieces(self._template, tokens)

    def keep(self, question: str, answer: str) -> None:
        """Go on from a question and its answer."""
        self.turns += [Message("user", question), Message("assistant", answer)]

    def undo(self) -> None:
        """Take the last question and its answer back."""
        del self.turns[-2:]

    def reset(self) -> None:
        """Begin anew."""
        self.turns.clear()

    @property
    def _template(self) -> ChatTemplate:
        return self.contestant.roles.base.template

    def _messages(self, turns: list[Message], question: str) -> list[Message]:
        opening = [Message("system", self.system)] if self.system is not None else []
        return [*opening, *turns, Message("user", question)]

    def _fitting(self, question: str) -> list[Message]:
        for forgotten in range(0, len(self.turns) + 1, 2):
            messages = self._messages(self.turns[forgotten:], question)
            if len(self._template.prompt(messages)) <= self.room:
                self.forgotten = forgotten
                return messages
        raise ValueError("the question alone is too long")

    def _best(self, language_model: LanguageModel, messages: list[Message], seed: int) -> str:
        assert self.judge is not None
        samples = decode(
            language_model.model,
            [tuple(self._template.prompt(messages))],
            self.manner.decoding,
            stop_id=self._template.stop_id,
            max_new_tokens=self.manner.max_new_tokens,
            seed=seed,
            tokens_per_batch=TOKENS_PER_BATCH,
            per_prompt=self.manner.best_of,
        )
        texts = [self._template.decode(each.tokens) for each in samples]
        asked = [Prompt(tuple(messages))] * len(texts)
        found = rewards(self.judge, asked, texts, [each.ended for each in samples], UNLIMITED, TOKENS_PER_BATCH)
        return texts[found.index(max(found))]


def begin(
    models: Sequence[Artifact],
    named: Callable[[str], str],
    judge: Artifact | None,
    manner: Manner,
    system: str | None,
    compute: Compute,
) -> list[Conversation]:
    """A conversation with each model, in their order; all that share a base share it in memory.

    Raises:
        ArtifactError: A model is damaged, or its chat template does not take such a conversation.
        ConfigError: Two models have the same name, or there is no room before an answer.
    """
    lineup = Lineup({each.source: each for each in models}, compute, named=named)
    reward_model = lineup.judge(judge) if judge else None
    found = [Conversation(lineup.contestants[named(each.source)], manner, reward_model, system) for each in models]
    for conversation in found:
        if conversation.too_long(SHORT_QUESTION):
            what = f"an answer of {manner.max_new_tokens} tokens leaves no room for a question"
            raise ConfigError(what, where=conversation.name, hint="lower --max-new-tokens, or shorten --system")
    return found


def pieces(template: ChatTemplate, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, control tokens left out; together they are what `template.decode` gives.

    A character of which some bytes are still to come waits for them.
    """
    seen: list[int] = []
    text = told = ""
    for token in tokens:
        seen.append(token)
        text = template.decode(seen)
        if text.startswith(told) and not text.endswith(UNFINISHED) and text != told:
            yield text[len(told) :]
            told = text
    if text != told:
        yield text[len(told) :]
