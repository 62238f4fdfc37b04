"""Reward servers on this machine that answer as a test tells them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


class Scripted(HTTPServer):
    """Gives one answer after another, the last of them for ever, and remembers what it was sent."""

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        """Address of its rewards."""
        return f"http://127.0.0.1:{self.server_port}/rewards"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        server = self.server
        server.headers.append({name.lower(): value for name, value in self.headers.items()})
        server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        answer(self)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def serving(*answers: Answer) -> Iterator[Scripted]:
    """A server in a thread of its own."""
    with Scripted(list(answers)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def lengths(handler: BaseHTTPRequestHandler) -> None:
    """Each response's length, as the protocol wants it."""
    rows = handler.server.bodies[-1]["rows"]  # type: ignore[attr-defined]
    says(json.dumps({"rewards": [len(row["response"]) for row in rows]}))(handler)


def says(body: str, status: int = 200, reason: str | None = None, **headers: str) -> Answer:
    """A whole answer of this text."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status, reason)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


def drips(raw: bytes, pause: float) -> Answer:
    """Raw bytes, a pause after each."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        for byte in raw:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(pause)

    return answer
