"""Programs measured in a process of their own, so that what ran before cannot lend them memory or imports."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from sa3train.errors import SA3Error


def run_apart(program: str, *arguments: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python code with `arguments` as its `sys.argv[1:]`; the last line it prints is JSON and is returned.

    `environment`: in place of this process's own. Raises `SA3Error` with the end of its messages when it fails.
    """
    command = [sys.executable, "-c", program, *map(str, arguments)]
    given = os.environ if environment is None else environment
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False)
    if done.returncode:
        raise SA3Error(f"a measuring process failed: {done.stderr.strip()[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
