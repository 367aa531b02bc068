"""Streams: every clip as often as its source's share says, repeatable from a seed, over HTTP and broken connections."""

import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from helpers.shards import make_data_module, make_store
from sa3train.core.errors import DataError
from sa3train.data.loading.settings import DataSource
from sa3train.data.shards.reader import LatentStore

SHARD = 20_000
"""Bytes: about seven clips in a shard."""


def iterate(data: Any, batches: int) -> Iterator[dict[str, Any]]:
    loader = data.train_dataloader()
    while batches > 0:
        for batch in islice(loader, batches):
            batches -= 1
            yield batch
    loader.close()


def count_keys(data: Any, batches: int) -> Counter[str]:
    return Counter(key for batch in iterate(data, batches) for key in batch["keys"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 clips of 4 to 10 frames in several shards, ten of them held out."""
    return make_store(tmp_path_factory.mktemp("shards"), [4 + n % 7 for n in range(60)], heldout=10, max_bytes=SHARD)


def test_a_shard_gives_what_random_access_gives(store: Path) -> None:
    latents = LatentStore(store)
    assert len(latents.shards) > 4
    seen = 0
    for number in range(len(latents.shards)):
        for row, latents_CF, record in latents.iterate_shard(number):
            expected_CF, expected = latents.read(row)
            assert np.array_equal(latents_CF, expected_CF)
            assert record == expected
            seen += 1
    assert seen == 60


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_training_clips_come_about_equally_often(store: Path, world: int, workers: int) -> None:
    counts: Counter[str] = Counter()
    for rank in range(world):
        ranked = make_data_module(
            store, 5, stream=True, pool=2, seed=1, rank=rank, world_size=world, num_workers=workers
        )
        counts += count_keys(ranked, 200 // world)
    assert set(counts) == {f"clip-{n:03d}" for n in range(50)}, "no held-out clips"
    assert sum(counts.values()) == 1000
    assert 10 <= min(counts.values()) <= max(counts.values()) <= 30, "20 times each, but for what is still shuffled"


def test_the_same_seed_gives_the_same_batches(store: Path) -> None:
    runs = [
        list(iterate(make_data_module(store, 3, stream=True, crop_frames=5, seed=seed, num_workers=workers), 8))
        for seed, workers in ((7, 2), (7, 2), (8, 2))
    ]
    for one, two in zip(*runs[:2], strict=True):
        assert one["keys"] == two["keys"]
        assert one["seeds"] == two["seeds"]
        assert torch.equal(one["latents_BCT"], two["latents_BCT"])
    assert [batch["keys"] for batch in runs[0]] != [batch["keys"] for batch in runs[2]]


@pytest.mark.parametrize("stream", [False, True])
def test_what_spawned_workers_get_gives_the_same_batches(store: Path, stream: bool) -> None:
    loader = make_data_module(store, 3, stream=stream).train_dataloader()
    copied = pickle.loads(pickle.dumps(loader.dataset))
    rows = next(iter(loader.sampler))
    one, two = (next(iter(data)) if stream else data[rows] for data in (loader.dataset, copied))
    assert one["keys"] == two["keys"] and torch.equal(one["latents_BCT"], two["latents_BCT"])


def test_a_batch_has_the_contract(store: Path) -> None:
    for batch in iterate(make_data_module(store, 4, stream=True, silence_tail_seconds=0.2), 5):
        for row, key in enumerate(batch["keys"]):
            real = batch["attention_mask_BT"][row]
            assert (batch["latents_BCT"][row, 0, real] == int(key[-3:])).all()
            assert (batch["latents_BCT"][row, :, ~real] == -1).all()
            assert real.sum() == 4 + int(key[-3:]) % 7
        assert batch["attention_mask_BT"].shape[1] == batch["attention_mask_BT"].sum(1).max() + 2


def test_packed_rows_hold_whole_clips(store: Path) -> None:
    for batch in iterate(make_data_module(store, 2, stream=True, pack_frames=24, pool=4), 10):
        assert batch["latents_BCT"].shape == (2, 4, 24)
        lengths = torch.bincount(batch["segment_ids_BT"][batch["segment_ids_BT"] >= 0])
        assert lengths.tolist() == [4 + int(key[-3:]) % 7 for key in batch["keys"]]


def test_sources_have_their_shares(tmp_path: Path, store: Path) -> None:
    other = make_store(tmp_path / "b", [5] * 10, prefix="other")
    sources = [DataSource(str(store), weight=1.0), DataSource(str(other), weight=3.0)]
    counts = count_keys(make_data_module(sources, 4, stream=True, pool=4), 250)
    others = sum(count for key, count in counts.items() if key.startswith("other"))
    assert 0.7 < others / 1000 < 0.8


def test_augmentations_share_their_clips_turns(tmp_path: Path) -> None:
    augmented = {3: 4, 5: 2}  # number of augmentations of two clips
    numbers = [n for n in range(8) for _ in range(augmented.get(n, 1))]
    names = [("original", "a", "b", "c")[numbers[:at].count(n)] for at, n in enumerate(numbers)]
    path = make_store(
        tmp_path / "a",
        [4] * len(numbers),
        clip=lambda at: f"whole-{numbers[at]}",
        augmentation=lambda at: names[at],
        key=lambda at: f"{numbers[at]}-{names[at]}",
    )
    counts = Counter(key[0] for key in count_keys(make_data_module(path, 4, stream=True), 400).elements())
    assert 100 < min(counts.values()) <= max(counts.values()) < 300


def test_a_resumed_stream_continues_and_says_that_it_is_not_exact(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_data_module(store, 2, stream=True).train_dataloader()
    list(islice(first, 20))
    second = make_data_module(store, 2, stream=True).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert "does not resume exactly" in caplog.text
    assert second.state_dict()["batches"] == 20
    assert len(second) == 25
    assert len(list(second)) == 5, "the rest of the epoch"
    fresh = [key for batch in iterate(make_data_module(store, 2, stream=True), 10) for key in batch["keys"]]
    assert [key for batch in islice(second, 10) for key in batch["keys"]] != fresh


@pytest.mark.parametrize(("prefix", "stream"), [("", True), ("simplecache::", False)])
def test_workers_read_over_http(store: Path, tmp_path: Path, server: str, prefix: str, stream: bool) -> None:
    (tmp_path / "set").symlink_to(store)
    counts = count_keys(make_data_module(f"{prefix}{server}/set", 5, stream=stream, num_workers=2), 80)
    assert set(counts) == {f"clip-{n:03d}" for n in range(50)}


class _Cut:
    """A file whose connection breaks after some bytes, the first `times` times it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        original = fsspec.implementations.local.LocalFileSystem.open

        def open_cut(file_system: Any, path: str, *args: Any, **options: Any) -> Any:
            file = original(file_system, path, *args, **options)
            if not path.endswith(".tar") or self.left <= 0:
                return file
            self.left -= 1
            read, total = file.read, 0

            def read_some(size: int = -1) -> bytes:
                nonlocal total
                total += max(size, 0)
                if total > 12_000:
                    raise ConnectionError("the connection was closed")
                return bytes(read(size))

            file.read = read_some
            return file

        monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "open", open_cut)


def test_a_broken_connection_is_opened_again(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [batch["keys"] for batch in iterate(make_data_module(store, 2, stream=True), 20)]
    _Cut(monkeypatch, times=3)
    assert [batch["keys"] for batch in iterate(make_data_module(store, 2, stream=True), 20)] == expected
    assert "connection was closed" in caplog.text


def test_a_shard_that_cannot_be_read_ends_the_stream(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Cut(monkeypatch, times=1000)
    with pytest.raises(DataError, match=r"\.tar.*connection was closed"):
        list(iterate(make_data_module(store, 2, stream=True), 20))


def test_a_shard_with_other_clips_than_listed_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", [4] * 6)
    other = make_store(tmp_path / "b", [4] * 5)
    shard = next(path.glob("train*.tar"))
    (path / shard.name).write_bytes((other / shard.name).read_bytes())
    with pytest.raises(DataError, match=shard.name):
        list(iterate(make_data_module(path, 2, stream=True, verify="none"), 3))
