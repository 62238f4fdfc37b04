"""A client of HTTP servers: what it asks is repeated while that may help, and what comes back is not trusted.

The size of an answer is bounded, redirects are not followed, and nothing of it is repeated in an error, since a server
could send back the token.
"""

from __future__ import annotations

import http.client
import ssl
from time import sleep

from pipeline import servers
from pipeline.errors import ServerError
from pipeline.servers import Server
from reward.connection import connected

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a request is repeated; doubled each time."""
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""


class Client:
    """One server.

    Args:
        settings: Where it is, and how patiently it is asked.
        guide: What describes its protocol, for users.
        relief: What to do about requests that take too long or are too large, for users.

    Raises:
        ConfigError: The environment does not hold the token that the settings name.
    """

    def __init__(self, settings: Server, guide: str, relief: str) -> None:
        self._settings = settings
        self._guide = guide
        self._relief = relief
        self._headers = {
            "Host": settings.parts.netloc,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Connection": "close",
        }
        if settings.token_variable:
            self._headers["Authorization"] = f"Bearer {servers.token(settings.token_variable)}"

    def post(self, body: bytes, limit: int) -> bytes:
        """The body of the answer, after as many requests as it takes and the settings allow.

        Args:
            body: JSON.
            limit: Bytes that the answer may have.

        Raises:
            ConfigError: The server's name leads to an address that is not allowed.
            ServerError: The server is out of reach, refuses, or answers too much.
        """
        reason = ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
            try:
                return self._once(body, limit)
            except ssl.SSLCertVerificationError as error:
                raise self.error(f"its certificate does not hold: {error.verify_message}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = _reason(error)
        what = f"{self._settings.retries + 1} requests failed, the last one: {reason}"
        raise self.error(what, f"see that it runs; {self._relief}")

    def error(self, what: str, hint: str = "") -> ServerError:
        """What is wrong with the server, or with what it answered."""
        return ServerError(what, where=self._settings.url, hint=hint or f"{self._guide} has the protocol")

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
                    raise self.error(f"its answer is larger than {limit:,} bytes")
                if response.length:  # which is what is left of the announced length
                    raise http.client.IncompleteRead(answer)
        return answer

    def _refusal(self, status: int) -> ServerError:
        if 300 <= status < 400:
            return self.error(f"{_status(status)}: redirects are not followed", "give the final address as `url`")
        if status in (401, 403):
            return self.error(_status(status), "name the variable that holds its token as `token_variable`")
        return self.error(_status(status))


def _reason(error: Exception) -> str:
    """What went wrong, without a word that the server chose."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, http.client.HTTPException):
        return f"its answer is not HTTP, or broken off ({type(error).__name__})"
    return str(error.strerror or error) if isinstance(error, OSError) else type(error).__name__


def _status(status: int) -> str:
    return f"it answered {status} {http.client.responses.get(status, '')}".rstrip()
