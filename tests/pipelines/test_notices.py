from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipelines.orchestration import notices


class Mailbox:
    """A server on loopback that keeps the messages it receives."""

    def __init__(self, status: int = 200) -> None:
        self.messages: list[dict[str, str]] = []
        box = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                box.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://user:hunter2@127.0.0.1:{self.server.server_port}/path"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    box = Mailbox()
    yield box
    box.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / ".flowmatch"))
    return tmp_path


def test_a_failure_and_the_recovery_after_it_are_told_once(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHOM", mailbox.url)
    notices.report(["WHOM"], "smoke", None, "http://x")
    assert mailbox.messages == []
    notices.report(["WHOM"], "smoke", "side failed: no space", "http://x")
    notices.report(["WHOM"], "default", None, "http://x")  # another profile, which did not fail
    notices.report(["WHOM"], "smoke", None, "http://x")
    notices.report(["WHOM"], "smoke", None, "http://x")
    assert [(message["title"], message["message"]) for message in mailbox.messages] == [
        ("flowmatch smoke failed", "side failed: no space\nhttp://x"),
        ("flowmatch smoke works again", "every stage is up to date.\nhttp://x"),
    ]


def test_a_notice_that_cannot_be_sent_is_one_line_without_the_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = Mailbox(status=500)
    monkeypatch.setenv("SILENT", "json://user:hunter2@127.0.0.1:9/path")
    monkeypatch.setenv("REFUSING", refusing.url)
    monkeypatch.setenv("NO_ADDRESS", "nonsense://hunter2")
    notices.report(["SILENT", "REFUSING", "NO_ADDRESS", "UNSET"], "smoke", "side failed", "http://x")
    refusing.close()
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "notice: not sent to $SILENT (the service did not accept it).",
        "notice: not sent to $REFUSING (the service did not accept it).",
        "notice: not sent to $NO_ADDRESS (its value is no address of Apprise).",
        "notice: not sent to $UNSET (the variable is not set).",
    ]
