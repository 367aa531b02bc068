"""The server is closed by default, and lets through what it should."""

import os
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sa3train.cli.studio import build_parser, main
from sa3train.core.errors import AudioError, SA3Error
from sa3train.studio.app import run_studio
from sa3train.studio.server import playable
from sa3train.studio.server.access import LOCAL_NAMES, AccessMiddleware, AccessSettings
from sa3train.studio.server.workspace import StudioError, Workspace


@pytest.mark.parametrize(
    "access", [AccessSettings(host="0.0.0.0"), AccessSettings(share=True), AccessSettings(host="10.0.0.2", password="")]
)
def test_an_open_server_needs_a_password(access: AccessSettings) -> None:
    with pytest.raises(StudioError, match="needs a password"):
        access.check()


def test_a_short_password_is_none() -> None:
    with pytest.raises(StudioError, match="too short"):
        AccessSettings(host="0.0.0.0", password="1234").check()


def test_closed_and_guarded_servers_are_fine() -> None:
    AccessSettings().check()
    for port in (0, -1, 65536):
        with pytest.raises(StudioError, match=f"port={port}"):
            AccessSettings(port=port).check()
    AccessSettings(host="localhost").check()
    AccessSettings(host="0.0.0.0", password="long enough").check()


@pytest.mark.parametrize("host", ["nohost.invalid", "a..b", "::1", "http://127.0.0.1", "192.0.2.1"])
def test_an_address_where_nothing_can_listen_is_refused_at_once(host: str) -> None:
    with pytest.raises(StudioError, match="--host|host="):
        AccessSettings(host=host, password="long enough").check()


@pytest.mark.parametrize("choice", [{"model": "nope"}, {"model": "same-s"}, {"device": "foo"}, {"device": "cuda:99"}])
def test_a_model_or_device_that_does_not_exist_is_refused_at_the_start(tmp_path: Path, choice: dict[str, str]) -> None:
    with pytest.raises(SA3Error, match=next(iter(choice.values()))):
        Workspace.create(tmp_path / "studio", [tmp_path], **choice)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_before_it_loads_anything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SA3_STUDIO_PASSWORD", raising=False)
    monkeypatch.setitem(sys.modules, "sa3train.studio.app", None)  # importing the page would fail
    assert main([str(tmp_path), "--host", "0.0.0.0"]) == 1
    assert "needs a password" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_the_command_starts_closed_on_nano() -> None:
    arguments = build_parser().parse_args([])
    assert (arguments.host, arguments.share, arguments.password) == ("127.0.0.1", False, None)
    assert (arguments.model, arguments.folders) == ("nano", ["."])


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.url.path)

    (tmp_path / "folder").mkdir()
    app = Starlette(routes=[Route("/{path:path}", answer)])
    guarded = AccessMiddleware(app, Workspace.create(tmp_path / "studio", [tmp_path / "folder"]), LOCAL_NAMES)
    return TestClient(guarded, base_url="http://127.0.0.1:7860")


def test_files_of_the_folders_are_served_apart_from_the_page(client: TestClient, tmp_path: Path) -> None:
    answer = client.get(f"/gradio_api/file={tmp_path}/folder/a.html")
    assert answer.status_code == 200
    assert "sandbox" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(("name", "subtype"), [("ä.AIFF", "PCM_24"), ("a.caf", "FLOAT"), ("a.wav", "DOUBLE")])
def test_audio_that_browsers_do_not_play_is_served_as_wav(
    client: TestClient, tmp_path: Path, name: str, subtype: str
) -> None:
    audio, file = np.full((400, 2), 0.25), tmp_path / "folder" / name
    soundfile.write(file, audio, 22050, subtype)
    served = client.get(f"/gradio_api/file={file}").text.partition("/gradio_api/file=")[2]
    assert soundfile.info(served).format == "WAV" and Path(served).is_relative_to(tmp_path / "studio")
    assert soundfile.info(served).subtype == "PCM_16"
    assert np.allclose(soundfile.read(served)[0], audio, atol=1e-4)
    assert client.get(f"/gradio_api/file={file}").text.endswith(served), "converted once"


