"""A finished run as its files, without having trained."""

import json
from pathlib import Path
from typing import Any

import soundfile

from helpers.audio import noise, tone

LEVELS = [(number + 0.5) / 10 for number in range(10)]
HOSTILE = '<script>alert("x")</script> & "drums"'
"""Text that a page must escape."""


def make_losses(val: float, train_eval: float) -> dict[str, Any]:
    """Losses of both parts, the same at every noise level; those of single clips as in `make_items`."""
    parts = {"val": (val, 12), "train_eval": (train_eval, 3)}
    return {
        part: {"loss": loss, "by_level": [loss] * len(LEVELS), "by_clip": list_clip_losses(loss, count)}
        for part, (loss, count) in parts.items()
    }


def list_clip_losses(loss: float, count: int) -> list[float]:
    """Losses of single clips around a geometric mean; those of the base, 1.0, are equal."""
    return [loss * 1.15 ** ((n - (count - 1) / 2) * (loss != 1.0)) for n in range(count)]


def write_json(path: Path, content: Any) -> None:
    """Write a file into a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_demo(run: Path, step: int, strength: float, seconds: float = 1.0) -> dict[str, Any]:
    """Write a demo's audio and return its entry in `demos.json`."""
    stem = f"nano-base-prompt0-{strength:g}"
    folder = run / "demos" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    sound = tone(seconds, 220 + step, peak=0.4) + noise(seconds, peak=0.01, seed=step)
    soundfile.write(folder / f"{stem}.wav", sound, 44100, subtype="PCM_16")
    measures = {"loudness_lufs": -12.0 - step, "true_peak_db": None, "spectral_centroid_hz": 400.0, "stereo_width": 0.1}
    return {
        "file": f"{stem}.wav", "picture": f"{stem}.png", "demo": "prompt0", "mode": "text", "prompt": HOSTILE,
        "model": "nano-base", "strength": strength, "seed": 0, "step": step, "measures": measures,
    }  # fmt: skip


def make_items(loss: float, count: int) -> list[dict[str, Any]]:
    """Losses of single clips: 1.0 for the base, around `loss` for the adapter."""
    return [
        {"key": f"clip-{n}", "prompt": HOSTILE, "base": 1.0, "adapter": adapter}
        for n, adapter in enumerate(list_clip_losses(loss, count))
    ]


def write_run(folder: Path) -> Path:
    """Write a run of 20 steps with demos at steps 0, 10 and 20."""
    write_json(folder / "run.json", {"id": "ab12cd34", "version": "0.1.0", "started": "2026-01-02T03:04:05+00:00",
               "seconds": 90.0,
               "status": "finished", "resumed": [{"at": "2026-01-02T04:00:00+00:00", "step": 10}]})  # fmt: skip
    (folder / "config.yaml").write_text("adapter:\n  adapter_type: dora-rows\n  note: <b>\n")
    rows = [f"{step},{1 / step},{0.5},{2.0},{1.5}" for step in range(1, 21)]
    (folder / "metrics.csv").write_text(
        "\n".join(["step,train/loss,train/level/0.05,time/steps_per_second,time/peak_memory_gib", *rows]) + "\n"
    )
    items = {part: make_items(loss, count) for part, loss, count in (("val", 0.9, 12), ("train_eval", 0.5, 3))}
    losses = {0: (1.0, 1.0), 10: (0.8, 0.7), 20: (0.9, 0.5)}
    history = [{"step": step, **make_losses(*pair)} for step, pair in losses.items()]
    write_json(folder / "validation.json", {"levels": LEVELS, "base": make_losses(1.0, 1.0), "history": history,
               "best_step": 10, "best_loss": 0.8, "items": items})  # fmt: skip
    score = {"score": 0.3, "base_score": 0.9, "heldout_clips": 4,
             "generated_to_training": 0.3, "generated_to_heldout": 1.1, "heldout_to_training": 1.0,
             "nearest": [{"clip": 0, "training_clip": "clip-7", "distance": 0.2}]}  # fmt: skip
    write_json(folder / "memorization.json", {"clips": 4, "seconds": 2.0, "memorization": score,
               "spread": {"data": 1.0, "base": 1.1, "adapter": 0.9}})  # fmt: skip
    source = {"path": "data/latents", "role": "train", "model": "nano", "card": "# Card of <data>",
              "splits": {"train": {"clips": 18, "seconds": 400.0}}}  # fmt: skip
    write_json(folder / "data.json", {"manifest": "f" * 64, "sources": [source], "prompts": ["warm pads"]})
    effect, layers = {"all": 0.1, "self-attention": 0.2}, {"model.a": 0.2, "model.b": 0.1}
    write_json(folder / "adapter_stats.json", {"adapter_type": "dora-rows", "rank": 4, "alpha": 4, "parameters": 12345,
               "step": 20, "effect": effect, "layers": layers})  # fmt: skip
    write_json(folder / "system.json", {"device": "1 × CPU", "plan": {"weights": 2**30}, "plan_accuracy": "off by 3 %"})
    for step, strengths in {0: (0.0,), 10: (0.5, 1.0), 20: (0.5, 1.0)}.items():
        demos = [write_demo(folder, step, strength) for strength in strengths]
        write_json(folder / "demos" / f"step-{step:08d}" / "demos.json", demos)
    return folder
