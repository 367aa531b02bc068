"""A workplace with audio and two adapters for nano, made without training."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.audio import tone, write_clip
from sa3train.adapters.adapter import Adapter, architecture_of
from sa3train.adapters.formats.io import save_adapter
from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.adapters.spec import AdapterSpec
from sa3train.models.checkpoint import load_checkpoint
from sa3train.studio.play.player import Player
from sa3train.studio.server.jobs import Job
from sa3train.studio.server.workspace import Workspace


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small lora adapters for nano: one.safetensors and two.safetensors."""
    folder = tmp_path_factory.mktemp("shelf")
    model = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    root = model.adaptable()
    draw = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        tensors = {}
        for path, layer in adaptable_layers(root).items():
            rows, cols = layer.weight.flatten(1).shape
            tensors[path] = {
                "lora_A": torch.randn(2, cols, generator=draw) / cols**0.5,
                "lora_B": torch.randn(rows, 2, generator=draw) * 0.02,
            }
        facts = {"base_model": model.name, "base_architecture": architecture_of(root), "name": name}
        save_adapter(folder / f"{name}.safetensors", Adapter(AdapterSpec("lora", rank=2), tensors, facts, name))
    return folder


@pytest.fixture
def workspace(tmp_path: Path, shelf: Path) -> Workspace:
    """A workplace of its own: adapters/one, adapters/two, audio/tone.wav of 2 s."""
    root = tmp_path / "root"
    shutil.copytree(shelf, root / "adapters")
    write_clip(root / "audio" / "tone.wav", tone(2.0))
    return Workspace.at([root], device="cpu")


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
