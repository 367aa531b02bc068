"""What `sa3-bench nano` measures on packs, with an autoencoder whose losses are known."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from torch import Tensor

from sa3train.bench import packs


def make_noise(seed: int, seconds: float = 0.5) -> Tensor:
    return 0.1 * torch.randn(2, int(seconds * packs.RATE), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def halving() -> SimpleNamespace:
    """An autoencoder that halves the amplitude, and adds a frame of silence as the real one may."""
    return SimpleNamespace(
        encode=lambda audio_BCN: audio_BCN,
        decode=lambda z_BCT, generator: torch.nn.functional.pad(z_BCT / 2, (0, 4096)),
    )


def test_level_sdr_and_fresh_phases_by_their_definitions() -> None:
    real, other = make_noise(0), make_noise(1)
    assert packs.compute_level_change(real, real / 2) == pytest.approx(-6.02, abs=0.01)
    assert packs.compute_scaled_sdr(real, -3 * (real + 0.1 * other)) == pytest.approx(20, abs=0.3)
    assert packs.compute_scaled_sdr(real, other) == pytest.approx(0, abs=0.05)
    fresh = packs.draw_phases(real)
    assert packs.compute_level_change(real, fresh) == pytest.approx(0, abs=1e-3)
    assert packs.compute_scaled_sdr(real, fresh) < 0.1


def test_a_pack_is_measured_by_its_clips(halving: SimpleNamespace, tmp_path: Path) -> None:
    for number in range(packs.CLIPS + 5):
        soundfile.write(tmp_path / f"{number}.wav", make_noise(number, 0.1).T.numpy(), packs.RATE)
    soundfile.write(tmp_path / "silent.flac", torch.zeros(100, 2).numpy(), packs.RATE)
    (tmp_path / "notes.txt").write_text("no audio")
    files = packs.draw_files(tmp_path, (".wav",))
    assert len(files) == packs.CLIPS
    assert files == packs.draw_files(tmp_path, (".wav",))
    both = [*files[:6], tmp_path / "silent.flac", tmp_path / "notes.txt"]
    level, spread, mel, sdr, trips = packs._measure_pack(halving, "a pack", both)  # type: ignore[arg-type]
    assert level.value == pytest.approx(6.02, abs=0.01)
    assert spread.value == pytest.approx(6.02, abs=0.01)
    assert "of 6 clips -6.0 to -6.0 dB" in level.note
    assert mel.value == pytest.approx(6.02, abs=0.05)
    assert mel.target is not None
    assert mel.target >= packs.MEL_BAR
    assert sdr.reached
    assert trips.value == pytest.approx(4 * 6.02, abs=0.3)


def test_a_pack_that_is_not_at_hand_has_a_row_that_says_so(
    halving: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], folder: Path) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="W: a warning\nE: Unable to locate package\n")

    monkeypatch.setenv("SA3TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packs, "_run", fail)
    monkeypatch.setattr(packs, "SOUNDFONT", tmp_path / "missing.sf2")
    soundfile.write(tmp_path / "own.ogg", make_noise(0, 0.1).T.numpy(), packs.RATE)
    figures = packs.measure_packs(halving, tmp_path)  # type: ignore[arg-type]
    missing = [figure for figure in figures if figure.value is None]
    assert [figure.reached for figure in missing] == [False] * 3
    assert "E: Unable to locate package. Run it where apt-get can download sonic-pi-samples" in missing[0].note
    assert "FluidR3" in missing[2].note
    assert len(figures) == 8
