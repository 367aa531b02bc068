"""Run folders that tests write by hand."""

import json
import os
import time
from pathlib import Path
from typing import Any

from sa3train.core import processes
from sa3train.reports.run_files import format_settings

OLD = time.time() - 7200


def make_run(folder: Path, status: str = "running", *, steps: int = 100, old: bool = True, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"trainer": {"max_steps": steps}, "run_dir": str(folder), **settings}
    (folder / "config.yaml").write_text(format_settings(config))
    record = {"id": "x", "status": status, "started": "2026-01-01T00:00:00+00:00", "resumed": [], "steps": 40}
    record["identity"] = {}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.csv").write_text("step,train/loss,time/steps_per_second\n10,1.5,2.0\n20,1.25,\n30,1.")
    if old:
        for file in folder.iterdir():
            os.utime(file, (OLD, OLD))
    return folder


def write_record(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": ["sa3-train", "a=b"], "at": "2026-01-01T00:00:00+00:00", "stop_asked": None}
    (folder / processes.PROCESS_FILE).write_text(json.dumps(record | {"kind": "train", "parts": 0} | values))
