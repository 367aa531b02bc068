"""Build the stand-in for a GPU once a session, and start programs on it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LIMIT = 300.0
"""Seconds after which a program counts as hanging."""

Start = Callable[..., Callable[[], Any]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library that stands in for CUDA."""
    folder = tmp_path_factory.mktemp("standin")
    built = subprocess.run([sys.executable, HERE / "build.py", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Path(built.stdout.strip())


@pytest.fixture(scope="session")
def start(library: Path) -> Iterator[Start]:
    """Start a program of this folder with arguments, and return a function that waits for its JSON."""
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",  # 128 KiB instead of 32 MiB, which would hide what a small model allocates
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    started: list[subprocess.Popen[str]] = []

    def run(program: str, *arguments: str | Path) -> Callable[[], Any]:
        command = [sys.executable, HERE / program, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(process := subprocess.Popen(command, env=environment, text=True, **pipes))

        def answer() -> Any:
            out, errors = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, f"{program} ended with {process.returncode}\n{errors}"
            return json.loads(out)

        return answer

    yield run
    for process in started:
        process.kill()
        process.communicate()
