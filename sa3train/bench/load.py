"""Loading: seconds and host memory of a checkpoint, each in a process of its own.

Memory is what the process owns (anonymous pages), sampled while loading; pages of the mapped file belong to the
system's cache, which takes them back when it needs them, and are given beside it.
"""

from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import dtype_of, run_apart

BAR = 1.2

_PROGRAM = """
import json, sys, time, torch
from sa3train.bench.measure import PeakMemory, wait
from sa3train.bench.measure import dtype_of
from sa3train.models.checkpoint import load_checkpoint
folder, device, dtype, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.zeros(1, device=device)
with PeakMemory() as host, PeakMemory(device) as there:
    start = time.perf_counter()
    model = load_checkpoint(folder, device, dtype_of(dtype))
    wait(device)
    seconds = time.perf_counter() - start
tensors = [t for m in (model.dit, model.conditioner, model.autoencoder) for t in m.state_dict().values()]
size = sum(t.nbytes for t in tensors)
found = {"seconds": seconds, "own": host.bytes, "mapped": host.with_files, "device": there.bytes, "size": size}
print(json.dumps(found))
"""


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (medium) from an fp32 file to `dtype`."""
    arch = options.arch or "medium"
    folder = random_checkpoint(arch)
    dtype_of(options.dtype)
    settings = (folder, options.device, options.dtype, options.threads)
    found = [run_apart(_PROGRAM, *settings) for _ in range(min(options.repeats, 2))]
    best = min(found, key=lambda one: one["seconds"])
    what = f"load {arch} from fp32 in {options.dtype}"
    file_bytes = (folder / "model.safetensors").stat().st_size
    held = arch == "medium" and options.dtype == "bf16"
    host = Figure(
        f"{what}: host memory / its size of {best['size'] / 1e9:.2f} GB",
        max(one["own"] for one in found) / best["size"],
        "×",
        BAR if held else None,
        note=f"the process's own memory; with mapped pages of the file, which the system takes back at will, at most "
        f"{best['mapped'] / best['size']:.2f} ×",
    )
    figures = [
        Figure(what, best["seconds"], "s", note=f"{file_bytes / best['seconds'] / 1e9:.2f} GB/s of the file"),
        host,
    ]
    if options.device.startswith("cuda"):
        figures.append(Figure(f"{what}: device memory", best["device"] / 1e9, "GB"))
    return figures
