"""The commands without what Windows lacks: modules, functions, signals, /proc, fork, and free hands on open files.

`helpers/without_posix/sitecustomize.py` takes it away from this package's own modules in every process started here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SAMPLE = TESTS.parent / "datasets" / "sample"
PROGRAMS = Path(sys.executable).parent
STOP = """
import sys, time
from pathlib import Path
from sa3train.core import processes
folder, run_dir, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
processes.start(folder, command)
while processes.get_running_pid(folder) and not list((run_dir / "checkpoints").glob("step-*.safetensors")):
    time.sleep(0.05)
assert processes.stop(folder), processes.read_log_tail(folder)
while processes.get_running_pid(folder):
    time.sleep(0.05)
print(processes.read_log_tail(folder))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("work")
    (root / "clips").mkdir()
    for clip in sorted(SAMPLE.glob("*.ogg"))[:4]:
        shutil.copy(clip, root / "clips")
        shutil.copy(clip.with_suffix(".txt"), root / "clips")
    return root


def make_environment(work: Path, **more: str) -> dict[str, str]:
    return (
        os.environ
        | more
        | {
            "PYTHONPATH": str(TESTS / "helpers" / "without_posix"),
            "SA3TRAIN_TEST_WORK": str(work),
            "PYTHONIOENCODING": "cp1252:strict",
            "OMP_NUM_THREADS": "1",
        }
    )


def run(work: Path, *command: str | Path, **environment: str) -> str:
    """Run a command in the work folder and return its output; fail with the output if it fails."""
    program = shutil.which(str(command[0]), path=str(PROGRAMS))
    assert program is not None
    done = subprocess.run(
        [program, *map(str, command[1:])],
        cwd=work,
        env=make_environment(work, **environment),
        capture_output=True,
        encoding="cp1252",
        errors="replace",
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_what_windows_lacks_is_taken_from_our_modules_alone(work: Path) -> None:
    script = """
import os, signal, fcntl
import sa3train.core.files as files, sa3train.core.signals as signals
assert hasattr(os, "fork") and hasattr(signal, "SIGKILL")
assert not any(hasattr(files.os, name) for name in ("fork", "killpg", "O_DIRECTORY")) and files.os.name == "nt"
assert not hasattr(signals.signal, "SIGHUP") and signals.REQUEUE_SIGNALS == () and signals.os is files.os
try:
    files.replace_path(files.Path("/proc/self/status"), files.Path("x"))
    files.__builtins__["__import__"]("fcntl")
except ImportError as error:
    print(error)
except OSError:
    files.Path("open.txt").write_text("x", encoding="utf-8")
    with open("open.txt", encoding="utf-8"):
        try:
            files.Path("open.txt").unlink()
        except PermissionError as error:
            print(error.winerror)
"""
    assert run(work, "python", "-c", script).strip() == "32"


def test_the_commands_run(work: Path) -> None:
    run(work, "sa3-data", "audit", "C:\\clips")
    run(work, "sa3-encode", "source=C:\\clips", "out=.\\latents", "model=nano-base", "split=0.25")
    settings = (
        "data=latents model=nano-base run_dir=runs\\style trainer.max_steps=4 scheduler.warmup_steps=0 "
        "data.num_workers=1 data.batch_size=1 callbacks.checkpoint.every=1 callbacks.demos.enabled=false "
        "callbacks.validation.clips=1 logger=wandb"
    )
    command, style = ["sa3-train", *settings.split()], work / "runs" / "style"

    def read_state() -> tuple[str, str]:
        record = json.loads((style / "run.json").read_text(encoding="utf-8"))
        return record["status"], max((style / "checkpoints").iterdir()).stem

    held = {"SA3TRAIN_TEST_HELD": "step-00000002"}
    stopped = run(work, "python", "-c", STOP, work / "process", style, *command, **held)
    status, step = read_state()
    assert status == "interrupted" and step in ("step-00000002", "step-00000003"), stopped
    run(work, "sa3-train", "resume=C:\\runs\\style")
    assert read_state() == ("finished", "step-00000004")
    assert len(list((style / "wandb").rglob("offline-run-*/*.wandb"))) == 2
    generate = ("sa3-generate", "--model", "nano", "-p", "koto", "--duration", "1")
    run(work, *generate, "--lora", "runs\\style@3=0.8@0-0.5", "-o", "C:\\out\\a.wav")
    run(work, "sa3-generate", "--from", "out\\a.wav.json", "-o", "out\\again.wav")
    run(work, "sa3-adapter", "convert", "runs\\style\\adapter.safetensors", "peft", "--to", "peft")
    run(work, "sa3-adapter", "merge", "peft", "--model", "nano-base", "-o", "C:merged")
    assert (work / "merged" / "model.safetensors").is_file()


def test_the_studio_starts_and_ends_at_ctrl_c(work: Path) -> None:
    program = shutil.which("sa3-studio", path=str(PROGRAMS))
    assert program is not None
    log = work / "studio.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [program, "clips"],
            cwd=work,
            env=make_environment(work),
            stdout=output,
            stderr=output,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored behind a shell's &
        )
    try:
        address = ""
        while child.poll() is None and not address:
            time.sleep(0.1)
            words = log.read_text(encoding="utf-8", errors="replace").split()
            address = next((word.rstrip(".") for word in words if word.startswith("http://127.0.0.1")), "")
        with urllib.request.urlopen(address) as answer:
            assert answer.status == 200
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130, log.read_text(encoding="utf-8", errors="replace")
    finally:
        child.kill()
