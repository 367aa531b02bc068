"""Shards: ordinary WebDataset tars that appear whole, go on after a kill, and name what is damaged."""

import errno
import functools
import hashlib
import io
import json
import math
import os
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset

from helpers.shards import make_latents, make_store, mutate
from sa3train.core.errors import DataError
from sa3train.data.shards.index import build_index, list_shards, parse_index
from sa3train.data.shards.reader import LatentStore
from sa3train.data.shards.shard_file import get_listing_path, hash_record, read_listing, scan_shard
from sa3train.data.shards.writer import ShardWriter, finish_shard


def record(number: int, **more: Any) -> dict[str, Any]:
    return {
        "key": f"clip-{number}",
        "clip": f"clip-{number}",
        "augmentation": "original",
        "seconds": 1.0,
        "caption": "x",
        **more,
    }


def fill(folder: Path, numbers: range, **settings: Any) -> None:
    with ShardWriter(folder, "train", **settings) as writer:
        for number in numbers:
            writer.add(make_latents(5 + number, number), record(number))


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "a", [4, 6, 5])
    urls = [str(path) for path in list_shards(folder)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["clip-000", "clip-001", "clip-002"]
    assert [sample["npy"].shape for sample in samples] == [(4, 4), (4, 6), (4, 5)]
    assert samples[1]["npy"].dtype == np.float16
    assert samples[2]["json"]["caption"] == "caption 2"
    assert samples[2]["json"]["frames"] == 5


def test_webdataset_streams_from_a_url(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "a", [4, 6, 5])
    fsspec.filesystem("memory").pipe("/far/train.tar", (folder / "train-000-00000.tar").read_bytes())
    with fsspec.open("memory://far/train.tar", "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        names = [member.name for member in tar]
    assert names[:2] == ["clip-000.npy", "clip-000.json"]
    urls = [f"file:{folder / 'train-000-00000.tar'}"]
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False))) == 3


def test_shards_keep_below_their_size(tmp_path: Path) -> None:
    fill(tmp_path, range(40), max_bytes=20_000)
    shards = list_shards(tmp_path)
    assert len(shards) > 3
    assert all(path.stat().st_size <= 20_000 for path in shards)
    entries = [entry.key for path in shards for entry in read_listing(path)]
    assert entries == [f"clip-{number}" for number in range(40)]
    assert not list(tmp_path.glob("*.part"))


