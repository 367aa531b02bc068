"""Stand-ins on 127.0.0.1 for a W&B server that is of no use: what a run meets when the network or the service fails."""

import contextlib
import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

KINDS = ("500", "silence", "refusal", "death")
"""Answers 500; takes connections and says nothing; is not there; takes the run, then says nothing more."""


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """Answers everything with 500."""

    def answer(self) -> None:
        """Read the request, since an unread one would look like a broken connection."""
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: Any) -> None:
        """Say nothing on stderr."""


class DyingServer(FaultyServer):
    """Takes a run as W&B does; once metrics come it says nothing more, until it is shut down."""

    dead = threading.Event()
    over = threading.Event()

    def answer(self) -> None:
        """What wandb asks before it calls a run its own, then silence."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "file_stream" in self.path:
            self.dead.set()
        if self.dead.is_set():
            self.close_connection = True
            self.over.wait()
            return
        answer = json.dumps({"data": _taken(body) if "graphql" in self.path else {}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = answer


def _taken(body: bytes) -> dict[str, Any]:
    """The answer to a GraphQL question about a new run."""
    asked = json.loads(body)
    query, name = asked.get("query", ""), asked.get("variables", {}).get("name", "run")
    place = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
    if "upsertBucket" in query:
        bucket = {"id": "B", "name": name, "displayName": "run", "config": "{}", "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**bucket, "sweepName": None, "project": place}, "inserted": True}}
    return {"model": {**place, "bucket": None}} if "RunResumeStatus" in query else {}


@contextlib.contextmanager
def dead_server(kind: str) -> Iterator[str]:
    """The address of a server of one of `KINDS`, for as long as the block lasts."""
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


def pointed_at(server: str) -> dict[str, str]:
    """This process's environment with wandb sent to `server` and nowhere else."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**kept, "WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}
