"""Stand-ins for `sa3-train` and `sa3-eval` that leave the files of a run in a moment, to test what starts them.

The loss that they reach depends on `adapter.rank` and `optimizer.lr` alone. Each start writes a line to `starts.log`
beside the run folder.
"""

import subprocess
import sys
from pathlib import Path

PYTHON = sys.executable  # before a test changes it
TRAIN = """
import json, math, os, signal, sys, time
args = dict(word.split("=", 1) for word in sys.argv[1:])
folder = (args.get("resume") or args["run_dir"]).strip('"')
with open(os.path.join(os.path.dirname(folder), "starts.log"), "a") as log:
    log.write(" ".join(f"{k}={v}" for k, v in args.items() if k != "run_dir") + "\\n")
if args.get("adapter.rank") == "13":
    sys.exit("error: rank 13 is not for us.")
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
os.makedirs(os.path.join(folder, "checkpoints"), exist_ok=True)
path = lambda name: os.path.join(folder, name)
def write(name, text):
    with open(path(name + ".part"), "w") as file:
        file.write(text)
    os.replace(path(name + ".part"), path(name))
if "resume" in args:
    record, validation = json.load(open(path("run.json"))), json.load(open(path("losses.json")))
    record["resumed"].append({})
    point = record["point"]
else:
    point = float(args.get("adapter.rank", 4)), float(args.get("optimizer.lr", 1e-3))
    record = {"format": 1, "id": "x", "identity": {}, "resumed": [], "status": "running", "point": point}
    validation = {"base": {"val": {"loss": 1.0}}, "history": [], "items": {}}
    rank, rate = point
    write("config.yaml", f"trainer: {{max_steps: 8}}\\nadapter: {{rank: {rank:.0f}}}\\noptimizer: {{lr: {rate}}}\\n")
write("run.json", json.dumps(record))
reach = 0.5 + 0.1 * abs(math.log10(point[1]) + 3) + 0.001 * point[0]
for step in range(len(validation["history"]) + 1, 9):
    time.sleep(PAUSE)
    if stops:
        write("run.json", json.dumps(record | {"status": "interrupted", "steps": step - 1}))
        sys.exit(143)
    validation["history"].append({"step": step, "val": {"loss": 1 - (1 - reach) * step / 8}})
    for name in ("losses.json", "validation.json")[: 1 if args.get("callbacks.validation.enabled") == "false" else 2]:
        write(name, json.dumps(validation))
    write(f"checkpoints/step-{step:08d}.safetensors", "")
write("adapter.safetensors", "")
write("run.json", json.dumps(record | {"status": "finished", "steps": 8}))
"""

EVALUATE = """
import json, sys
folder = sys.argv[1]
losses = [row["val"]["loss"] for row in json.load(open(folder + "/losses.json"))["history"]]
row = {"adapter": f"{folder}@{len(losses)}", "step": len(losses), "strength": 1.0}
row["against_base"] = {"loss": {"change": losses[-1] - 1}}
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({"pick": {"candidate": 0, "text": "that one", "is_base": False}, "candidates": [row]}, file)
"""


def write_stubs(folder: Path, pause: float = 0.0) -> Path:
    """Write the commands into a folder, for `sys.executable` to be in: there `find_program` looks.

    `sa3-sweep` is the real one, and starts the others.
    """
    folder.mkdir()
    python = folder / "python"
    stubs = {"sa3-train": TRAIN.replace("PAUSE", repr(pause)), "sa3-eval": EVALUATE}
    for name, text in stubs.items():
        (folder / name).write_text(f"#!{PYTHON} -S\n{text}")
    (folder / "sa3-sweep").write_text(f"#!{PYTHON}\n{make_code('sweep', python)}")
    for name in (*stubs, "sa3-sweep"):
        (folder / name).chmod(0o755)
    return python


def make_code(module: str, stubs: Path) -> str:
    """Make the code of a command of ours, which starts the stubs."""
    code = f"import sys; from sa3train.cli import {module}; sys.executable = {str(stubs)!r}\n"
    return f"{code}{module}.POLL_SECONDS = 0.05\nsys.exit({module}.main(sys.argv[1:]))"


def start_command(module: str, stubs: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start a command of ours in a process of its own, which starts the stubs."""
    return subprocess.Popen([PYTHON, "-c", make_code(module, stubs), *arguments])
