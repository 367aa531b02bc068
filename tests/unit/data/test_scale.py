"""A million clips: listed, audited, split and opened within two gigabytes, as measured on fewer. Rows have no audio."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CLIPS, MILLION, MOST_GIGABYTES = 200_000, 1_000_000, 2.0

PROGRAM = """
import json, sys, time
from pathlib import Path
import numpy as np
from sa3train.data.audit.audit import AuditIndex
from sa3train.data.loading.sampler import BatchSampler, BatchShape
from sa3train.data.loading.loader import SplitClips
from sa3train.data.sources.listing import list_source
from sa3train.data.encode.plan import select_heldout
from sa3train.data.shards.reader import LatentStore
from sa3train.data.loading.sampler import ClipStream, SourceSize

root, count, shards = Path(sys.argv[1]), int(sys.argv[2]), 100
times, started = {}, time.perf_counter()

def measure_peak():
    # VmHWM, not ru_maxrss: that one keeps the peak of the process which started this one.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e6

def lap(name):
    global started
    times[name] = round(time.perf_counter() - started, 1)
    started = time.perf_counter()

with (root / "metadata.jsonl").open("w") as file:
    for n in range(count):
        file.write(f'{{"path": "/far/away/{n:07d}.wav", "caption": "clip number {n}", "bpm": {60 + n % 120}}}\\n')
rng = np.random.default_rng(0)
content, prints = rng.bytes(32 * count).hex(), rng.bytes(30 * count).hex()
with (root / "audit.jsonl").open("w") as file:
    for n in range(count):
        c = n - 1 if n % 50 == 49 else n  # one in fifty is a copy
        file.write(
            f'{{"source": "far/away/{n:07d}.wav", "stamp": "{n}", "findings": [], "seconds": {5 + n % 997 / 50:.3f}, '
            f'"sound_seconds": {5 + n % 997 / 50:.3f}, '
            f'"samples": 441000, "sample_rate": 44100, "channels": 2, "content": "{content[64 * c : 64 * c + 64]}", '
            f'"fingerprint": "{prints[60 * n : 60 * n + 60]}", "caption": "clip number {n}", "tags": {{"bpm": 90}}}}\\n'
        )
del content, prints
described = []
for s in range(shards):
    name, share = f"train-000-{s:05d}", count // shards
    with (root / f"{name}.jsonl").open("w") as file:
        for n in range(s * share, (s + 1) * share):
            file.write(
                f'{{"record": {{"key": "k{n:07d}-0123456789ab", "clip": "k{n:07d}-0123456789ab", '
                f'"augmentation": "original", "caption": "clip {n}", "tags": {{}}, "source": "far/{n:07d}.wav", '
                f'"seconds": 10.0, "frames": 108, '
                f'"crc32": {n}}}, "npy_offset": 512, "npy_size": 55424, "json_offset": 56832, "json_size": 400}}\\n'
            )
    described.append(
        {"file": f"{name}.tar", "listing": f"{name}.jsonl", "split": "train", "clips": share, "frames": 108 * share,
         "seconds": 10.0 * share, "bytes": 1, "sha256": "0"}
    )
model = {"name": "nano", "fingerprint": "f", "sample_rate": 44100, "downsampling_ratio": 4096}
index = {
    "format": "sa3train-latents", "version": 2, "model": model, "manifest": "m", "shards": described,
    "clips": count, "frames": 108 * count, "seconds": 10.0 * count,
}
index["splits"] = {"train": {name: index[name] for name in ("clips", "frames", "seconds")}}
(root / "index.json").write_text(json.dumps(index))
lap("writing")
base = measure_peak()
wanted = {clip.source: str(n) for n, clip in enumerate(list_source(str(root / "metadata.jsonl")).clips)}
lap("manifest")
audit = AuditIndex([root / "audit.jsonl"], wanted)
lap("audit index")
held = select_heldout(0.05, audit.sources, audit.content, audit.find_groups(), ~audit.rejected)
copies = int((audit.original != np.arange(count)).sum())
parted = int((held != held[audit.original]).sum())
lap("split")
del audit, wanted
clips = SplitClips(LatentStore(root, verify="none"), "train")
lap("shard listing")
stream = ClipStream([SourceSize(len(clips))], 0)
BatchSampler(stream, [clips.compute_lengths(None)], BatchShape(16, 8, 3)).plan_window(1)
lap("first batches")
result = {"clips": len(clips), "held": int(held.sum()), "copies": copies, "parted": parted}
print(json.dumps({**result, "base": base, "peak": measure_peak(), "times": times}))
"""


@pytest.mark.slow
def test_a_million_clips_fit_into_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(CLIPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    print(result)
    assert result["clips"] == CLIPS
    assert result["copies"] == CLIPS // 50
    assert result["parted"] == 0
    assert 0.045 < result["held"] / CLIPS < 0.055
    assert result["base"] + (result["peak"] - result["base"]) * MILLION / CLIPS < MOST_GIGABYTES
