"""Held-out clips are chosen by content: copies go together, and new clips move none of the old."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from sa3train.core.errors import DataError
from sa3train.data.audit.duplicates import find_duplicates, find_near_duplicates
from sa3train.data.encode.plan import select_heldout


def contents(count: int, seed: int = 0) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(16 * count), "V16")


def names(count: int) -> list[str]:
    return [f"{number:05d}.wav" for number in range(count)]


def alone(count: int) -> np.ndarray:
    return np.arange(count)


def test_the_share_is_met() -> None:
    held = select_heldout(0.05, names(20000), contents(20000), alone(20000), np.ones(20000, bool))
    assert 0.045 < held.mean() < 0.055


def test_later_clips_move_none() -> None:
    few = select_heldout(0.1, names(500), contents(1000)[:500], alone(500), np.ones(500, bool))
    more = select_heldout(0.1, names(1000), contents(1000), alone(1000), np.ones(1000, bool))
    assert (few == more[:500]).all()


def test_families_are_never_parted() -> None:
    content = contents(300)
    families = np.arange(300)
    families[100:200], families[200:] = families[:100], families[:100]
    held = select_heldout(0.3, names(300), content, families, np.ones(300, bool))
    assert (held[:100] == held[100:200]).all()
    assert (held[:100] == held[200:]).all()
    assert 10 < held[:100].sum() < 50


def test_at_least_one_of_five(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for seed in range(20):
        assert select_heldout(0.01, names(5), contents(5, seed), alone(5), np.ones(5, bool)).sum() == 1
    for count, least in ((9, 1), (10, 2), (25, 4), (60, 4)):
        assert select_heldout(1e-9, names(count), contents(count), alone(count), np.ones(count, bool)).sum() == least
    assert "4 of 60 different sounds (4 clips" in caplog.text
    pairs = np.repeat(np.arange(0, 50, 2), 2)
    assert select_heldout(1e-9, names(50), contents(50), pairs, np.ones(50, bool)).sum() == 8
    assert "4 of 25 different sounds (8 clips" in caplog.text
    assert not select_heldout(0.01, names(4), contents(4), alone(4), np.ones(4, bool)).any()
    assert not select_heldout(0.0, names(50), contents(50), alone(50), np.ones(50, bool)).any()


def test_rejected_clips_are_nowhere() -> None:
    accepted = np.arange(400) % 2 == 0
    assert not select_heldout(0.5, names(400), contents(400), alone(400), accepted)[~accepted].any()


def test_a_list_takes_families_along(tmp_path: Path) -> None:
    listed = tmp_path / "held.txt"
    listed.write_text("./00003.wav\n\n00005.wav\n")
    families = alone(8)
    families[6] = 3
    held = select_heldout(str(listed), names(8), contents(8), families, np.ones(8, bool))
    assert np.flatnonzero(held).tolist() == [3, 5, 6]
    listed.write_text("nowhere.wav")
    with pytest.raises(DataError, match=r"1 clip\(s\) that are not in the source, such as nowhere.wav"):
        select_heldout(str(listed), names(8), contents(8), families, np.ones(8, bool))
    listed.write_text("\n \n")
    with pytest.raises(DataError, match="empty"):
        select_heldout(str(listed), names(8), contents(8), families, np.ones(8, bool))
    with pytest.raises(DataError, match="cannot read the held-out list"):
        select_heldout(str(tmp_path / "missing"), names(8), contents(8), families, np.ones(8, bool))


def test_near_duplicates_are_found_among_many() -> None:
    rng = np.random.default_rng(1)
    prints = rng.integers(0, 256, (5000, 30), dtype=np.uint8)
    seconds = rng.uniform(2, 60, 5000)
    pairs = rng.permutation(5000)[:400].reshape(200, 2)
    for one, two in pairs:
        bits = np.unpackbits(prints[one])
        bits[rng.choice(240, 12, replace=False)] ^= 1
        prints[two], seconds[two] = np.packbits(bits), seconds[one] + 0.03
    originals, _ = find_near_duplicates(prints, seconds, np.ones(5000, bool))
    found = sum(originals[one] == originals[two] for one, two in pairs)
    assert found >= 196, "98 in 100 pairs that differ in 12 bits"
    assert (originals != np.arange(5000)).sum() <= 200, "and nothing else"
    seconds[pairs[:, 1]] += 0.02
    same, alike = find_near_duplicates(prints, seconds, np.ones(5000, bool))
    assert (same == np.arange(5000)).all(), "another tempo"
    assert (alike == originals).all(), "but held out together"


def test_exact_duplicates_point_to_the_first() -> None:
    content = contents(6).copy()
    content[4] = content[1]
    content[5] = content[1]
    comparable = np.array([True, True, True, True, True, False])
    assert find_duplicates(content, comparable, np.zeros(6)).tolist() == [0, 1, 2, 3, 1, 5]
    assert find_duplicates(content, comparable, np.arange(6) != 4).tolist() == [0, 4, 2, 3, 4, 5]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_list_to_hold_out_is_read_as_tools_write_it(tmp_path: Path, encoding: str) -> None:
    sources = [unicodedata.normalize("NFD", "é/café.wav"), "b.wav", "c.wav"]
    (tmp_path / "list.txt").write_bytes("./é/café.wav\r\n\r\n b.wav \r\n".encode(encoding))
    held = select_heldout(str(tmp_path / "list.txt"), sources, contents(3), alone(3), np.ones(3, bool))
    assert held.tolist() == [True, True, False]


def test_a_list_to_hold_out_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"list\.txt"):
        select_heldout(str(tmp_path / "list.txt"), ["a.wav"], contents(1), alone(1), np.ones(1, bool))
