"""Records that show any change to themselves: their last line holds the sha256 of what stands before it."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel

FIELD = "seal"
_MARK = f',\n  "{FIELD}": "'.encode()
_END = b'"\n}\n'


def sealed(record: BaseModel) -> str:
    """A record as JSON, with its seal as the last field."""
    body = record.model_dump_json(indent=2)
    opened = body.removesuffix("\n}")
    return opened + _MARK.decode() + _digest(body.encode()) + _END.decode()


def is_intact(text: bytes) -> bool:
    """Whether every bit of a sealed record is as it was written."""
    opened, _, seal = text.rpartition(_MARK)
    return seal == _digest(opened + b"\n}").encode() + _END


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
