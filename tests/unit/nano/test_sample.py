"""The sample set as it lies in the repository, and the plan it is made from."""

import random
from pathlib import Path

import make_sample
import numpy as np
import pytest
import soundfile

SAMPLE = Path(make_sample.__file__).parent / "sample"
CLIPS = sorted(SAMPLE.glob("*.ogg"))


def test_the_set_is_as_promised() -> None:
    assert len(CLIPS) >= 24
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 6e6
    assert "MIT license" in (SAMPLE / "LICENSE").read_text()
    assert sum("koto" in path.stem for path in CLIPS) >= 12


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.stem)
def test_each_clip_is_captioned_stereo_audible_and_unclipped(path: Path) -> None:
    audio, rate = soundfile.read(path, dtype="float32")
    assert rate == 44100
    assert audio.shape[1] == 2
    assert 2 <= len(audio) / rate <= 8
    assert 0.3 < np.abs(audio).max() < 0.95
    assert np.argmax(np.abs(audio).max(1) > 0.01) < 0.05 * rate
    caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    assert all(word in caption.lower() for word in path.stem.split("_")[1:2])
    assert "bpm" in caption.lower()


def test_same_seed_same_scores() -> None:
    def scores(seed: int) -> list[object]:
        pieces = make_sample.plan_pieces(seed)
        return [make_sample.compose(piece, random.Random(str(n))) for n, piece in enumerate(pieces)]

    assert scores(20) == scores(20)
    assert scores(20) != scores(21)


def test_names_match_the_plan() -> None:
    names = [f"{number:02d}_{'_'.join(piece.instruments)}" for number, piece in enumerate(make_sample.plan_pieces(20))]
    assert [path.stem[: len(name)] for path, name in zip(CLIPS, names, strict=True)] == names
