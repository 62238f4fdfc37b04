"""Rendering chat templates, which are data from strangers: in a process apart, with limits on time and memory.

One process, `data.sandbox`, serves all templates. It is started when first needed, ended when it is late, and
ends by itself when its input does, however the process that started it came to its end.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.findings import cut, shown
from data.schema import Message
from pipeline.errors import ArtifactError

SECONDS = 5.0
"""Time for one rendering, the start of the process not included."""
START_SECONDS = 60.0
PROGRAM = Path(__file__).with_name("sandbox.py")
INHERITED = ("LD_LIBRARY_PATH", "PATH")
"""Environment variables that the process is given: no tokens, no keys."""

_OTHER = "use another chat template, or data whose turns this one takes"
_SIMPLER = "a chat template needs no more than loops over the turns; use another"
_FIXED = "write it out in a copy of the template, and give that file as `chat_template` of the sft stage"


@dataclass(frozen=True)
class Rendered:
    """What a template wrote."""

    text: str
    spans: tuple[tuple[int, int], ...] | None
    """First character and end of each `{% generation %}` block; None when the template has no such block."""


def render(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str], *, prompt: bool = False
) -> Rendered:
    """Render a chat template.

    Args:
        template: Its text.
        messages: The conversation.
        special_tokens: Variables such as `bos_token`.
        prompt: Whether it shall end with the assistant's header.

    Raises:
        ArtifactError: The template is broken, refuses these turns, fails, asks for the date or for chance, writes what
            is neither text nor number, or takes more than 5 s, 512 MB of memory or 1 MB of text.
    """
    variables = {
        **special_tokens,
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": prompt,
        # Templates that can open a turn with thinking would prompt with it but not train on it.
        "enable_thinking": False,
    }
    found = _sandbox.ask({"template": template, "variables": variables, "seconds": SECONDS})
    if "error" in found:
        roles = ", ".join(message.role for message in messages)
        raise _failure(found["error"], found.get("reason", ""), roles)
    spans = found["spans"]
    return Rendered(found["text"], None if spans is None else tuple((start, end) for start, end in spans))


def _failure(kind: str, reason: str, roles: str) -> ArtifactError:
    what, hint = {
        "changing": (f"the chat template depends on {cut(reason)}", _FIXED),
        "large": ("the chat template writes more than 1 MB for a short conversation", _SIMPLER),
        "memory": ("the chat template takes more than 512 MB of memory", _SIMPLER),
        "late": (f"the chat template takes more than {SECONDS:g} s for a short conversation", _SIMPLER),
        "absent": ("the process that renders chat templates does not start", "`pip check`: it needs jinja2 >= 3.1.6"),
        "dead": ("the chat template ended the process that rendered it", _SIMPLER),
        "syntax": (f"the chat template is broken: {cut(reason)}", "correct the template, or use another"),
        "failure": (f"the chat template refuses the turns {roles}: {shown(reason)}", _OTHER),
    }[kind]
    return ArtifactError(what, hint=hint)


class _Sandbox:
    """The process, if it runs. Safe to use from several threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer. A process that gave none is ended."""
        with self._lock:
            try:
                if self._process is not None and self._process.poll() is not None:
                    self.forget()  # somebody ended it while nothing was asked of it, which is no template's doing
                if self._process is None and not self._start():
                    return {"error": "absent"}
                assert self._process is not None
                _write(self._process, json.dumps(request).encode() + b"\n")
                answer: dict[str, Any] = json.loads(_read_line(self._process, request["seconds"]))
            except TimeoutError:
                self.end()
                return {"error": "late"}
            except (EOFError, BrokenPipeError):
                self.end()
                return {"error": "dead"}
            except BaseException:
                # A signal's exception: the answer still to come would be taken for the next request's.
                self.end()
                raise
            return answer

    def _start(self) -> bool:
        """Start the process; whether it says that it is ready."""
        self._process = _start()
        try:
            _read_line(self._process, START_SECONDS)
        except (TimeoutError, EOFError):
            self.end()
            return False
        return True

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.forget()

    def forget(self) -> None:
        """Let go of the process: of what is left of it, or, in a fork, of what is another's child."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process.poll()
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return subprocess.Popen(
        # It finds jinja2 where this process would, without the start-up code of `site`.
        [sys.executable, "-P", "-S", "-s", "-B", PROGRAM],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        process_group=0,  # an interrupt from the keyboard is for those who wait for an answer
    )


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    rest = memoryview(line)
    while rest:
        rest = rest[process.stdin.write(rest) :]


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """A line of the process's output; TimeoutError when it is late, EOFError when there will be none."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    line = bytearray()
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = process.stdout.read(2**16)
        if not part:
            raise EOFError
        line += part
    return bytes(line)


_sandbox = _Sandbox()


def _end() -> None:
    _sandbox.end()


def _after_fork() -> None:
    global _sandbox
    _sandbox.forget()
    # The old one's lock may be held by a thread that the fork does not have.
    _sandbox = _Sandbox()


atexit.register(_end)
os.register_at_fork(after_in_child=_after_fork)
