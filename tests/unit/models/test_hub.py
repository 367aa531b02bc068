"""Names resolve through huggingface_hub's cache, then download; whatever the hub answers is said with its remedy."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from helpers.golden import PLAIN
from sa3train.core.errors import CheckpointError
from sa3train.models.checkpoint import load_autoencoder, load_checkpoint
from sa3train.models.config import TextConfig
from sa3train.models.hub import (
    REGISTRY,
    CheckpointFiles,
    find_checkpoint,
    find_text_encoder,
    list_cached_names,
    locate_checkpoint,
)

RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """An empty cache and a hub that answers every download with one error."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)

    def answer(error: Exception) -> None:
        def download(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return answer


ANSWERS: list[tuple[Exception, list[str]]] = [
    (
        errors.GatedRepoError("no", response=RESPONSE),
        ["is gated", "https://huggingface.co/stabilityai/stable-audio-3-medium", "hf auth login", "HF_TOKEN", "folder"],
    ),
    (errors.RepositoryNotFoundError("no", response=RESPONSE), ["does not show", "private or gated", "hf auth login"]),
    (errors.RemoteEntryNotFoundError("no", response=RESPONSE), ["has no model_config.json", "local folder"]),
    (errors.LocalEntryNotFoundError("no"), ["cannot be reached", "local folder", "Available offline: nano, nano-base"]),
    (errors.OfflineModeIsEnabled("no"), ["cannot be reached (HF_HUB_OFFLINE is set)", "nano, nano-base"]),
    (httpx.ConnectError("no"), ["cannot be reached", "nano, nano-base"]),
    (errors.HfHubHTTPError("busy", response=RESPONSE), ["failed: busy", "Try again later"]),
    (OSError(28, "No space left on device"), ["No space left on device", "disk space"]),
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
    assert list_cached_names() == list(REGISTRY)


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