def test_nothing_is_converted_for_those_without_the_password(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    workspace, file = Workspace.create(tmp_path / "studio", [tmp_path / "folder"]), tmp_path / "folder" / "a.aiff"
    soundfile.write(file, np.full((400, 2), 0.25), 22050)
    with run_studio(workspace, AccessSettings(password="long enough")) as address, httpx.Client() as visitor:
        url = f"{address}gradio_api/file={file}"
        assert visitor.get(url).status_code == 401
        assert not list(workspace.home.glob("players/*"))
        visitor.post(f"{address}login", data={"username": "me", "password": "long enough"}).raise_for_status()
        for part in ({}, {"range": "bytes=0-3"}):
            assert visitor.get(url, headers=part).content[:4] == b"RIFF"
        assert len(list(workspace.home.glob("players/*.wav"))) == 1


def test_long_audio_is_converted_in_parts_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    workspace, file = Workspace.create(tmp_path / "studio", [tmp_path / "folder"]), tmp_path / "folder" / "a.aiff"
    audio, read, sizes = np.random.default_rng(0).uniform(-1, 1, (1000, 2)), soundfile.SoundFile.read, list[int]()
    soundfile.write(file, audio, 22050)

    def note(self: soundfile.SoundFile, frames: int = -1, *more: Any, **named: Any) -> Any:
        sizes.append(frames)
        return read(self, frames, *more, **named)

    monkeypatch.setattr(soundfile.SoundFile, "read", note)
    monkeypatch.setattr(playable, "BLOCK", 256)
    found = playable.convert_audio(workspace, file)
    assert set(sizes) == {128} and np.allclose(soundfile.read(found)[0], audio, atol=1e-4)
    found.unlink()
    monkeypatch.setattr(playable, "LARGEST_WAV", 3999)
    with pytest.raises(AudioError, match="too long"):
        playable.convert_audio(workspace, file)


@pytest.mark.parametrize("content", [b"", b"RIFF"])
@pytest.mark.parametrize("name", ["a.aiff", "a.wav", "a.txt"])
def test_other_files_are_served_as_they_are(client: TestClient, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "folder" / name).write_bytes(content)
    assert client.get(f"/gradio_api/file={tmp_path}/folder/{name}").text.endswith(f"folder/{name}")


def test_few_converted_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    workspace = Workspace.create(tmp_path / "studio", [tmp_path / "folder"])
    monkeypatch.setattr(playable, "KEPT", 2)
    made = []
    for number in range(3):
        soundfile.write(tmp_path / "folder" / f"{number}.aiff", np.full((400, 2), 0.25), 22050)
        made.append(playable.convert_audio(workspace, tmp_path / "folder" / f"{number}.aiff"))
        os.utime(made[-1], (number, number))
    assert [file.exists() for file in made] == [False, True, True]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "{root}/../x", "{root}/.env", "http://example.org/x", "{root}/%2e%2e/x"]
)
def test_other_files_are_not(client: TestClient, tmp_path: Path, path: str) -> None:
    asked = path.replace("{root}", f"{tmp_path}/folder")
    assert client.get(f"/gradio_api/file={asked}").status_code in (403, 404)


def test_only_its_own_names_are_answered(client: TestClient) -> None:
    assert client.get("/", headers={"host": "localhost:7860"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/", headers={"host": "localhost.evil.example:7860"}).status_code == 421


def test_other_pages_may_start_nothing(client: TestClient) -> None:
    assert client.post("/", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post("/", headers={"origin": "null"}).status_code == 403
    assert client.post("/", headers={"origin": "http://127.0.0.1:7860"}).status_code != 403


def test_pages_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
