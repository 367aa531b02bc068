"""Folder -> sa3-encode -> sa3-train -> sa3-generate --lora, by the console commands, on real audio."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "datasets" / "sample"
CLIPS = 8
STEPS = 30


def run(*command: str | Path) -> str:
    """Run a console command of this environment and return its output; fail with the output if it fails."""
    program = Path(sys.executable).parent / str(command[0])
    done = subprocess.run([str(program), *map(str, command[1:])], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a new user's folder: some clips of the sample set in nested folders, with captions."""
    root = tmp_path_factory.mktemp("newcomer")
    audio = [path for path in sorted(SAMPLE.rglob("*")) if path.suffix in {".ogg", ".flac", ".wav"}]
    for number, clip in enumerate(audio[:: max(1, len(audio) // CLIPS)][:CLIPS]):
        place = root / "audio" / ("a" if number % 2 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, place)
        shutil.copy(clip.with_suffix(".txt"), place)
    (root / "audio" / "broken.wav").write_bytes(b"RIFF and nothing more")
    (root / "audio" / "broken.txt").write_text("a clip that cannot be read")
    return root


@pytest.fixture(scope="module")
def latents(folder: Path) -> Path:
    paths = (f"source={folder / 'audio'}", f"out={folder / 'latents'}")
    run("sa3-encode", *paths, "model=nano", "max_rejected=0.2", "split=0.2")
    return folder / "latents"


@pytest.fixture(scope="module")
def run_dir(folder: Path, latents: Path) -> Path:
    settings = f"""
        trainer.max_steps={STEPS} scheduler.warmup_steps=5 optimizer.lr=1e-3 data.num_workers=0
        callbacks.checkpoint.every=15 callbacks.validation.every=30 callbacks.validation.clips=2
        callbacks.demos.every=30 callbacks.demos.duration=1 callbacks.demos.steps=2 callbacks.demos.heldout_prompts=1
        callbacks.demos.also_post_trained=false
    """
    paths = (f"data={latents}", f"run_dir={folder / 'run'}")
    run("sa3-train", *paths, "model=nano-base", "adapter=dora-rows", *settings.split())
    return folder / "run"


def test_encoding_keeps_every_readable_clip_at_its_own_length_and_lists_the_broken_one(
    folder: Path, latents: Path
) -> None:
    index = json.loads((latents / "index.json").read_text())
    assert index, "index.json is empty"
    rejected = [json.loads(line) for line in (latents / "rejected.jsonl").read_text().splitlines()]
    assert [Path(entry["source"]).name for entry in rejected] == ["broken.wav"]
    frames = {}
    for shard in sorted(latents.rglob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".json"):
                record = json.loads(content)
                from io import BytesIO

                array = np.load(BytesIO(members[name.removesuffix(".json") + ".npy"]))
                assert array.dtype == np.float16
                frames[Path(record["source"]).name] = (array.shape, record["seconds"], record["caption"])
    clips = list((folder / "audio").rglob("*.ogg")) + list((folder / "audio").rglob("*.flac"))
    assert set(frames) == {clip.name for clip in clips}
    for clip in clips:
        (channels, length), seconds, caption = frames[clip.name]
        info = soundfile.info(clip)
        assert channels == 128
        assert abs(seconds - info.duration) < 0.01
        assert length in {-(-info.frames // 4096), -(-info.frames // 4096) + 1}
        assert caption == clip.with_suffix(".txt").read_text().strip()


def test_encoding_again_does_nothing_twice(folder: Path, latents: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*.tar")}
    run("sa3-encode", f"source={folder / 'audio'}", f"out={latents}", "model=nano", "max_rejected=0.2", "split=0.2")
    assert {path: path.stat().st_mtime_ns for path in latents.rglob("*.tar")} == before


def test_training_leaves_an_adapter_its_configuration_and_its_losses(run_dir: Path) -> None:
    tensors = load_file(run_dir / "adapter.safetensors")
    assert any(
        name.startswith("model.transformer.layers.0.self_attn.to_qkv.parametrizations.weight.0.") for name in tensors
    )
    assert any(name.startswith("conditioners.seconds_total.") for name in tensors)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith("lora_B"))
    assert (run_dir / "config.yaml").is_file()
    assert len((run_dir / "metrics.csv").read_text().splitlines()) > 2
    assert (run_dir / "report.html").is_file()


MODES = {
    "text": [],
    "restyled": ["--init-audio", "CLIP", "--init-noise-level", "0.6"],
    "inpainted": ["--inpaint-audio", "CLIP", "--inpaint-start", "0.5", "--inpaint-end", "1.5"],
}


@pytest.mark.parametrize("mode", MODES)
def test_the_adapter_plays_in_every_mode_and_its_sidecar_makes_the_same_file(
    mode: str, folder: Path, run_dir: Path
) -> None:
    clip = next((folder / "audio").rglob("*.ogg"))
    flags = [str(clip) if flag == "CLIP" else flag for flag in MODES[mode]]
    out = folder / f"{mode}.wav"
    settings = {"--model": "nano-base", "-p": "koto", "--duration": 2, "--steps": 4, "--seed": 3}
    common = ["sa3-generate", *(str(part) for pair in settings.items() for part in pair), *flags]
    run(*common, "-o", out)
    run(*common, "--lora", f"{run_dir / 'adapter.safetensors'}=0", "-o", folder / f"{mode}_off.wav")
    run(*common, "--lora", f"{run_dir / 'adapter.safetensors'}=1", "-o", folder / f"{mode}_on.wav")
    assert soundfile.info(out).frames == 2 * 44100
    assert (folder / f"{mode}_off.wav").read_bytes() == out.read_bytes()
    assert (folder / f"{mode}_on.wav").read_bytes() != out.read_bytes()
    again = folder / f"{mode}_again.wav"
    run("sa3-generate", "--from", folder / f"{mode}_on.wav.json", "-o", again)
    assert again.read_bytes() == (folder / f"{mode}_on.wav").read_bytes()