def test_a_listing_says_where_everything_lies(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (shard,) = list_shards(tmp_path)
    content = shard.read_bytes()
    for number, entry in enumerate(read_listing(shard)):
        array = content[entry.npy_offset : entry.npy_offset + entry.npy_size]
        assert zlib.crc32(array) == entry.record["crc32"]
        assert (np.load(io.BytesIO(array))[0] == number).all()
        assert json.loads(content[entry.json_offset : entry.json_offset + entry.json_size]) == entry.record
    before = list(read_listing(shard))
    get_listing_path(shard).unlink()
    assert list(read_listing(shard)) == before, "made again from the tar"
    get_listing_path(shard).write_text('{"broken"')
    assert list(read_listing(shard)) == before


@pytest.mark.parametrize("cut", [0, 1, 100, 512, 700, 1024, 1500, 2048, 2100, 2559, 2560, 3000, 4000, 5000, 5119, 5120])
def test_a_part_cut_anywhere_goes_on(tmp_path: Path, cut: int) -> None:
    writer = ShardWriter(tmp_path, "train")
    for number in range(2):
        writer.add(make_latents(20, number), record(number))
    (part,) = tmp_path.glob("*.part")
    whole = part.read_bytes()
    step = len(whole) // 2
    part.write_bytes(whole[:cut])
    with ShardWriter(tmp_path, "train") as again:
        kept = [entry.key for entry in again._entries]
        assert kept == [f"clip-{number}" for number in range(min(2, cut // step))]
        for number in range(2):
            if f"clip-{number}" not in kept:
                again.add(make_latents(20, number), record(number))
    (shard,) = list_shards(tmp_path)
    assert shard.read_bytes() == whole + bytes(1024), "the same bytes as without the cut"


def test_a_part_damaged_inside_is_kept_up_to_the_damage(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train")
    for number in range(3):
        writer.add(make_latents(20, number), record(number))
    (part,) = tmp_path.glob("*.part")
    content = bytearray(part.read_bytes())
    content[len(content) // 3 + 600] ^= 0xFF
    part.write_bytes(content)
    assert [entry.key for entry in scan_shard(part)[0]] == ["clip-0"]


def test_leaving_by_an_error_keeps_the_part(tmp_path: Path) -> None:
    def fail(writer: ShardWriter) -> None:
        with writer:
            writer.add(make_latents(4, 0), record(0))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(ShardWriter(tmp_path, "train"))
    (part,) = tmp_path.glob("*.part")
    assert not list_shards(tmp_path)
    shard = finish_shard(part)
    assert shard is not None
    assert [entry.key for entry in read_listing(shard)] == ["clip-0"]


def test_a_pipe_in_place_of_the_index_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(DataError, match=r"index\.json.*named pipe"):
        LatentStore(tmp_path)


def test_nothing_written_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train"):
        pass
    (tmp_path / "train-000-00000.tar.part").write_bytes(b"torn")
    with ShardWriter(tmp_path, "train"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sa3train.data.shards.writer as shards

    writer = ShardWriter(tmp_path, "train")
    writer.add(make_latents(4, 0), record(0))

    def full(file: Any, content: bytes) -> None:
        file.write(content[:700])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_write_all", full)
    with pytest.raises(DataError, match=r"cannot write shards in .*No space left.*is kept"):
        writer.add(make_latents(4, 1), record(1))
    monkeypatch.undo()
    with ShardWriter(tmp_path, "train") as again:
        assert [entry.key for entry in again._entries] == ["clip-0"]
        again.add(make_latents(4, 1), record(1))
    assert len(list(read_listing(list_shards(tmp_path)[0]))) == 2


def test_digests_cover_what_was_planned() -> None:
    one = record(0)
    assert hash_record(one) == hash_record({**dict(reversed(one.items())), "frames": 3, "crc32": 1, "seconds": 2.0})
    assert hash_record(one) != hash_record({**one, "caption": "y"})


def test_the_index_describes_the_set(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "a", [4, 6, 5, 9], heldout=1)
    index = json.loads((folder / "index.json").read_text())
    assert index["clips"] == 4
    assert index["splits"]["train"]["frames"] == 15
    assert index["splits"]["heldout"] == {"clips": 1, "frames": 9, "seconds": round(9 * 4096 / 44100, 6)}
    for shard in index["shards"]:
        assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    again = build_index(folder, {"model": index["model"]}, {})
    assert again == index
    spread = make_store(tmp_path / "b", [4, 6, 5, 9], heldout=1, max_bytes=6000)
    other = json.loads((spread / "index.json").read_text())
    assert len(other["shards"]) > 2
    assert other["manifest"] == index["manifest"], "whatever the shards"
    changed = json.loads((make_store(tmp_path / "c", [4, 6, 5, 8], heldout=1) / "index.json").read_text())
    assert changed["manifest"] != index["manifest"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 200_000, "is damaged"),
        (b"[]", "not an index of latent shards"),
        (b'{"format": "other"}', "not an index of latent shards"),
        (b'{"format": "sa3train-latents", "version": 9, "made_by": "later"}', r"version 9.*later"),
        (b'{"format": "sa3train-latents", "version": 2}', "'clips' is missing"),
    ],
)
def test_a_wrong_index_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_index(text, "index.json")


WRONG_IN_INDEX: dict[str, list[Any]] = {
    "model": [None, 3, "nano", [], {}],
    "model.name": [None, 3, ""],
    "model.fingerprint": [None, 3, ["x"], ""],
    "model.sample_rate": [None, 0, -1, "44100", 1.5, math.nan],
    "model.downsampling_ratio": [None, 0, [4096]],
    "manifest": [None, 3, ""],
    "splits": [None, [], {}, {"train": 3}, {"train": {"clips": "3"}}, {"train": {"clips": -1}}],
    "splits.train": [{}, {"clips": 1, "frames": 5, "seconds": 0.37}, {"clips": 2, "frames": 4, "seconds": 0.37}],
    "shards": [None, 3, {}, "x", [3], [None], [{}]],
    "shards.0.file": [None, "train-000-00000.tar", 3, "../../etc/passwd", "", "x.tar", "/train-000-00000.tar"],
    "shards.0.listing": [None, 3, "../x.jsonl", "other-000-00000.jsonl"],
    "shards.0.split": [None, 3, "test", "train"],
    "shards.0.clips": [None, "3", -1, 1.5, math.inf, True],
    "shards.0.bytes": [None, "x", -1],
    "shards.0.seconds": [None, "x", -1, math.nan],
    "shards.0.sha256": [None, 3],
    "clips": [None, "x", -1, 99],
    "frames": [None, "x", -1, 99],
    "seconds": [None, "x", -1, 99],
    "rejected": ["x", -1],
    "silence": [3, "x", {}, {"file": "../silence.npy", "sha256": "x"}],
}


@pytest.mark.parametrize("key", WRONG_IN_INDEX)
def test_an_index_edited_by_hand_is_refused_by_the_name_of_what_is_wrong(tmp_path: Path, key: str) -> None:
    store = make_store(tmp_path / "set", [4, 6], heldout=1)
    for value in WRONG_IN_INDEX[key]:
        index = json.loads((store / "index.json").read_text())
        *parents, last = key.split(".")
        part = functools.reduce(lambda part, name: part[int(name) if name.isdigit() else name], parents, index)
        part[last] = value
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            parse_index(json.dumps(index).encode(), "index.json")
        del part[last]
        if key not in ("rejected", "silence", "splits.train"):
            with pytest.raises(DataError, match=rf"{last}.* is missing"):
                parse_index(json.dumps(index).encode(), "index.json")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*index.json"):
        LatentStore(tmp_path)
    with pytest.raises(DataError, match="cannot open"):
        LatentStore("nosuchscheme://x")


@pytest.fixture(params=["folder", "memory", "file"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    folder = make_store(tmp_path / "a", [4, 6, 5, 9], heldout=1)
    if request.param == "folder":
        yield str(folder)
    elif request.param == "file":
        yield f"file://{folder}"
    else:
        memory = fsspec.filesystem("memory")
        memory.put(str(folder), "/shards", recursive=True)
        yield "memory://shards"
        memory.rm("/shards", recursive=True)


def test_stores_read_at_random_from_anywhere(anywhere: str) -> None:
    store = LatentStore(anywhere, verify="hash")
    assert len(store) == 4
    for row in (3, 0, 2, 1):
        latent_CT, entry = store.read(row)
        number = int(entry["key"][-3:])
        assert (latent_CT[0] == number).all()
        assert latent_CT.shape[1] == store.frames[row] == entry["frames"]
        assert np.array_equal(store.read_latents(row), latent_CT)
        assert store.read_record(row) == entry
    assert len(store.list_rows("train")) == 3
    assert store.split[store.list_rows("heldout")].tolist() == ["heldout"]
    assert [entry["key"] for _, entry in store.iterate_records()] == store.keys
    assert store.get_silence(20).shape == (4, 20)
    assert store.verify_shards() == {}


def test_over_http(tmp_path: Path, server: str) -> None:
    """Python's own server sends whole files only, which a cache makes up for."""
    make_store(tmp_path / "a", [4, 6, 5])
    with pytest.raises(DataError, match=r"use simplecache::http"):
        LatentStore(f"{server}/a").read_latents(1)
    store = LatentStore(f"simplecache::{server}/a", verify="hash")
    assert [store.read_latents(row).shape[1] for row in (2, 0, 1)] == [5, 4, 6]


def test_a_store_can_be_sent_to_a_process(tmp_path: Path) -> None:
    import pickle

    store = LatentStore(make_store(tmp_path / "a", [4, 6]))
    store.read_latents(0)
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read_latents(1), store.read_latents(1))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-600]), r"has \d+ bytes, index.json says"),
        (lambda path: get_listing_path(path).unlink(), "its listing .* is missing"),
        (lambda path: get_listing_path(path).write_text("{}\n{}\n"), "its listing .* damaged"),
    ],
)
def test_damaged_shards_are_named(
    tmp_path: Path, harm: Callable[[Path], Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_store(tmp_path / "a", [4] * 12, max_bytes=6000)
    shard = list_shards(folder)[1]
    held = sum(1 for _ in read_listing(shard))
    harm(shard)
    with pytest.raises(DataError, match=rf"{shard.name}.*{message}") as raised:
        LatentStore(folder)
    assert "allow_damaged" in str(raised.value)
    store = LatentStore(folder, allow_damaged=True)
    assert len(store) == 12 - held
    assert list(store.damaged) == [shard.name]
    assert shard.name in caplog.text


def test_bytes_that_changed_are_never_used(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "a", [4, 6, 5])
    (shard,) = list_shards(folder)
    entries = list(read_listing(shard))
    content = bytearray(shard.read_bytes())
    content[entries[1].npy_offset + 130] ^= 1
    content[entries[2].json_offset] = ord("[")
    shard.write_bytes(content)
    store = LatentStore(folder)
    assert store.read_latents(0).shape == (4, 4)
    for row in (1, 2):
        with pytest.raises(DataError, match=rf"clip-00{row} in shard .*{shard.name} is damaged.*--verify"):
            store.read(row)
    with pytest.raises(DataError, match=r"hash in index\.json"):
        LatentStore(folder, verify="hash")
    assert list(store.verify_shards()) == [shard.name]


def test_500_mutated_shards_are_named_or_harmless(tmp_path: Path) -> None:
    """Whatever happens to a shard's bytes: the latents read are the right ones, or a DataError names the shard."""
    folder = make_store(tmp_path / "a", [3, 4, 5])
    (shard,) = list_shards(folder)
    whole, store = shard.read_bytes(), LatentStore(folder)
    expected = [store.read_latents(row) for row in range(3)]
    refused = named = 0
    for seed in range(500):
        shard.write_bytes(mutate(whole, random.Random(seed)))
        entries, end = scan_shard(shard)
        assert end <= len(whole) + 2048
        assert len({entry.key for entry in entries}) == len(entries) or seed
        faults = []
        try:
            fresh = LatentStore(folder)
            read = [fresh.read_latents(row) for row in range(3)]
        except DataError as error:
            faults.append(str(error))
        refused += len(faults)
        if faults:
            named += shard.name in faults[0]
        else:
            assert all(np.array_equal(one, two) for one, two in zip(read, expected, strict=True))
    assert named == refused
    assert refused > 300


def test_a_folder_of_audio_is_to_be_encoded_first(tmp_path: Path) -> None:
    pack = tmp_path / "My Pack"
    (pack / "kicks").mkdir(parents=True)
    (pack / "kicks" / "a.WAV").touch()
    with pytest.raises(DataError, match="folder of audio.*sa3-encode 'source=.*My Pack\"' out=latents model=MODEL"):
        LatentStore(pack)
