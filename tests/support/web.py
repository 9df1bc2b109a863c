"""A web server on the loopback interface that misbehaves as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Script:
    """What the server does, and what it was asked."""

    content: bytes
    stops: list[int] = field(default_factory=list)  # bytes after which it closes the connection, by request
    ranges: bool = True
    announced: int | None = None
    start: int | None = None  # where it says that a part begins
    version: str | None = '"one"'
    asked: list[str | None] = field(default_factory=list)


def without_proxies(patch: pytest.MonkeyPatch) -> None:
    """Reach the loopback interface directly."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelled in (name, name.upper()):
            patch.delenv(spelled, raising=False)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Yield the address of a server that sends the content of a script for any path but a few."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.startswith("/redirect/"):
                self._head(302, Location=self.path.removeprefix("/redirect"))
            elif self.path == "/loop":
                self._head(302, Location="/loop")
            elif self.path == "/missing":
                self._head(404)
            else:
                self._send()

        def _send(self) -> None:
            whole, asked = script.content, self.headers.get("Range")
            script.asked.append(asked)
            same = self.headers.get("If-Range") in (None, script.version)
            first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and script.ranges and same else None
            names = {} if script.version is None else {"ETag": script.version}
            if first is not None and first >= len(whole):
                self._head(416, **{"Content-Range": f"bytes */{len(whole)}"})
                return
            body = whole[first or 0 :]
            if first is not None:
                names["Content-Range"] = f"bytes {script.start or first}-{len(whole) - 1}/{len(whole)}"
            length = script.announced or len(body)
            self._head(200 if first is None else 206, **{"Content-Length": str(length)}, **names)
            self.wfile.write(body[: script.stops.pop(0) if script.stops else length])
            self.close_connection = True

        def _head(self, status: int, **names: str) -> None:
            self.send_response(status)
            for name, value in names.items():
                self.send_header(name, value)
            self.end_headers()

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
