"""`baton chat`: conversations with one stage or several, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StrictInt, model_validator

from pipeline import inputs
from pipeline import manifest as manifests
from pipeline.config import Decoding, Device, Precision
from pipeline.contract import Artifact
from pipeline.screens import Pipe, Screen, Terminal
from pipeline.settings import Positive, Seed
from pipeline.store import RunDirectory
from pipeline.terminal import printable

if TYPE_CHECKING:
    from stages.core.conversation import Conversation

QUIT = "/quit"
COMMANDS = {
    "/undo": "the last question is taken back",
    "/reset": "a new conversation begins",
    QUIT: "",
}
"""What a line may say instead of a question, and what is answered."""


class ChatSettings(Decoding):
    """Whom to talk to, and how they answer."""

    stages: Annotated[list[str], Field(min_length=1)]
    """Models and adapters: stage directories, model directories or hub models."""
    reward: str | None = None
    """Reward stage that chooses the best of several answers."""
    best_of: Annotated[StrictInt, Field(ge=2)] | None = None
    """Answers of which the one with the highest reward is shown."""
    system: str | None = None
    """What goes before every conversation."""
    max_new_tokens: Positive = 256
    """Longest answer."""
    seed: Seed = 0
    """Seed of the samples."""
    device: Device = "auto"
    """Where to compute."""
    dtype: Precision = "auto"
    """Precision of weights and matrix products."""

    @model_validator(mode="after")
    def _the_best_is_chosen_among_different_ones(self) -> ChatSettings:
        if (self.best_of is None) != (self.reward is None):
            raise ValueError("the best of several answers needs both --best-of N and --reward STAGE")
        if self.best_of and not self.is_random:
            raise ValueError(f"the best of {self.best_of} equal answers: raise the temperature above 0")
        if len(set(self.stages)) < len(self.stages):
            raise ValueError("a stage is named twice")
        return self


def chat(settings: ChatSettings) -> None:
    """Open the stages and talk until the input ends.

    Raises:
        ArtifactError: A stage is damaged, or its chat template does not take the conversation.
        ConfigError: A stage cannot be talked to, or has no room for a question.
        DataError: A question that came through a pipe cannot be asked.
    """
    conversations = _opened(settings)
    names = ", ".join(each.name for each in conversations)
    greeting = f"{names}; {', '.join(COMMANDS)}; ctrl-C stops an answer, ctrl-D ends"
    screen = Terminal(greeting) if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()
    _Session(conversations, screen, settings.seed).run()


def labels(references: Sequence[str]) -> dict[str, str]:
    """Reference -> the shortest end of its path that no other has: `sft`, or `a/stages/sft` beside `b/stages/sft`."""
    paths = {each: _path(each).parts for each in references}

    def label(reference: str) -> str:
        own = paths[reference]
        for count in range(1, len(own) + 1):
            if [path[-count:] for path in paths.values()].count(own[-count:]) == 1:
                return str(PurePosixPath(*own[-count:]))
        return reference

    return {each: label(each) for each in references}


def _path(reference: str) -> PurePosixPath:
    return PurePosixPath(reference.partition("@")[0] if reference.startswith("hub:") else reference)


def _opened(settings: ChatSettings) -> list[Conversation]:
    verify = cache(manifests.verify)

    def find(reference: str, role: str, accepts: tuple[str, ...]) -> Artifact:
        found = inputs.resolve(reference, RunDirectory(Path()), (), download=True, verify=verify)
        return inputs.require(found, role, accepts)

    models = [find(each, "chat", ("model", "adapter")) for each in settings.stages]
    judge = find(settings.reward, "--reward", ("reward",)) if settings.reward else None

    from stages.core import conversation, device

    return conversation.begin(
        models,
        labels(settings.stages).__getitem__,
        judge,
        conversation.Manner(settings, settings.max_new_tokens, settings.best_of or 1),
        settings.system,
        device.choose(settings.device, settings.dtype),
    )


class _Session:
    """Questions and commands, one after another. Each question has a seed of its own, also one that is asked again."""

    def __init__(self, conversations: Sequence[Conversation], screen: Screen, seed: int) -> None:
        self._conversations = conversations
        self._screen = screen
        self._seed = seed

    def run(self) -> None:
        for line in self._screen.lines():
            if line == QUIT:
                return
            if line in COMMANDS:
                self._obey(line)
            elif _is_like_a_command(line):
                self._screen.refuse(f"no command `{printable(line)}`: there are {', '.join(COMMANDS)}")
            elif line.strip():
                self._ask(line)

    def _obey(self, command: str) -> None:
        if not self._conversations[0].turns:
            self._screen.say("nothing has been said yet")
            return
        for each in self._conversations:
            each.undo() if command == "/undo" else each.reset()
        self._screen.say(COMMANDS[command])

    def _ask(self, question: str) -> None:
        for each in self._conversations:
            if each.too_long(question):
                self._screen.refuse(f"too long for {printable(each.name)}: {each.room} tokens can go before an answer")
                return
        forgotten = [each.forgotten for each in self._conversations]
        answers = {each.name: each.answer(question, self._seed) for each in self._conversations}
        self._seed += 1
        try:
            texts = self._screen.show(answers)
        except KeyboardInterrupt:
            self._screen.stopped("stopped; the question is taken back")
            return
        finally:
            for answer in answers.values():
                answer.close()
        for each, text, before in zip(self._conversations, texts, forgotten, strict=True):
            each.keep(question, text)
            if each.forgotten > before:
                self._screen.say(
                    f"{each.name} has read no more than its last {each.room} tokens: older turns are left out"
                )


def _is_like_a_command(line: str) -> bool:
    return line.startswith("/") and line[1:].isalpha()
