"""Programs measured in a process of their own, so that what ran before cannot lend them memory or imports."""

import json
import os
import subprocess
import sys
from typing import Any

from sa3train.errors import SA3Error


def run_apart(program: str, *arguments: object) -> dict[str, Any]:
    """Run Python code with `arguments` as its `sys.argv[1:]`; the last line it prints is JSON and is returned.

    Raises `SA3Error` with the end of its messages when it fails.
    """
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise SA3Error(f"a measuring process failed: {done.stderr.strip()[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
