"""Run on the stand-in: plays nano and nano-base in bf16, in every mode, and nano in fp16. Prints JSON.

For each request there is an answer: the `error` it ended with, the `shapes` of its audio, the `waits` of the host for
the device, and the `launches` of kernels. Not among them is the first request of each model, which loads the text
encoder (and nano's of audio) for good.
"""

import json
import sys
import traceback
from contextlib import redirect_stdout
from typing import Any

import torch
from standin import ROOT, Watch, allow_blank_kernels, launches

from sa3train.inference import Generator

ADAPTER = ROOT / "sa3train" / "assets" / "nano" / "learned" / "koto.safetensors"


def played(generator: Generator, **request: Any) -> dict[str, Any]:
    """One request, and what was seen of it."""
    shapes, error, before = [], None, launches()
    with Watch() as watch:
        try:
            shapes = [list(audio_CN.shape) for audio_CN in generator.generate(seed=1, **request).audio]
        except Exception:  # noqa: BLE001 (the other requests are to be seen all the same)
            error = traceback.format_exc()
    return {"error": error, "shapes": shapes, "waits": watch.waits, "launches": launches() - before}


def main() -> dict[str, Any]:
    """All of them, in this order."""
    allow_blank_kernels()
    nano = Generator.from_pretrained("nano", "cuda", "bf16")
    base = Generator.from_pretrained("nano-base", "cuda", "bf16")
    audio_CN = torch.rand(2, 44100) - 0.5
    source = (audio_CN, 44100)
    played(nano, prompt="first", duration=1, init_audio=source, init_noise_level=0.7)
    played(base, prompt="first", duration=1, steps=1)
    found = {
        "text": played(nano, prompt="a koto", duration=1),
        "unequal durations": played(nano, prompt=["a koto", "rain"], duration=[0.5, 2.0]),
        "guidance": played(
            base, prompt="a koto", negative_prompt="noise", duration=1, steps=4, cfg_scale=3.0, cfg_interval=(0.2, 0.9)
        ),
        "init audio": played(nano, prompt="a koto", duration=1, init_audio=source, init_noise_level=0.7),
        "inpainting": played(
            nano,
            prompt="a koto",
            duration=1,
            inpaint_audio=source,
            inpaint_mask_start_seconds=0.2,
            inpaint_mask_end_seconds=0.6,
            keep_exact=True,
        ),
    }
    nano.cuda_graphs = True
    found["cuda graphs"] = played(nano, prompt="a koto", duration=1, steps=8)
    base.load_adapter(ADAPTER, interval=(0.3, 0.8))
    half = Generator.from_pretrained("nano", "cuda", "fp16")
    played(half, prompt="first", duration=1)
    found["fp16"] = played(half, prompt="a koto", duration=1)
    found["adapter in an interval"] = played(base, prompt="a koto", duration=1, steps=6, cfg_scale=1.0)
    return found


with redirect_stdout(sys.stderr):
    answer = main()
print(json.dumps(answer))
