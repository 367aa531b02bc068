"""Names resolve through huggingface_hub's cache, then download; whatever the hub answers is said with a way on."""

import hashlib
import http.server
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, file_download
from huggingface_hub.utils import httpx

from helpers.golden import PLAIN
from sa3train.core.errors import CheckpointError
from sa3train.models import hub as hub_module
from sa3train.models.checkpoint import load_autoencoder, load_checkpoint
from sa3train.models.config import TextConfig
from sa3train.models.hub import (
    REGISTRY,
    CheckpointFiles,
    check_checkpoint,
    choose_weights,
    find_checkpoint,
    list_cached_names,
    locate_checkpoint,
)
from sa3train.models.text_source import find_text_encoder

RESPONSE, MISSING, BUSY = (
    httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x")) for status in (403, 404, 503)
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """An empty cache and a hub that answers every download with one error."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)

    def answer(error: Exception) -> None:
        def download(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return answer


ANSWERS: list[tuple[Exception, list[str]]] = [
    (
        errors.GatedRepoError("no", response=RESPONSE),
        [
            "is gated",
            "https://huggingface.co/stabilityai/stable-audio-3-medium",
            "hf auth login",
            "HF_TOKEN",
            "folder",
            "medium@mlx as the model's name (or --weights mlx, weights=mlx",
        ],
    ),
    (errors.RepositoryNotFoundError("no", response=RESPONSE), ["does not show", "private or gated", "hf auth login"]),
    (errors.RemoteEntryNotFoundError("no", response=MISSING), ["has no model_config.json", "local folder"]),
    (
        errors.LocalEntryNotFoundError("no"),
        ["cannot be reached", "local folder", "at hand without the hub: nano, nano-base"],
    ),
    (errors.OfflineModeIsEnabled("no"), ["cannot be reached", "nano, nano-base"]),
    (httpx.ConnectError("no"), ["cannot be reached", "nano, nano-base"]),
    (errors.HfHubHTTPError("busy", response=BUSY), ["failed: busy", "run the same command again", "nano, nano-base"]),
    (OSError(28, "No space left on device"), ["No space left on device", "disk space"]),
    (UnicodeEncodeError("ascii", "hf_\u201c", 3, 4, "no"), ["the token may be wrong", "hf auth login"]),
    (ValueError("\u2026 is no token"), ["failed: \u2026 is no token"]),
    (RuntimeError("Data processing error"), ["failed: Data processing error"]),
]


@pytest.mark.parametrize(("error", "parts"), ANSWERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("load", [load_checkpoint, load_autoencoder])
def test_hub_answers(hub: Callable[[Exception], None], load: Any, error: Exception, parts: list[str]) -> None:
    hub(error)
    with pytest.raises(CheckpointError) as caught:
        load("medium")
    for part in parts:
        assert part in str(caught.value)


def test_names_and_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        return str(PLAIN / filename)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = load_checkpoint("small-sfx-base", parts=("dit",))
    repo_id = "stabilityai/stable-audio-3-small-sfx-base"
    assert asked == [(repo_id, "model_config.json"), (repo_id, "model.safetensors")]
    assert (model.name, model.sibling) == ("small-sfx-base", "small-sfx")
    assert locate_checkpoint(repo_id).name == "small-sfx-base"
    assert find_checkpoint("stabilityai/SAME-L") is REGISTRY["same-l"]


def test_an_autoencoders_name_is_refused_before_any_download() -> None:
    with pytest.raises(CheckpointError, match="same-l is a stand-alone autoencoder"):
        load_checkpoint("same-l")


def test_the_cache_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(PLAIN / name))
    assert locate_checkpoint("medium").folder == PLAIN
    assert list_cached_names() == [*REGISTRY, *(f"{info.name}@mlx" for info in REGISTRY.values() if info.packs)]
    assert locate_checkpoint("medium@mlx").pack == PLAIN / "MLX" / "dit_medium_f16.npz"


def test_packs_are_found_by_name_and_never_silently() -> None:
    for name, files in (
        ("small-music-base", ("dit_sm-music-base", "same_s_encoder", "same_s_decoder", "t5gemma")),
        ("medium", ("dit_medium", "same_l_encoder", "same_l_decoder", "t5gemma")),
    ):
        stems = [Path(file).name.rpartition("_")[0] for file in REGISTRY[name].packs]
        assert tuple(stems) == files
        assert choose_weights(name, "mlx") == choose_weights(f"{name}@mlx", "mlx") == f"{name}@mlx"
        assert choose_weights(name, None) == choose_weights(name, "released") == name
        assert find_checkpoint(f"{name}@mlx") is REGISTRY[name]
    for name in ("nano", "same-s", "folder"):
        assert find_checkpoint(f"{name}@mlx") is None
        with pytest.raises(CheckpointError, match=f"no packs of {name} for --weights mlx"):
            choose_weights(name, "mlx")


def test_every_sibling_is_mutual() -> None:
    for entry in REGISTRY.values():
        if entry.sibling is not None:
            assert REGISTRY[entry.sibling].sibling == entry.name
            assert entry.name.removesuffix("-base") == entry.sibling.removesuffix("-base")
    assert REGISTRY["same-s"].sibling is None
    assert REGISTRY["medium"].page == "https://huggingface.co/stabilityai/stable-audio-3-medium"
    assert REGISTRY["nano"].page is None


def text_folder(path: Path) -> Path:
    return Path(shutil.copytree(PLAIN / "t5gemma", path))


def test_the_text_encoder_is_looked_for_beside_the_checkpoint_first(tmp_path: Path) -> None:
    config = TextConfig(repo_id="stabilityai/stable-audio-3-medium", subfolder="t5gemma-b-b-ul2")
    beside = text_folder(tmp_path / "t5gemma-b-b-ul2")
    assert find_text_encoder(CheckpointFiles("x", tmp_path), config).folder() == beside


def test_then_in_its_own_repository_then_in_the_one_it_names(
    tmp_path: Path, hub: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        if repo_id.endswith("-base"):
            raise errors.LocalEntryNotFoundError("no")
        text_folder(tmp_path / "hub" / "t5gemma-b-b-ul2")
        return str(tmp_path / "hub")

    hub(OSError("unused"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = TextConfig(repo_id="stabilityai/stable-audio-3-medium", subfolder="t5gemma-b-b-ul2")
    source = find_text_encoder(CheckpointFiles("medium-base", tmp_path, REGISTRY["medium-base"]), config)
    assert source.folder() == tmp_path / "hub" / "t5gemma-b-b-ul2"
    assert asked == [
        ("stabilityai/stable-audio-3-medium-base", ["t5gemma-b-b-ul2/*"]),
        ("stabilityai/stable-audio-3-medium", ["t5gemma-b-b-ul2/*"]),
    ]


def test_a_cached_snapshot_serves_without_a_network(
    tmp_path: Path, hub: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshot"
    cached = text_folder(snapshot / "t5")
    hub(errors.OfflineModeIsEnabled("no"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(snapshot / name))
    config = TextConfig(repo_id="stabilityai/stable-audio-3-medium", subfolder="t5")
    assert find_text_encoder(CheckpointFiles("x", tmp_path), config).folder() == cached
    shutil.rmtree(cached)
    with pytest.raises(CheckpointError, match="cannot be reached"):
        find_text_encoder(CheckpointFiles("x", tmp_path), config).folder()


FILES = {
    "model_config.json": b"{}",
    "model.safetensors": b"w" * 50_000,
    "t5/config.json": b"{}",
    "t5/model.safetensors": b"t" * 10_000,
    "t5/tokenizer.json": b"{}",
}
URL = "/{repo_id}/resolve/{revision}/{filename}"
REPO = "stabilityai/stable-audio-3-medium"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that fails in the way that `faults` names for a request's method and file."""

    protocol_version = "HTTP/1.1"
    faults: dict[tuple[str, str], str]
    asked: list[tuple[str, str]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        if self.path.startswith("/api/"):
            listing = [{"rfilename": name, "path": name, "type": "file", "size": 1, "oid": "0"} for name in FILES]
            return self.send(
                json.dumps(listing if "/tree/" in self.path else {"id": REPO, "sha": "a" * 40, "siblings": listing})
            )
        name = self.path.partition("/resolve/main/")[2] or self.path.partition(f"/resolve/{'a' * 40}/")[2]
        self.asked.append((self.command, name))
        fault, content = self.faults.get((self.command, name), ""), FILES[name]
        if fault.isdigit():
            self.send_response(int(fault))
            for header in {"403": [("X-Error-Code", "GatedRepo")], "429": [("Retry-After", "3600")]}.get(fault, []):
                self.send_header(*header)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "stall":
            self.server.stopped.wait(20)  # type: ignore[attr-defined]
            self.close_connection = True
        else:
            self.send_file(fault, content)
        return None

    def send_file(self, fault: str, content: bytes) -> None:
        etag = hashlib.sha256(content if fault != "other content" else b"x").hexdigest()
        length = len(content) * 2 if fault == "longer" else len(content)
        facts = {"X-Repo-Commit": "a" * 40, "ETag": f'"{etag}"', "Content-Length": str(length)}
        for missing in {"no commit": ["X-Repo-Commit"], "no etag": ["ETag"]}.get(fault, []):
            del facts[missing]
        self.send_response(200)
        for header in facts.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content if fault not in ("cut", "reset", "stalls later") else content[:1])
        self.wfile.flush()
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "stalls later":
            self.server.stopped.wait(20)  # type: ignore[attr-defined]
        self.close_connection = fault in ("cut", "reset", "stalls later")

    def send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, an empty cache, and short waits."""
    handler = type("LoopbackHub", (Hub,), {"faults": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.stopped = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + URL)
    for name, value in {
        "CACHE": str(tmp_path),
        "OFFLINE": False,
        "ETAG_TIMEOUT": 0.3,
        "DOWNLOAD_TIMEOUT": 0.1,
        "DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, f"HF_HUB_{name}", value)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    yield handler
    server.stopped.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


FAULTS: list[tuple[str, str, str, str]] = [
    ("HEAD", "model_config.json", "401", "token may be wrong"),
    ("HEAD", "model_config.json", "403", "is gated: accept its license"),
    ("HEAD", "model_config.json", "404", "has no model_config.json"),
    ("HEAD", "model_config.json", "429", "too many requests.*run the same command again"),
    ("HEAD", "model_config.json", "500", "500.*run the same command again"),
    ("HEAD", "model_config.json", "close", "model_config.json of .* failed: .*disconnected"),
    ("HEAD", "model_config.json", "stall", "model_config.json of .* failed: timed out"),
    ("HEAD", "model_config.json", "no etag", "no|ETag"),
    ("HEAD", "model_config.json", "no commit", "X-Repo-Commit"),
    ("GET", "model.safetensors", "401", "token may be wrong"),
    ("GET", "model.safetensors", "500", "model.safetensors of .* failed: .*500"),
    ("GET", "model.safetensors", "close", "failed: .*disconnected"),
    ("GET", "model.safetensors", "cut", "failed: .*closed connection"),
    ("GET", "model.safetensors", "reset", "failed: .*reset"),
    ("GET", "model.safetensors", "stall", "failed: timed out"),
    ("GET", "model.safetensors", "stalls later", "failed: timed out"),
    ("HEAD", "model.safetensors", "longer", "failed: .*should be of size 100000 but has size 50000"),
    ("GET", "model.safetensors", "longer", "failed: "),
    ("HEAD", "model.safetensors", "other content", "model.safetensors of .* arrived damaged"),
]


@pytest.mark.parametrize(("method", "file", "fault", "message"), FAULTS)
def test_a_download_that_fails_is_one_message_and_the_next_one_goes_on(
    loopback: type[Hub], method: str, file: str, fault: str, message: str
) -> None:
    loopback.faults[method, file] = fault
    with pytest.raises(CheckpointError, match=message):
        locate_checkpoint("medium")
    assert loopback.asked.count(("HEAD", "model_config.json")) <= 3, "no long repetition of the first request"
    loopback.faults.clear()
    loopback.asked.clear()
    files = locate_checkpoint("medium")
    assert {path.name: path.read_bytes() for path in (files.config, files.weights)} == {
        name: FILES[name] for name in ("model_config.json", "model.safetensors")
    }
    kept = file == "model.safetensors"
    assert (("GET", "model_config.json") not in loopback.asked) == kept, "complete files are kept"


@pytest.mark.parametrize("fault", ["cut", "reset", "stalls later", "500"])
def test_the_text_encoder_is_downloaded_as_a_folder(loopback: type[Hub], tmp_path: Path, fault: str) -> None:
    source = find_text_encoder(CheckpointFiles("x", tmp_path / "none"), TextConfig(repo_id=REPO, subfolder="t5"))
    loopback.faults["GET", "t5/model.safetensors"] = fault
    with pytest.raises(CheckpointError, match=r"t5/\* of .* failed: "):
        source.folder()
    loopback.faults.clear()
    assert (source.folder() / "model.safetensors").read_bytes() == FILES["t5/model.safetensors"]


def test_packs_are_downloaded_without_an_account_and_with_their_license(
    loopback: type[Hub], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub_module._state_license.cache_clear()
    files = REGISTRY["medium"].packs
    for name in files:
        monkeypatch.setitem(FILES, name, name.encode())
    with caplog.at_level("INFO"):
        check_checkpoint("medium@mlx")
        assert loopback.asked == [("HEAD", files[0])]
        found = locate_checkpoint("medium@mlx")
    assert caplog.text.count("Stability AI Community License (https://stability.ai/license") == 1
    assert found.pack == found.folder / "dit_medium_f16.npz"
    assert all((found.folder / Path(name).name).read_bytes() == name.encode() for name in files)
    assert "medium@mlx" in list_cached_names()


def test_a_repository_of_a_pipeline_is_downloaded_once(loopback: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("transformer/a.safetensors", "vae/a.safetensors", "duration_embedder/a.safetensors")
    files = ("model_index.json", *parts, "text_encoder/a.safetensors", "tokenizer/tokenizer.json", "scheduler/a.json")
    for name in (*files, "transformer/a.bin"):
        monkeypatch.setitem(FILES, name, name.encode())
    loopback.faults["GET", "vae/a.safetensors"] = "500"
    with pytest.raises(CheckpointError, match=r"no model called 'someone/tuned'.* As a repository of the hub: .*500"):
        locate_checkpoint("someone/tuned")
    loopback.faults.clear()
    found = locate_checkpoint("someone/tuned")
    assert (found.name, found.is_pipeline) == ("someone/tuned", True)
    assert all((found.folder / name).is_file() for name in files)
    assert not (found.folder / "transformer" / "a.bin").exists()
    loopback.asked.clear()
    assert locate_checkpoint("someone/tuned") == found
    assert loopback.asked == []


def test_without_a_network_the_models_at_hand_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + URL)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("would try six times"))
    with pytest.raises(CheckpointError, match="cannot be reached .*at hand without the hub: nano, nano-base"):
        locate_checkpoint("medium")
