"""Secrets stay where they are: what is written or printed holds none of the environment's, and settings hold none.

Tokens, keys and passwords come from environment variables and go to whom they are for. Any text on its way to a file
or a terminal passes `redacted`, which knows them by their value, also within an error message of somebody else's.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLES = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
"""In the name of an environment variable that holds a secret: a word of its own, which it is not in `TOKENIZER`."""
SHORTEST = 8
"""Characters; a shorter value could not be told from ordinary words, and keeps no secret."""
LONGEST_SECRET = 10_000
"""Characters; private keys are the longest secrets that variables hold."""
KNOWN = re.compile(
    r"""
    (?<![A-Za-z0-9]) (?:
        hf_[A-Za-z0-9]{30,} | sk-[A-Za-z0-9_-]{20,} | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,}
      | glpat-[\w-]{20,} | xox[abeoprs]-[A-Za-z0-9-]{20,} | AKIA[A-Z0-9]{16} | AIza[\w-]{35}
      | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}
    )
    """,
    re.VERBOSE,
)
"""How tokens of well-known services look: model hubs, source hosts, clouds, JSON web tokens."""
DIGEST = re.compile("[0-9a-f]{64}")
"""How the contents of files and settings are known."""
SETTINGS = re.compile(
    r"(?:.*[_-])?(?:password|passwd|passphrase|secret|credentials?|api[_-]?key|(?:access|private|secret)_key"
    r"|(?:access|auth|bearer|hub|api|hf)_token|use_auth_token|authorization)|token",
    re.IGNORECASE,
)
"""Settings of which the name says that the value is a secret."""


def redacted(text: str) -> str:
    """Text with every secret replaced by what it is the value of."""
    for name, value in _secrets():
        for written in {value, json.dumps(value)[1:-1]}:
            if written in text:
                text = text.replace(written, f"[value of {name}]")
    return KNOWN.sub("[a token]", text)


def redacted_texts(value: Any) -> Any:
    """A value of JSON in which every text is redacted; names of fields, numbers and digests stay what they are."""
    if isinstance(value, str):
        return value if DIGEST.fullmatch(value) else redacted(value)
    if isinstance(value, dict):
        return {name: redacted_texts(each) for name, each in value.items()}
    return [redacted_texts(each) for each in value] if isinstance(value, list) else value


def secret_in(value: str) -> str | None:
    """What secret a setting's text holds, in words; None when it holds none."""
    for name, secret in _secrets():
        if secret in value:
            return f"the value of the environment variable {name}"
    return "what looks like a token" if KNOWN.search(value) else None


def is_secret(setting: str) -> bool:
    """Whether a setting of this name is there to hold a secret."""
    return SETTINGS.fullmatch(setting) is not None


def texts(value: Any, location: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str, bool]]:
    """Every key and every single value among settings as text: its place, the text, and whether it is a value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield (*location, key), str(key), False
            yield from texts(each, (*location, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from texts(each, (*location, index))
    elif value is not None and not isinstance(value, bool) and location:
        yield location, str(value), True


def _secrets() -> Iterator[tuple[str, str]]:
    """Names and values of the variables that hold secrets, long values first; a file's path is none."""
    variables = [(name, os.environ[name].strip()) for name in os.environ if _holds_a_secret(name)]
    secrets = [(name, value) for name, value in variables if len(value) >= SHORTEST and not _is_path(value)]
    yield from sorted(secrets, key=lambda secret: -len(secret[1]))


@functools.cache
def _holds_a_secret(variable: str) -> bool:
    return VARIABLES.search(variable) is not None


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False
