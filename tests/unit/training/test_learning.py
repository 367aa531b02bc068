"""Learning that means something: on real instruments, an adapter predicts unseen clips better than the base does."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.training import Trial
from sa3train.adapters.spec import AdapterSpec
from sa3train.cli.encode import main as encode
from sa3train.training.settings import OptimizerSettings, ValidationSettings

SAMPLE = Path(__file__).parents[3] / "datasets" / "sample"
MARGIN = 0.03
"""Held-out loss must fall this far below the base's own, as a share of it."""


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the sample set, encoded by nano, a fifth of it held out."""
    folder = tmp_path_factory.mktemp("real")
    for clip in sorted(SAMPLE.glob("*.ogg"))[::2]:
        shutil.copy(clip, folder)
        shutil.copy(clip.with_suffix(".txt"), folder)
    out = folder / "latents"
    source = folder / "audio"
    source.mkdir()
    for path in folder.glob("*.*"):
        path.rename(source / path.name)
    assert encode([f"source={source}", f"out={out}", "model=nano-base", "split=0.2", "threads=1"]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_loss_falls_below_the_bases(tmp_path: Path, seed: int, latents: Path) -> None:
    run = Trial(
        latents,
        tmp_path / "run",
        checkpoint="nano-base",
        max_steps=40,
        batch_size=4,
        seed=seed,
        spec=AdapterSpec("dora-rows", rank=16),
        optimizer=OptimizerSettings(lr=3e-3),
        validation=ValidationSettings(every=40, clips=3),
        data={"crop_frames": 32},
        save_every=40,
    )
    run.run()
    found = json.loads((run.run_dir / "validation.json").read_text())
    base, last = found["base"]["val"], found["history"][-1]["val"]
    assert last["loss"] < (1 - MARGIN) * base["loss"]
    better = [after < before for before, after in zip(base["by_level"], last["by_level"], strict=True)]
    assert sum(better) >= 8, "at most noise levels, not at one alone"
