"""A workspace with audio and two adapters for nano, made without training."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.audio import tone, write_clip
from helpers.nano_adapters import write_lora_adapters
from sa3train.studio.play.player import Player
from sa3train.studio.server.jobs import Job
from sa3train.studio.server.workspace import Workspace


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small lora adapters for nano: one.safetensors and two.safetensors."""
    folder = tmp_path_factory.mktemp("shelf")
    write_lora_adapters(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, shelf: Path) -> Workspace:
    """A workspace of its own: adapters/one, adapters/two, audio/tone.wav of 2 s."""
    root = tmp_path / "root"
    shutil.copytree(shelf, root / "adapters")
    write_clip(root / "audio" / "tone.wav", tone(2.0))
    return Workspace.create(tmp_path / "studio", [root], device="cpu")


@pytest.fixture(scope="session")
def players() -> dict[str, Player]:
    """Players by name, so that nano is loaded once."""
    return {}


@pytest.fixture
def player(workspace: Workspace, players: dict[str, Player]) -> Player:
    """A player in `workspace`, with the models that earlier tests loaded."""
    known = players.setdefault("known", Player(workspace))
    known.workspace = workspace
    return known


@pytest.fixture
def job() -> Job:
    """A job that nobody cancels."""
    return Job("test", lambda job: None, state="running")


@pytest.fixture
def latents(workspace: Workspace) -> Path:
    folder = workspace.folder / "latents"
    folder.mkdir()
    counts = {name: {"clips": clips, "frames": 64, "seconds": 6.0} for name, clips in (("train", 4), ("heldout", 2))}
    shards = [
        {"file": f"{name}-000-00000.tar", "listing": f"{name}-000-00000.jsonl", "split": name, **count}
        | {"bytes": 1, "sha256": "x"}
        for name, count in counts.items()
    ]
    model = {"name": "nano", "fingerprint": "f", "sample_rate": 44100, "downsampling_ratio": 4096}
    index = {
        "format": "sa3train-latents", "version": 2, "model": model, "shards": shards, "manifest": "m",
        "splits": counts, "rejected": 1,
        "clips": 6, "frames": 128, "seconds": 12.0,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder
