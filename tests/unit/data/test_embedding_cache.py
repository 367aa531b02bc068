"""A prompt is encoded once; a damaged or unwritable cache costs time, never a run."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from helpers.golden import GOLDEN
from sa3train.data.loading.embedding_cache import EmbeddingCache, hash_text_encoder


class Counting:
    """Embeds a prompt as its characters, and counts the prompts it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: list[str]) -> Sequence[torch.Tensor]:
        self.asked += prompts
        return [
            torch.tensor([[ord(c), 1.0] for c in prompt], dtype=torch.bfloat16).reshape(-1, 2) for prompt in prompts
        ]


PROMPTS = ["b", "aa", "", "ccc", "aa", "b"]


def test_each_prompt_once_on_this_machine(tmp_path: Path) -> None:
    encode = Counting()
    first = EmbeddingCache("model", tmp_path).get(PROMPTS, encode)
    assert encode.asked == ["b", "aa", "", "ccc"]
    again = EmbeddingCache("model", tmp_path).get([*PROMPTS, "new"], encode)
    assert encode.asked == ["b", "aa", "", "ccc", "new"]
    assert set(again) == {*PROMPTS, "new"}
    for prompt in PROMPTS:
        assert torch.equal(first[prompt], again[prompt])
        assert again[prompt].shape == (len(prompt), 2)
        assert again[prompt].dtype == torch.bfloat16
    assert not list(tmp_path.rglob("*.part"))


def test_random_prompts_are_not_kept(tmp_path: Path) -> None:
    cache, encode = EmbeddingCache("model", tmp_path), Counting()
    cache.get(["kept"], encode)
    assert set(cache.get(["kept", "random"], encode, save=False)) == {"kept", "random"}
    assert encode.asked == ["kept", "random"]
    assert set(EmbeddingCache("model", tmp_path).load(["kept", "random"])) == {"kept"}


def test_what_another_process_adds_is_found(tmp_path: Path) -> None:
    mine, theirs, encode = EmbeddingCache("model", tmp_path), EmbeddingCache("model", tmp_path), Counting()
    mine.get(["a"], encode)
    theirs.get(["b"], encode)
    assert set(mine.get(["a", "b"], encode)) == {"a", "b"}
    assert encode.asked == ["a", "b"]


def test_another_encoder_has_its_own(tmp_path: Path) -> None:
    encode = Counting()
    EmbeddingCache("one", tmp_path).get(["a"], encode)
    EmbeddingCache("two", tmp_path).get(["a"], encode)
    assert encode.asked == ["a", "a"]


def test_many_prompts_make_several_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3train.data.loading.embedding_cache._PACK", 20)
    encode = Counting()
    prompts = [f"prompt {number}" for number in range(50)]
    cache = EmbeddingCache("model", tmp_path)
    cache.get(prompts, encode)
    assert len(list(cache.folder.iterdir())) == 3
    assert len(cache.load(prompts)) == 50


def test_a_damaged_pack_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, encode = EmbeddingCache("model", tmp_path), Counting()
    cache.get(["a"], encode)
    (pack,) = cache.folder.iterdir()
    pack.write_bytes(pack.read_bytes()[:20])
    for again in (cache, EmbeddingCache("model", tmp_path)):
        caplog.clear()
        assert again.load(["a"]) == {}
        assert str(pack) in caplog.text
    assert cache.get(["a"], encode)["a"].shape == (1, 2)
    assert encode.asked == ["a", "a"]
    assert EmbeddingCache("model", tmp_path).get(["a"], encode)["a"].shape == (1, 2)
    assert encode.asked == ["a", "a"], "the damaged pack was written anew"


def test_a_disk_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    encode = Counting()
    assert set(EmbeddingCache("model", tmp_path / "file").get(["a"], encode)) == {"a"}
    assert "Cannot save" in caplog.text


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    folder = GOLDEN / "plain" / "t5gemma"
    identity = hash_text_encoder(folder, 24)
    assert identity == hash_text_encoder(folder, 24) != hash_text_encoder(folder, 256)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert hash_text_encoder(tmp_path, 24) == identity
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0xFF
    weights.write_bytes(content)
    assert hash_text_encoder(tmp_path, 24) != identity


def test_large_files_are_sampled(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(6_000_000))
    before = hash_text_encoder(tmp_path, 1)
    (tmp_path / "model.safetensors").write_bytes(bytes(5_999_999) + b"x")
    assert hash_text_encoder(tmp_path, 1) != before, "the last byte is in the last piece"
    (tmp_path / "model.safetensors").write_bytes(bytes(6_000_001))
    assert hash_text_encoder(tmp_path, 1) != before
