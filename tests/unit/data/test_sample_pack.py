"""The made sample pack: its files can be read, and say what their vendors' habits are."""

import runpy
from collections import Counter
from pathlib import Path

import pytest

from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import list_source

SCRIPT = Path(__file__).parents[3] / "datasets" / "make_sample_pack.py"


@pytest.mark.slow
def test_a_pack_has_the_tags_of_its_vendors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_sample_pack.py", str(tmp_path / "pack")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    texts = [read_clip_text(clip) for clip in list_source(str(tmp_path / "pack")).clips]
    tempos = Counter(fact.source for text in texts for fact in text.facts if fact.name == "bpm")
    assert len(texts) == 60 and not any(code.startswith("bad") for text in texts for code, _ in text.problems)
    assert {"ACID chunk", "file name"} <= tempos.keys() and len(tempos) >= 5, tempos
