"""A client of HTTP servers that compute rewards.

It posts `{"rows": [{"prompt": [messages], "response": text, "facts": {...}}]}` and takes `{"rewards": [numbers]}`, one
per row and in their order. What comes back is not trusted: its size is bounded, its count and numbers are checked,
redirects are not followed, and nothing of it is repeated in an error, since a server could send back the token.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import ssl
from collections.abc import Sequence
from time import sleep

from data.schema import Prompt
from pipeline.errors import ConfigError, DataError, ServerError
from pipeline.rules import ServerRule
from reward.connection import connected

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a request is repeated; doubled each time."""
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""
ANSWER_BYTES, REWARD_BYTES = 10_000, 100
"""Largest answer: this much, and this much for each row."""


class RewardServer:
    """One server.

    Raises:
        ConfigError: The environment does not hold the token that the settings name.
    """

    def __init__(self, settings: ServerRule) -> None:
        self._settings = settings
        self._headers = {
            "Host": settings.parts.netloc,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Connection": "close",
        }
        if settings.token_variable:
            self._headers["Authorization"] = f"Bearer {_token(settings.token_variable)}"

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
        size = self._settings.rows_per_request
        parts = [self._ask(rows[start : start + size]) for start in range(0, len(rows), size)]
        return [reward for part in parts for reward in part]

    def _ask(self, rows: Sequence[str]) -> list[float]:
        body = f'{{"rows": [{", ".join(rows)}]}}'.encode("ascii")
        answer = self._patiently(body, ANSWER_BYTES + REWARD_BYTES * len(rows))
        found = _rewards(answer)
        if found is None or len(found) != len(rows):
            what = "something else" if found is None else f"{len(found)} numbers"
            raise self._error(f'expected {len(rows)} finite numbers as `{{"rewards": [...]}}`, got {what}')
        return found

    def _patiently(self, body: bytes, limit: int) -> bytes:
        """The body of the answer, after as many requests as it takes and the settings allow."""
        reason = ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
            try:
                return self._once(body, limit)
            except ssl.SSLCertVerificationError as error:
                raise self._error(f"its certificate does not hold: {error.verify_message}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = _reason(error)
        what = f"{self._settings.retries + 1} requests failed, the last one: {reason}"
        raise self._error(what, "see that it runs; raise `timeout` or `retries`, or lower `rows_per_request`")

    def _once(self, body: bytes, limit: int) -> bytes:
        with connected(self._settings) as connection:
            connection.request("POST", self._settings.parts.path or "/", body, self._headers)
            with connection.getresponse() as response:
                if response.status in BUSY:
                    raise OSError(_status(response.status))
                if response.status != 200:
                    raise self._refusal(response.status)
                answer = response.read(limit + 1)
                if len(answer) > limit:
                    raise self._error(f"its answer is larger than {limit:,} bytes")
                if response.length:  # which is what is left of the announced length
                    raise http.client.IncompleteRead(answer)
        return answer

    def _refusal(self, status: int) -> ServerError:
        if 300 <= status < 400:
            return self._error(f"{_status(status)}: redirects are not followed", "give the final address as `url`")
        if status in (401, 403):
            return self._error(_status(status), "name the variable that holds its token as `token_variable`")
        return self._error(_status(status))

    def _error(self, what: str, hint: str = "docs/rewards.md has the protocol") -> ServerError:
        return ServerError(what, where=self._settings.url, hint=hint)


def _token(variable: str) -> str:
    token = os.environ.get(variable, "")
    if not re.fullmatch(r"[!-~]+", token):
        what = "is not set" if not token else "holds more than the printable ASCII characters of a token"
        raise ConfigError(f"the environment variable {variable} {what}", where="token_variable", hint="export it")
    return token


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


def _reason(error: Exception) -> str:
    """What went wrong, without a word that the server chose."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, http.client.HTTPException):
        return f"its answer is not HTTP, or broken off ({type(error).__name__})"
    return str(error.strerror or error) if isinstance(error, OSError) else type(error).__name__


def _status(status: int) -> str:
    return f"it answered {status} {http.client.responses.get(status, '')}".rstrip()
