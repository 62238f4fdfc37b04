"""The settings of programmatic rewards: one small model per rule, told apart by the field `rule`.

A list of rules is a mixture: the reward of a response is the weighted sum of what each rule gives it.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Literal, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, StrictInt, model_validator

from pipeline.settings import Number, Positive, Rate, Settings

Gold = Literal["none", "world", "exact", "numeric"]
"""A rule that knows which responses are correct, or none."""
PORTS = {"http": 80, "https": 443}
"""Scheme -> the port of an address that names none."""


class WeightedRule(Settings):
    """What every rule has."""

    weight: Number = 1.0
    """What the rule's reward is multiplied by in the sum; negative for what should be avoided."""

    @model_validator(mode="after")
    def _counts(self) -> WeightedRule:
        if self.weight == 0:
            raise ValueError("weight=0 does nothing: leave the rule out")
        return self


class WorldRule(WeightedRule):
    """The embedded world's gold reward: correct, polite and concise. Needs prompts of the embedded world."""

    rule: Literal["world"] = "world"
    """Name of the rule."""


class ExactRule(WeightedRule):
    """1 for the prompt's `answer`, whatever its case, spacing, quotation marks and closing punctuation; else 0."""

    rule: Literal["exact"] = "exact"
    """Name of the rule."""


class NumericRule(WeightedRule):
    """1 when the last number of the response equals the last one of the prompt's `answer`; else 0."""

    rule: Literal["numeric"] = "numeric"
    """Name of the rule."""


def _compiles(expression: str) -> str:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression of Python's: {error}") from None
    return expression


class PatternRule(WeightedRule):
    """1 when a regular expression is found anywhere in the response; else 0."""

    rule: Literal["pattern"] = "pattern"
    """Name of the rule."""
    expression: Annotated[str, Field(min_length=1), AfterValidator(_compiles)]
    """Regular expression in Python's syntax; `(?i)` at its beginning ignores case, `\\A` and `\\Z` anchor it."""


class FormatRule(WeightedRule):
    """1 when the response is laid out as asked; else 0."""

    rule: Literal["format"] = "format"
    """Name of the rule."""
    layout: Literal["json", "tags"]
    """`json`: the whole response is one JSON value. `tags`: it is exactly the tagged parts in `tags`, in this order,
    with nothing but white space around them."""
    tags: list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]] = []
    """With `tags`: names of the parts; `think` is what stands between `<think>` and `</think>`."""

    @model_validator(mode="after")
    def _tags_fit_the_layout(self) -> FormatRule:
        if (self.layout == "tags") != bool(self.tags):
            raise ValueError("layout=tags needs `tags`, as in `tags: [think, answer]`; other layouts take none")
        if len(set(self.tags)) < len(self.tags):
            raise ValueError("a part is named twice in `tags`: name each once")
        return self


class LengthRule(WeightedRule):
    """1 for up to `words` words, falling linearly to 0 at twice as many."""

    rule: Literal["length"] = "length"
    """Name of the rule."""
    words: Positive
    """Longest response that gets 1."""


class RepetitionRule(WeightedRule):
    """1 minus the share of runs of `n` words that occurred before in the response."""

    rule: Literal["repetition"] = "repetition"
    """Name of the rule."""
    n: Positive = 3
    """Words of a run."""


class ServerRule(WeightedRule):
    """A reward that an HTTP server of yours computes; any finite number (`docs/rewards.md` has the protocol)."""

    rule: Literal["server"] = "server"
    """Name of the rule."""
    url: str
    """`https://host:port/path` or, for servers nearby, `http://`; no user, password, query or fragment."""
    hosts: Annotated[list[str], Field(min_length=1)]
    """Hosts that may be connected to: exact names or addresses, as in `rewards.example.com`, `localhost:8000` or
    `[::1]:8000`; without a port, all ports. A name must have public addresses; private ones and this machine can be
    reached by their literal address or, this machine, as `localhost`."""
    token_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds a bearer token; the token itself is never written anywhere."""
    rows_per_request: Positive = 64
    """Responses that are sent at once."""
    timeout: Annotated[Rate, Field(le=3600.0)] = 30.0
    """Seconds that one request may take from connecting to the last byte."""
    retries: Annotated[StrictInt, Field(ge=0, le=10)] = 3
    """How often a request is repeated when the server is out of reach, too slow or busy."""

    @property
    def parts(self) -> SplitResult:
        """The address in its parts."""
        return urlsplit(self.url)

    @property
    def host(self) -> str:
        """Name or literal address, in lower case and without brackets."""
        return self.parts.hostname or ""

    @property
    def port(self) -> int:
        """The port, also where the address names none."""
        return self.parts.port or PORTS[self.parts.scheme]

    @model_validator(mode="after")
    def _address_is_plain(self) -> ServerRule:
        # No message repeats the address: it may hold a password.
        if not re.fullmatch(r"[!-~]+", self.url):
            raise ValueError("url: only printable ASCII without blanks; write other letters of a name as punycode")
        try:
            is_address = self.parts.scheme in PORTS and bool(self.host) and self.port > 0
        except ValueError:
            is_address = False
        if not is_address:
            raise ValueError("url: should begin with http:// or https:// and a host, which a port may follow")
        if "@" in self.parts.netloc:
            raise ValueError("url: holds a user or password: name a variable with a token as `token_variable` instead")
        if "?" in self.url or "#" in self.url:
            raise ValueError("url: should end with the path: leave out what begins with ? or #")
        return self

    @model_validator(mode="after")
    def _host_is_allowed(self) -> ServerRule:
        allowed = [_allowed(entry) for entry in self.hosts]
        if (self.host, self.port) not in allowed and (self.host, None) not in allowed:
            raise ValueError(f"`{self.host}:{self.port}` is not among `hosts`: add it if you trust it")
        if self.token_variable and self.parts.scheme == "http" and not is_loopback(self.host):
            raise ValueError("a token would be sent in the clear: use https, or leave out token_variable")
        return self


def is_loopback(host: str) -> bool:
    """Whether a host names this machine, as a literal address or as `localhost`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allowed(entry: str) -> tuple[str, int | None]:
    """Host and port of an entry of `hosts`."""
    try:
        found = urlsplit(f"//{entry}")
        host, port = found.hostname, found.port
    except ValueError:
        host = None
    if not host or found.netloc != entry or "@" in entry:
        raise ValueError("hosts: an entry should be a host, or host:port, as in localhost:8000 or [::1]:8000")
    return host, port


Rule = Annotated[
    WorldRule | ExactRule | NumericRule | PatternRule | FormatRule | LengthRule | RepetitionRule | ServerRule,
    Field(discriminator="rule"),
]
"""Any rule."""

RULES: dict[str, type[WeightedRule]] = {
    model.model_fields["rule"].default: model for model in get_args(get_args(Rule)[0])
}
"""Name of a rule -> its settings."""
