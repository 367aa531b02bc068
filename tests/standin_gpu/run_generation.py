"""Run on the stand-in: generate with nano and nano-base in bf16 in all modes, and with nano in fp16. Print JSON.

For each generation it has: `error`, `shapes` of the audio, `waits` of the host for the device, and `launches` of
kernels. The first generation of each model is not recorded, since it loads the text encoder (and nano's audio encoder).
"""

import json
import sys
import traceback
from contextlib import redirect_stdout
from typing import Any

import torch
from standin import ROOT, Watch, allow_blank_kernels, count_launches

from sa3train.inference import Generator

ADAPTER = ROOT / "sa3train" / "assets" / "nano" / "learned" / "koto.safetensors"


def generate(generator: Generator, **settings: Any) -> dict[str, Any]:
    """Generate once, and record what happens."""
    shapes, error, before = [], None, count_launches()
    with Watch() as watch:
        try:
            shapes = [list(audio_CN.shape) for audio_CN in generator.generate(seed=1, **settings).audio]
        except Exception:  # noqa: BLE001 (the other generations are recorded all the same)
            error = traceback.format_exc()
    return {"error": error, "shapes": shapes, "waits": watch.waits, "launches": count_launches() - before}


def main() -> dict[str, Any]:
    """Run all generations in order."""
    allow_blank_kernels()
    nano = Generator.from_pretrained("nano", "cuda", "bf16")
    base = Generator.from_pretrained("nano-base", "cuda", "bf16")
    audio_CN = torch.rand(2, 44100) - 0.5
    source = (audio_CN, 44100)
    generate(nano, prompt="first", duration=1, init_audio=source, init_noise_level=0.7)
    generate(base, prompt="first", duration=1, steps=1)
    results = {
        "text": generate(nano, prompt="a koto", duration=1),
        "unequal durations": generate(nano, prompt=["a koto", "rain"], duration=[0.5, 2.0]),
        "guidance": generate(
            base, prompt="a koto", negative_prompt="noise", duration=1, steps=4, cfg_scale=3.0, cfg_interval=(0.2, 0.9)
        ),
        "init audio": generate(nano, prompt="a koto", duration=1, init_audio=source, init_noise_level=0.7),
        "inpainting": generate(
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
    results["cuda graphs"] = generate(nano, prompt="a koto", duration=1, steps=8)
    base.load_adapter(ADAPTER, interval=(0.3, 0.8))
    half = Generator.from_pretrained("nano", "cuda", "fp16")
    generate(half, prompt="first", duration=1)
    results["fp16"] = generate(half, prompt="a koto", duration=1)
    results["adapter in an interval"] = generate(base, prompt="a koto", duration=1, steps=6, cfg_scale=1.0)
    return results


with redirect_stdout(sys.stderr):
    answer = main()
print(json.dumps(answer))
