"""Latent shards without an autoencoder, for the reading side; a tiny autoencoder and folders of clips, for encoding."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.golden import GOLDEN
from sa3train.data.encode.encoder import Encoder
from sa3train.models.checkpoint import load_autoencoder


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The autoencoder of the small recorded checkpoint."""
    return Encoder(load_autoencoder(GOLDEN / "plain"), "tests/golden/plain")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()
