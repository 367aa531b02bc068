"""W&B servers on 127.0.0.1 that fail, and an environment in which runs go to one of them."""

import contextlib
import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """A server that answers every request with 500."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))  # unread, it looks like a broken connection
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: Any) -> None: ...


class DyingServer(FaultyServer):
    """A server that accepts a run as W&B does, and stops answering when metrics arrive."""

    dead = threading.Event()
    over = threading.Event()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "file_stream" in self.path:
            self.dead.set()
        if self.dead.is_set():
            self.close_connection = True
            self.over.wait()
            return
        answer = json.dumps({"data": _answer_graphql(body) if "graphql" in self.path else {}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = answer


def _answer_graphql(body: bytes) -> dict[str, Any]:
    """Answer a query about a new run."""
    asked = json.loads(body)
    query, name = asked.get("query", ""), asked.get("variables", {}).get("name", "run")
    project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
    if "upsertBucket" in query:
        bucket = {"id": "B", "name": name, "displayName": "run", "config": "{}", "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**bucket, "sweepName": None, "project": project}, "inserted": True}}
    return {"model": {**project, "bucket": None}} if "RunResumeStatus" in query else {}


@contextlib.contextmanager
def use_faulty_server(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send W&B runs to a server that answers "500", keeps "silence", refuses connections ("refusal"), or stops
    answering after the run's start ("death").
    """
    with _run_server(kind) as address:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in (("BASE_URL", address), ("API_KEY", "a" * 40), ("ERROR_REPORTING", "false")):
            monkeypatch.setenv(f"WANDB_{name}", value)
        yield


@contextlib.contextmanager
def _run_server(kind: str) -> Iterator[str]:
    handlers = {"500": FaultyServer, "death": DyingServer}
    if kind in handlers:
        DyingServer.dead.clear()
        DyingServer.over.clear()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handlers[kind])
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            DyingServer.over.set()
            server.shutdown()
            server.server_close()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        if kind == "silence":
            listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
