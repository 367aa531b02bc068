"""Generate, encode, train, stop and resume with nano on a device and on the CPU, and print a summary for an issue.

Run as `bash launch/test_mps.sh [--device mps]`. The two devices are compared in fp32; bf16 and fp16 are only tried. A
check that fails does not keep the others from running; the exit code is 1 then.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sa3train.audio.io import load_audio
from sa3train.cli.encode import load_encoder
from sa3train.core.device import choose_device, get_device_name, measure_device_memory
from sa3train.core.errors import SA3Error
from sa3train.inference import Generator

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ("00_koto_melody_88bpm", "02_koto_glissando_72bpm", "04_koto_tremolo_88bpm")
STEPS, STOP_AFTER, TIMEOUT = 6, 3, 120
LIMITS = {"generate": 1e-2, "encode": 1e-3, "train": 1e-3, "resume": 1e-6}
"""Largest difference of latents or of an adapter's weights that passes."""


def main() -> int:
    """Run all checks and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="mps")
    try:
        device = choose_device(parser.parse_args().device, "--device")
    except SA3Error as error:
        sys.exit(f"error: {error}")
    checks: dict[str, Callable[[torch.device, Path], str]] = {
        "generate": check_generation, "16 bits": check_precisions, "encode": check_encoding, "train": check_training,
    }  # fmt: skip
    lines, failed = describe(device), False
    with tempfile.TemporaryDirectory() as work:
        for name, check in checks.items():
            print(f"{name} ...", flush=True)
            try:
                lines.append(f"{name}: {check(device, Path(work))}")
            except Exception as error:  # noqa: BLE001 (the other checks run all the same)
                traceback.print_exc()
                failed = True
                lines.append(f"{name}: FAILED: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    print("\n----- for an issue report -----", *lines, "-------------------------------", sep="\n")
    return int(failed)


def describe(device: torch.device) -> list[str]:
    """Describe the machine."""
    memory = measure_device_memory(device)
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    return [
        f"{device} ({get_device_name(device)}), {memory.total / 2**30:.0f} GiB, {system}, {platform.machine()}",
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"PYTORCH_ENABLE_MPS_FALLBACK={os.environ.get('PYTORCH_ENABLE_MPS_FALLBACK', 'unset')}",
    ]


def compare(name: str, differences: list[float], seconds: dict[str, float]) -> str:
    """Check the differences, and word the result of a check."""
    worst, ratio = max(differences), seconds["cpu"] / seconds["device"]
    if not worst <= LIMITS[name]:
        raise AssertionError(f"differs by {worst:.1e} from the CPU, more than {LIMITS[name]:.0e}")
    return f"passed, largest difference {worst:.1e}, {ratio:.2f} times as fast as the CPU"


def time_both(device: torch.device, compute: Callable[[torch.device], Any]) -> tuple[Any, Any, dict[str, float]]:
    """Compute on the CPU and on the device, each a second time to measure it."""
    results, seconds = [], {}
    for name, target in (("cpu", torch.device("cpu")), ("device", device)):
        compute(target)
        start = time.perf_counter()
        results.append(compute(target))
        seconds[name] = time.perf_counter() - start
    return results[0], results[1], seconds


def check_generation(device: torch.device, work: Path) -> str:
    """Generate in all modes from one seed; latents are compared."""
    audio = (torch.rand(2, 88200, generator=torch.Generator().manual_seed(0)) - 0.5, 44100)
    modes: list[dict[str, Any]] = [
        {},
        {"init_audio": audio, "init_noise_level": 0.7},
        {"inpaint_audio": audio, "inpaint_mask_start_seconds": 0.5, "inpaint_mask_end_seconds": 1.0},
        {"inpaint_audio": audio, "inpaint_mask_start_seconds": 1.5, "inpaint_mask_end_seconds": 3.0},
    ]
    models = {
        (str(target), name): Generator.from_pretrained(name, target, "fp32")
        for target in ("cpu", device)
        for name in ("nano", "nano-base")
    }

    def generate(target: torch.device) -> list[torch.Tensor]:
        settings = {"prompt": "koto, slow melody", "duration": 3, "seed": 1, "return_latents": True}
        found = [models[str(target), "nano"].generate(**settings, **mode) for mode in modes]
        settings |= {"steps": 10, "cfg_scale": 4.0, "negative_prompt": "noise"}
        return [each.latents for each in (*found, models[str(target), "nano-base"].generate(**settings))]

    expected, found, seconds = time_both(device, generate)
    return compare("generate", [(a - b).abs().max().item() for a, b in zip(expected, found, strict=True)], seconds)


def check_precisions(device: torch.device, work: Path) -> str:
    """Generate in 16 bits and as "auto" chooses."""
    found = []
    for precision in ("bf16", "fp16", "auto"):
        try:
            generator = Generator.from_pretrained("nano", device, precision)
            finite = bool(generator.generate(prompt="koto", duration=2, seed=1).audio[0].isfinite().all())
            found.append(f"{precision} {'runs' if finite else 'gives NaN'} ({generator.precision})")
        except Exception as error:  # noqa: BLE001 (systems differ in what they support)
            found.append(f"{precision} fails ({str(error).splitlines()[0]})")
    return "; ".join(found)


def check_encoding(device: torch.device, work: Path) -> str:
    """Encode three clips; latents are compared."""
    clips = [load_audio(ROOT / f"datasets/sample/{name}.ogg", 44100) for name in CLIPS]
    encoders = {str(target): load_encoder("nano", "fp32", str(target)) for target in ("cpu", device)}
    expected, found, seconds = time_both(device, lambda target: encoders[str(target)].compute_latents(clips, [1, 2, 3]))
    return compare("encode", [(a - b).abs().max().item() for a, b in zip(expected, found, strict=True)], seconds)


def check_training(device: torch.device, work: Path) -> str:
    """Train through the commands; stop a second run on the device by a signal, resume it, and compare adapters."""
    source = work / "audio"
    source.mkdir()
    for file in ROOT.glob("datasets/sample/0*"):
        shutil.copy(file, source)
    run("encode", f"source={source}", f"out={work / 'latents'}", "model=nano-base", "split=0.2", f"device={device}")
    adapters, seconds = {}, {}
    for name, target in (("cpu", "cpu"), ("device", device)):
        start = time.perf_counter()
        run("train", *list_training_arguments(work, name, target))
        seconds[name] = time.perf_counter() - start
        adapters[name] = load_file(work / name / "adapter.safetensors")
    stop_training(list_training_arguments(work, "stopped", device))
    run("train", f"resume={work / 'stopped'}")
    resumed = load_file(work / "stopped" / "adapter.safetensors")
    again = max((resumed[key] - value).abs().max().item() for key, value in adapters["device"].items())
    if again > LIMITS["resume"]:
        raise AssertionError(f"a stopped and resumed run differs by {again:.1e} from an uninterrupted one")
    differences = [(adapters["device"][key] - value).abs().max().item() for key, value in adapters["cpu"].items()]
    return f"{compare('train', differences, seconds)} (with start-up); stopped and resumed, it differs by {again:.1e}"


def list_training_arguments(work: Path, name: str, device: torch.device | str) -> list[str]:
    """List the arguments of a run."""
    return [
        f"data={work / 'latents'}", "model=nano-base", f"run_dir={work / name}", f"trainer.accelerator={device}",
        f"trainer.max_steps={STEPS}", "trainer.precision=fp32", "trainer.log_every=1", "scheduler.warmup_steps=0",
        "data.num_workers=0", "callbacks.demos.duration=1", "callbacks.demos.steps=2",
    ]  # fmt: skip


def run(command: str, *arguments: str) -> None:
    """Run a command, and raise the end of what it says where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"sa3train.cli.{command}", *arguments], capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-1:]) or f"sa3-{command} failed")


def stop_training(arguments: list[str]) -> None:
    """Train, and stop the run after a few steps as a scheduler does."""
    command = [sys.executable, "-m", "sa3train.cli.train", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"step {STOP_AFTER} of"):
                process.send_signal(signal.SIGTERM)
        if process.wait(TIMEOUT) != 128 + signal.SIGTERM:
            raise RuntimeError(f"a run that was stopped ended with {process.returncode}, not {128 + signal.SIGTERM}")


if __name__ == "__main__":
    sys.exit(main())
