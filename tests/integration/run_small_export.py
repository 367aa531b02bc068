"""Run the released small architecture (random weights, two adapters) on onnxruntime and OpenVINO, in three modes.

PYTHONPATH=tests python tests/integration/run_small_export.py FOLDER

It is too heavy for a test: 15 minutes, 5 GB of memory, 8 GB of disk. It exports with --check, prints how far latents
are from those of torch, and ends with exit code 1 where that is beyond LIMIT.
"""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from helpers.generation import generate_latents, inpaint
from helpers.nano_adapters import write_lora_adapters
from helpers.onnx_runner import SCRIPT, STRENGTHS, load_exact, write_noise
from sa3train.bench.checkpoints import make_random_checkpoint

PROMPT, DURATION, STEPS = "solo cello", 4.0, 4
LIMIT = 1e-3


def main() -> None:
    """Export, generate and compare."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    model, audio, exported = str(make_random_checkpoint("small")), write_noise(folder / "in.wav"), folder / "onnx"
    write_lora_adapters(folder, tuple(STRENGTHS), model)
    if exported.exists():
        print(f"reusing the earlier export {exported}: delete it to export again")
    else:
        loras = [word for name, each in STRENGTHS.items() for word in ("--lora", f"{folder / name}.safetensors={each}")]
        _run("-m", "sa3train.cli.export", "--model", model, *loras, "--check", str(exported))
    modes: dict[str, tuple[list[str], dict[str, Any]]] = {
        "text-to-audio": ([], {}),
        "audio-to-audio": (
            ["--init-audio", str(audio), "--init-noise-level", "0.8"],
            {"init_audio": audio, "init_noise_level": 0.8},
        ),
        "inpainting": (["--inpaint-audio", str(audio), "--inpaint", "1", "2.5"], inpaint(audio, 1, 2.5)),
    }
    latents = {}
    given = ["-p", PROMPT, "--seed", "7", "--duration", str(DURATION), "--steps", str(STEPS), "--sampler", "euler"]
    for mode, (flags, _) in modes.items():
        paths = [str(folder / f"{mode}.wav"), str(folder / f"{mode}.npy")]
        _run(str(SCRIPT), str(exported), *given, *flags, "-o", paths[0], "--latents", paths[1])
        latents["onnxruntime", mode] = np.load(paths[1])
    for backend in ("openvino", "torch"):
        generator = load_exact(folder, model=model, backend=backend)
        for mode, (_, settings) in modes.items():
            common = {"seed": 7, "duration": DURATION, "steps": STEPS, "sampler_type": "euler"}
            latents[backend, mode] = generate_latents(generator, PROMPT, **common, **settings).numpy()
        del generator
        gc.collect()
    errors = list[float]()
    for (backend, mode), found in latents.items():
        if backend != "torch":
            exact = latents["torch", mode]
            errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
            print(f"{errors[-1]:.1e} {backend}, {mode}")
    if not all(each <= LIMIT for each in errors):  # NaN included
        sys.exit(f"latents are further than {LIMIT} from those of torch")


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
