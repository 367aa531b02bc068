"""Batches: every clip once a pass on one rank, the same for any number of workers, resumed exactly."""

import contextlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from helpers.shards import make_data_module, make_store
from sa3train.core.errors import ConfigError, DataError
from sa3train.core.signals import REQUEUE_SIGNALS, STOP_SIGNALS
from sa3train.data.loading.prompts import PromptSettings
from sa3train.data.loading.sampler import SourceSize, count_clips_per_cycle
from sa3train.data.loading.settings import DataSource


def endless(loader: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def keys_of(loader: Any, batches: int) -> list[list[str]]:
    return [batch["keys"] for batch in islice(endless(loader), batches)]


def test_a_batch_has_the_contract(tmp_path: Path) -> None:
    data = make_data_module(make_store(tmp_path / "a", [5, 9, 7, 6], heldout=1), batch_size=3, silence_tail_seconds=0.2)
    batch = next(iter(data.train_dataloader()))
    assert batch["latents_BCT"].shape == (3, 4, 9 + 2)
    assert batch["latents_BCT"].dtype == torch.float32
    assert batch["attention_mask_BT"].sum(1).tolist() == [9, 7, 5]
    assert batch["attention_mask_BT"].dtype == torch.bool
    assert batch["seconds_total_S"].tolist() == [1.0, 1.0, 1.0]
    assert batch["at_end_S"].all()
    assert sorted(batch["keys"]) == ["clip-000", "clip-001", "clip-002"]
    for row, key in enumerate(batch["keys"]):
        real = batch["attention_mask_BT"][row]
        number = int(key[-3:])
        assert batch["prompts"][row] == f"caption {number}"
        assert (batch["latents_BCT"][row, 0, real] == number).all(), "the clip's latents"
        assert (batch["latents_BCT"][row, :, ~real] == -1).all(), "the latents of silence behind it"


def test_prompts_to_share_are_of_training_clips_spread_over_the_set(tmp_path: Path) -> None:
    data = make_data_module(make_store(tmp_path / "a", [5] * 9, heldout=1))
    assert data.sample_prompts(3) == ["caption 0", "caption 3", "caption 6"]
    assert data.sample_prompts(64) == [f"caption {number}" for number in range(8)]
    assert data.sample_prompts(3, longest=8) == []


@pytest.mark.parametrize(("world", "batch_size", "pack"), [(1, 2, None), (2, 3, None), (3, 1, None), (2, 2, 24)])
def test_each_clip_is_on_exactly_one_rank_in_a_pass(
    tmp_path: Path, world: int, batch_size: int, pack: int | None
) -> None:
    lengths = [5 + number % 9 for number in range(36)]
    path = make_store(tmp_path / "a", lengths)
    seen: Counter[str] = Counter()
    for rank in range(world):
        data = make_data_module(path, batch_size, pack_frames=pack, seed=3, pool=1000, rank=rank, world_size=world)
        loader = data.train_dataloader()
        window = loader.sampler.window
        assert window == 36, "the window is the pass here"
        for rows in loader.sampler.plan_window(0):
            seen.update(loader.dataset.load_crop(request).key for row in rows for request in row)
    assert len(seen) == 36
    assert set(seen.values()) == {1}


def test_the_batches_of_all_ranks_are_that_of_one(tmp_path: Path) -> None:
    """Cut alike and of one length, also where a clip comes twice in a batch; every showing has its own number."""
    path, settings = make_store(tmp_path / "a", [4 + n % 5 for n in range(7)]), {"seed": 2, "silence_tail_seconds": 0.3}
    one = make_data_module(path, 4, **settings).train_dataloader()
    two = [make_data_module(path, 2, rank=rank, world_size=2, **settings).train_dataloader() for rank in range(2)]
    twice, seeds = 0, []
    for whole, *parts in zip(*(islice(endless(loader), 12) for loader in (one, *two)), strict=True):
        dealt = [row for pair in zip(*(part["latents_BCT"] for part in parts), strict=True) for row in pair]
        assert torch.equal(torch.stack(dealt), whole["latents_BCT"])
        assert [seed for pair in zip(*(part["seeds"] for part in parts), strict=True) for seed in pair] == whole[
            "seeds"
        ]
        twice += len(set(whole["keys"])) < 4
        seeds += whole["seeds"]
    assert twice and len(set(seeds)) == 48


def test_passes_stay_whole_when_the_set_does_not_divide(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", [4] * 7)
    loaders = [make_data_module(path, 2, rank=rank, world_size=2).train_dataloader() for rank in range(2)]
    keys = [keys_of(loader, 14) for loader in loaders]
    counts = Counter(key for rank in keys for batch in rank for key in batch)
    assert set(counts.values()) == {8}, "56 places are 8 passes of 7 clips"


def test_a_set_smaller_than_the_batch_loops(tmp_path: Path) -> None:
    loader = make_data_module(make_store(tmp_path / "a", [4, 5, 6]), 8).train_dataloader()
    assert len(loader) == 1
    counts = Counter(key for batch in keys_of(loader, 3) for key in batch)
    assert set(counts.values()) == {8}


def test_workers_do_not_change_the_order(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", [4 + n % 5 for n in range(11)])
    alone = make_data_module(path, 2, crop_frames=4, seed=1).train_dataloader()
    helped = make_data_module(path, 2, crop_frames=4, seed=1, num_workers=2).train_dataloader()
    for one, two in zip(islice(endless(alone), 13), islice(endless(helped), 13), strict=True):
        assert one["keys"] == two["keys"]
        assert torch.equal(one["latents_BCT"], two["latents_BCT"])


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 13])
@pytest.mark.parametrize("pack", [None, 20])
def test_state_restores_the_exact_position(tmp_path: Path, stop: int, pack: int | None) -> None:
    settings = {"crop_frames": 6, "seed": 5, "pack_frames": pack, "prompts": PromptSettings(caption_dropout=0.5)}
    path = make_store(tmp_path / "a", [4 + n % 7 for n in range(10)])
    whole = make_data_module(path, 2, **settings).train_dataloader()
    expected = list(islice(endless(whole), 20))
    first = make_data_module(path, 2, **settings).train_dataloader()
    list(islice(endless(first), stop))
    second = make_data_module(path, 2, **settings).train_dataloader()
    second.load_state_dict(first.state_dict())
    for one, two in zip(expected[stop:], endless(second), strict=False):
        assert one["keys"] == two["keys"]
        assert one["prompts"] == two["prompts"]
        assert torch.equal(one["latents_BCT"], two["latents_BCT"])


def test_an_epoch_resumed_ends_where_it_would_have(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", [4] * 10)
    first = make_data_module(path, 2).train_dataloader()
    assert len(first) == 5
    list(islice(iter(first), 3))
    second = make_data_module(path, 2).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert len(list(second)) == 2
    assert len(list(second)) == 5


def test_a_changed_set_resumes_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_data_module(make_store(tmp_path / "a", [4] * 10), 2).train_dataloader()
    keys_of(first, 7)
    second = make_data_module(make_store(tmp_path / "b", [4] * 12), 4).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert "data (" in caplog.text
    assert "rows (2 → 4)" in caplog.text
    assert second.state_dict()["window"] == 2, "14 clips shown, windows of 12"
    assert len(keys_of(second, 2)) == 2


def test_workers_leave_signals_to_the_process_that_started_them(tmp_path: Path) -> None:
    """Terminals, schedulers and service managers send them to every process of a job."""
    loader = make_data_module(make_store(tmp_path / "a", [4] * 12), 2, num_workers=2).train_dataloader()
    batches, others = endless(loader), psutil.Process().children()
    with contextlib.closing(loader):
        next(batches)
        workers = [process for process in psutil.Process().children() if process not in others]
        assert len(workers) == 2
        pids = " ".join(str(worker.pid) for worker in workers)
        for number in (*STOP_SIGNALS, *REQUEUE_SIGNALS):
            subprocess.run(["sh", "-c", f"kill -{int(number)} {pids}"], check=True)
        assert len([next(batches) for _ in range(12)]) == 12
    assert psutil.wait_procs(workers, timeout=60)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ending"), [("fork", "exit"), ("fork", "SIGKILL"), ("spawn", "exit")])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, method: str, ending: str) -> None:
    """Also where it exits while it holds the loader; the pipe of stdout stays open until all have ended."""
    (tmp_path / "program.py").write_text("""
import multiprocessing, os, signal, sys
from sa3train.data.loading.loader import _iterate_batches

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = _iterate_batches([{}] * 99, None, 2)
    assert next(batches) == {} and len(multiprocessing.active_children()) == 2
    print("loaded", flush=True)
    if sys.argv[2] == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
""")
    command = [sys.executable, str(tmp_path / "program.py"), method, ending]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("loaded\n", 0 if ending == "exit" else -signal.SIGKILL)


def test_workers_end_with_their_loader(tmp_path: Path) -> None:
    import multiprocessing

    before = set(multiprocessing.active_children())
    data = make_data_module(make_store(tmp_path / "a", [4] * 6), 2, num_workers=1)
    loader = data.train_dataloader()
    first = keys_of(loader, 2)
    (worker,) = set(multiprocessing.active_children()) - before
    data.teardown("fit")
    assert not worker.is_alive()
    assert first + keys_of(loader, 4) == keys_of(make_data_module(data.sources, 2).train_dataloader(), 6)
    assert set(multiprocessing.active_children()) - before
    del loader
    assert set(multiprocessing.active_children()) <= before, "without the garbage collector's help"


def test_the_global_random_stream_is_left_alone(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", [4] * 6)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    keys_of(make_data_module(path, 2, num_workers=1).train_dataloader(), 4)
    assert torch.equal(torch.rand(3), expected)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[str, ...]] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.seen.append(tuple(batch["keys"]))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        assert batch["keys"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def quiet_trainer(folder: Path, **settings: Any) -> Trainer:
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, enable_checkpointing=False, **plain, **settings)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_lightning_resumes_mid_epoch(tmp_path: Path, stop: int) -> None:
    path = make_store(tmp_path / "a", [4 + n % 3 for n in range(12)], heldout=2)
    whole = Recorder()
    quiet_trainer(tmp_path, max_steps=12).fit(whole, datamodule=make_data_module(path, 2))
    first, second = Recorder(), Recorder()
    trainer = quiet_trainer(tmp_path, max_steps=stop)
    trainer.fit(first, datamodule=make_data_module(path, 2))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    quiet_trainer(tmp_path, max_steps=12).fit(
        second, datamodule=make_data_module(path, 2), ckpt_path=tmp_path / "stop.ckpt", weights_only=False
    )
    assert first.seen + second.seen == whole.seen
    assert len(whole.seen) == 12


def test_crops_are_told_their_own_length(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", [100, 100])
    for how, expected in (("crop", 3.0), ("file", 10.0)):
        data = make_data_module(path, 2, crop_seconds=2.1, seconds=how, seed=2)
        batch = next(iter(data.train_dataloader()))
        assert batch["latents_BCT"].shape[2] == 23, "2.1 s are 22.6 frames"
        assert batch["seconds_total_S"].tolist() == [expected] * 2
        starts = batch["latents_BCT"][:, 1, 0]
        assert ((batch["latents_BCT"][:, 1] - starts[:, None]) == torch.arange(23)).all(), "a stretch of the clip"
        assert batch["at_end_S"].tolist() == [bool(start == 77) for start in starts]


def test_clips_are_cropped_to_the_models_longest(tmp_path: Path) -> None:
    for crop, longest, expected in ((None, 6, 6), (4, 6, 4), (7, 6, 6)):
        data = make_data_module(make_store(tmp_path / f"limit{crop}", [8, 8]), 2, crop_frames=crop)
        data.setup()
        data.limit_frames(longest)
        assert next(iter(data.train_dataloader()))["latents_BCT"].shape[-1] == expected


def test_crops_begin_everywhere(tmp_path: Path) -> None:
    loader = make_data_module(make_store(tmp_path / "a", [8, 8]), 2, crop_frames=5).train_dataloader()
    starts = Counter(int(s) for batch in islice(endless(loader), 100) for s in batch["latents_BCT"][:, 1, 0])
    assert sorted(starts) == [0, 1, 2, 3]
    assert min(starts.values()) > 25
    loader = make_data_module(make_store(tmp_path / "a", [8, 8]), 2, crop_frames=5, crop="start").train_dataloader()
    assert {int(s) for batch in islice(endless(loader), 9) for s in batch["latents_BCT"][:, 1, 0]} == {0}


def test_crops_on_beats(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a", [40, 40], beats=lambda _: [0.0, 1.0, 2.0, 30.0])
    loader = make_data_module(path, 2, crop_frames=10, crop="beat").train_dataloader()
    starts = {int(s) for batch in islice(endless(loader), 30) for s in batch["latents_BCT"][:, 1, 0]}
    assert starts == {0, 11, 22}, "the frames nearest to beats from which ten frames are left"
    with pytest.raises(ConfigError, match="no clip has a `beats` field"):
        make_data_module(make_store(tmp_path / "b", [40]), crop_frames=10, crop="beat").setup()


def test_beats_are_where_they_were_before_silence_was_trimmed(tmp_path: Path) -> None:
    applied = {"trim_silence": [0.5, 0.1], "dc": 0.01}
    path = make_store(tmp_path / "a", [40, 40], beats=lambda _: [0.2, 1.0, 2.0], applied=lambda _: applied)
    loader = make_data_module(path, 2, crop_frames=10, crop="beat").train_dataloader()
    starts = {int(s) for batch in islice(endless(loader), 30) for s in batch["latents_BCT"][:, 1, 0]}
    assert starts == {5, 16}, "0.5 s and 1.5 s after the new start; the first beat was cut off"


def test_clips_without_beats_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_store(tmp_path / "a", [40, 40, 40], beats=lambda number: [1.0] if number == 1 else [])
    with caplog.at_level("WARNING", "sa3train"):
        make_data_module(path, 2, crop_frames=10, crop="beat").setup()
    assert "2 clips have no `beats`, such as folder/clip0.wav" in caplog.text


def test_held_out_clips_are_apart_and_fixed(tmp_path: Path) -> None:
    data = make_data_module(make_store(tmp_path / "a", [9, 8, 7, 6, 5], heldout=2), 2, crop_frames=4)
    assert {key for batch in keys_of(data.train_dataloader(), 20) for key in batch} == {
        "clip-000",
        "clip-001",
        "clip-002",
    }
    (loader,) = data.val_dataloader()
    one, two = list(loader), list(loader)
    assert [batch["keys"] for batch in one] == [["clip-003", "clip-004"]]
    assert torch.equal(one[0]["latents_BCT"], two[0]["latents_BCT"])
    assert make_data_module(make_store(tmp_path / "b", [4, 4]), 2).val_dataloader() == []


def test_repeats_weights_and_priors(tmp_path: Path) -> None:
    big, small, prior = (
        str(make_store(tmp_path / name, [4] * size, prefix=name))
        for name, size in (("big", 9), ("small", 3), ("prior", 50))
    )

    def shares(sources: list[DataSource], batches: int, **settings: Any) -> Counter[str]:
        loader = make_data_module(sources, 2, **settings).train_dataloader()
        return Counter(key.split("-")[0] for batch in keys_of(loader, batches) for key in batch)

    assert shares([DataSource(big), DataSource(small, repeats=3)], 9) == {"big": 9, "small": 9}
    assert shares([DataSource(big, weight=1), DataSource(small, weight=2)], 60) == {"big": 40, "small": 80}
    assert shares([DataSource(big), DataSource(small), DataSource(prior, role="prior")], 8, prior_share=0.25) == {
        "big": 9, "small": 3, "prior": 4,
    }  # fmt: skip
    for wrong, settings in (
        ([DataSource(big, weight=1), DataSource(small)], {}),
        ([DataSource(big), DataSource(prior, role="prior")], {}),
        ([DataSource(big)], {"prior_share": 0.2}),
    ):
        with pytest.raises(ConfigError):
            shares(wrong, 1, **settings)
    with pytest.raises(ConfigError, match="every source has role prior"):
        count_clips_per_cycle([SourceSize(50, prior=True)], 0.2)


def test_packed_rows_hold_whole_clips(tmp_path: Path) -> None:
    lengths = [3 + (7 * n) % 11 for n in range(40)]
    data = make_data_module(make_store(tmp_path / "a", lengths), 2, pack_frames=32, seed=4)
    loader = data.train_dataloader()
    real = total = 0
    for batch in islice(endless(loader), 2 * len(loader)):
        ids_BT = batch["segment_ids_BT"]
        assert ids_BT.shape == (2, 32)
        assert torch.equal(ids_BT >= 0, batch["attention_mask_BT"])
        for number, key in enumerate(batch["keys"]):
            rows, frames = torch.nonzero(ids_BT == number, as_tuple=True)
            assert len(set(rows.tolist())) == 1
            clip_CT = batch["latents_BCT"][rows[0], :, frames]
            assert (clip_CT[0] == int(key[-3:])).all()
            assert clip_CT[1].tolist() == list(range(lengths[int(key[-3:])]))
        assert len(batch["keys"]) == len(batch["prompts"]) == len(batch["seconds_total_S"]) == int(ids_BT.max()) + 1
        real, total = real + int((ids_BT >= 0).sum()), total + ids_BT.numel()
    assert real / total > 0.8
    with pytest.raises(ConfigError, match="does not fit a packed row"):
        make_data_module(make_store(tmp_path / "b", [50]), 1, pack_frames=32).train_dataloader()


def test_buckets_keep_lengths_together(tmp_path: Path) -> None:
    lengths = [10 + (37 * n) % 90 for n in range(128)]
    loader = make_data_module(make_store(tmp_path / "a", lengths), 4).train_dataloader()
    real = total = 0
    for batch in islice(endless(loader), 32):
        real, total = real + int(batch["attention_mask_BT"].sum()), total + batch["attention_mask_BT"].numel()
    assert 1 - real / total < 0.05, "sorted within the window"


def test_shards_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    data = make_data_module(make_store(tmp_path / "a", [4]))
    data.setup()
    data.check_autoencoder("tiny", "f" * 64)
    with pytest.raises(DataError, match=r"of 'tiny' .*'other' has another"):
        data.check_autoencoder("other", "0" * 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_seconds": 1, "crop_frames": 9}, "crop_frames"),
        ({"crop": "beat"}, "no effect on whole clips"),
        ({"silence_tail_seconds": 1.0, "pack_frames": 99}, "no effect with pack_frames"),
    ],
)
def test_settings_without_sense_are_errors(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = make_store(tmp_path / "a", [4])
    with pytest.raises(ConfigError, match=message):
        make_data_module(path, **settings).train_dataloader()


@pytest.mark.parametrize(
    "settings",
    [{}, {"pack_frames": 8}, {"crop_frames": 1}, {"crop_frames": 4, "crop": "random"}, {"silence_tail_seconds": 0.2}],
)
def test_sets_of_one_shots_of_one_frame(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Clips of less than a frame: the crop is the clip, and its duration is the shortest that a model is asked for."""
    path = make_store(tmp_path / "a", [1] * 6, heldout=2, seconds=lambda number: 2 ** -(number + 4))
    data = make_data_module(path, batch_size=2, **settings)
    batch = next(iter(data.train_dataloader()))
    assert batch["seconds_total_S"].eq(1).all()
    assert torch.isfinite(batch["latents_BCT"]).all()
    assert all(len(list(loader)) for loader in data.val_dataloader())
