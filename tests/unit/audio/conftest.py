"""Tests of audio files see no ffmpeg but the one that they make, so that they give the same everywhere."""

import pytest


@pytest.fixture(autouse=True)
def hide_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
