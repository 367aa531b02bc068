"""The peak of resident memory, anonymous and mapped, does not grow with the length of a piece."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.golden import GOLDEN

PROGRAM = """
import sys
from pathlib import Path
import torch
from sa3train.audio import io, metrics
from sa3train.inference import Generator, mastering, windows

def generate(seconds, name):
    gen.generate("hum", duration=seconds, **SETTINGS).save(name)

def make_noise(generation, latents_BCT):
    return [torch.rand(2, latents_BCT.shape[-1] * 4096) * 3 - 1.5]

SETTINGS = {"window": 10.0, "steps": 1, "seed": 1, "cfg_scale": 1.0, "peak": -1.0}
mastering.TRIES, mastering.BLOCK, io.BLOCK, io.LONG, windows.BLOCK_FRAMES = 1, 1 << 17, 1 << 17, 1 << 18, 32
metrics.LONG_SECONDS, metrics.PART_SECONDS = 8, 4
windows.decode_audio = make_noise
windows.sample_latents = lambda generation, stack, start, *rest: torch.zeros_like(start.masked_BCT)
gen = Generator.from_pretrained(sys.argv[2], device="cpu")
folder = Path(sys.argv[1])
generate(20.0, folder / "warm.wav")
for seconds in (20.0, 180.0):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    generate(seconds, folder / f"{seconds}.wav")
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep mapped pages while there is room")
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(GOLDEN / "plain")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    short, long = (int(line) * 1024 for line in done.stdout.splitlines())
    assert long - short < 160 * 44_100 * 2 * 4 / 4, "a quarter of the audio that the longer piece has more"
