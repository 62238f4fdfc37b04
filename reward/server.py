"""Servers that compute rewards.

They are posted `{"rows": [{"prompt": [messages], "response": text, "facts": {...}}]}` and answer
`{"rewards": [numbers]}`, one per row and in their order. Count and numbers are checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from data.schema import Prompt
from pipeline.errors import DataError
from pipeline.rules import ServerRule
from reward.client import Client

ANSWER_BYTES, REWARD_BYTES = 10_000, 100
"""Largest answer: this much, and this much for each row."""


class RewardServer:
    """One server.

    Raises:
        ConfigError: The environment does not hold the token that the settings name.
    """

    def __init__(self, settings: ServerRule) -> None:
        self._size = settings.rows_per_request
        self._client = Client(settings, "docs/rewards.md", "raise `timeout` or `retries`, or lower `rows_per_request`")

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The server's reward of each response, as finite numbers.

        Args:
            prompts: The prompts with their facts, one per response.
            responses: The texts.

        Raises:
            ConfigError: The server's name leads to an address that is not allowed.
            DataError: A prompt's facts cannot be sent.
            ServerError: The server is out of reach or breaks the protocol.
        """
        rows = [_row(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        parts = [self._ask(rows[start : start + self._size]) for start in range(0, len(rows), self._size)]
        return [reward for part in parts for reward in part]

    def _ask(self, rows: Sequence[str]) -> list[float]:
        body = f'{{"rows": [{", ".join(rows)}]}}'.encode("ascii")
        answer = self._client.post(body, ANSWER_BYTES + REWARD_BYTES * len(rows))
        found = _rewards(answer)
        if found is None or len(found) != len(rows):
            what = "something else" if found is None else f"{len(found)} numbers"
            raise self._client.error(f'expected {len(rows)} finite numbers as `{{"rewards": [...]}}`, got {what}')
        return found


def _row(prompt: Prompt, response: str) -> str:
    messages = [{"role": message.role, "content": message.content} for message in prompt.prompt]
    try:
        return json.dumps({"prompt": messages, "response": response, "facts": dict(prompt.facts)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        what, hint = f"the prompt's facts cannot be sent as JSON: {error}", "leave the column or the adapter's fact out"
        raise DataError(what, where=prompt.origin, hint=hint) from None


def _rewards(answer: bytes) -> list[float] | None:
    """The numbers of an answer; None when it is anything but finite numbers in a list of that name."""
    try:
        content = json.loads(answer, parse_int=float)
    except (ValueError, RecursionError):
        return None
    found = content.get("rewards") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, float) and math.isfinite(each) for each in found):
        return None
    return found
