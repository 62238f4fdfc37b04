"""A judge of pairs of responses: a model behind an OpenAI-compatible server (`/chat/completions`).

Every pair is asked about in both orders, since models favour a place; a verdict that changes with the order is a tie.
What is judged goes as one JSON object, whose strings nothing can close from within, and in which no control token of a
chat template can be spelled out. An answer without a verdict is counted and never guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.schema import Prompt
from pipeline.servers import VERDICTS, JudgeServer
from reward.client import Client
from reward.comparison import LOSS, TIE, WIN, Judgement

ANSWER_BYTES = 1_000_000
"""Largest answer."""
ORNAMENTS = " \t*_`\"'.()[]"
"""What may stand around the verdict in its line."""
CONTROL = re.compile(r"<(?=[<|\uff5c/\w])|\[(?=/?[A-Z_]+\])")
"""How control tokens of chat templates begin: `<|im_end|>`, `</s>`, `<<SYS>>`, `[INST]`."""


class PairJudge:
    """One server's model.

    Raises:
        ConfigError: The environment does not hold the token that the settings name.
    """

    def __init__(self, settings: JudgeServer) -> None:
        self._settings = settings
        self._client = Client(
            settings, "docs/comparison.md", "raise `timeout` or `retries`, or lower `requests_at_once`"
        )

    def compare(self, prompts: Sequence[Prompt], own: Sequence[str], other: Sequence[str]) -> Judgement:
        """Judge two responses to each prompt; equal ones are a tie without asking.

        Args:
            prompts: The conversations.
            own: The first model's responses.
            other: The second one's.

        Raises:
            ConfigError: The server's name leads to an address that is not allowed.
            ServerError: The server is out of reach, or its answers are no chat completions.
        """
        pairs = [pair for pair in zip(prompts, own, other, strict=True) if pair[1] != pair[2]]
        asked = [request for prompt, a, b in pairs for request in ((prompt, a, b), (prompt, b, a))]
        with ThreadPoolExecutor(self._settings.requests_at_once) as pool:
            said = list(pool.map(lambda request: self._ask(*request), asked))
        verdicts = iter(zip(said[::2], said[1::2], strict=True))
        found = [next(verdicts) if a != b else ("tie", "tie") for a, b in zip(own, other, strict=True)]
        decided = [each for each in found if None not in each]
        stable = {("first", "second"), ("second", "first"), ("tie", "tie")}
        return Judgement([_outcome(*each) for each in found], sum(each not in stable for each in decided))

    def _ask(self, prompt: Prompt, first: str, second: str) -> str | None:
        """The verdict, in one order."""
        content = {
            **self._settings.parameters,
            "model": self._settings.model,
            "messages": [
                {"role": "system", "content": self._settings.instructions},
                {"role": "user", "content": material(prompt, first, second)},
            ],
        }
        answer = self._client.post(json.dumps(content).encode("ascii"), ANSWER_BYTES)
        try:
            return verdict(json.loads(answer)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError, RecursionError):
            expected = 'a chat completion, `{"choices": [{"message": {"content": text}}]}`'
            raise self._client.error(f"expected {expected}, got something else") from None


def material(prompt: Prompt, first: str, second: str) -> str:
    """What is judged, as JSON: the message that a judge reads."""
    conversation = [{"role": message.role, "content": message.content} for message in prompt.prompt]
    content = {"conversation": conversation, "first": first, "second": second}
    text = CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(content, ensure_ascii=False))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def verdict(answer: Any) -> str | None:
    """The word that the last line of an answer consists of, where that is a verdict; None else."""
    lines = answer.strip().splitlines() if isinstance(answer, str) else []
    word = lines[-1].strip(ORNAMENTS).lower() if lines else ""
    return word if word in VERDICTS else None


def _outcome(verdict: str | None, swapped: str | None) -> float | None:
    if verdict is None or swapped is None:
        return None
    if (verdict, swapped) == ("first", "second"):
        return WIN
    return LOSS if (verdict, swapped) == ("second", "first") else TIE
