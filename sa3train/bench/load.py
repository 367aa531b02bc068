"""Loading a checkpoint: seconds and host memory, each time in a process of its own.

Memory is what the process owns (anonymous pages), sampled while loading. Pages of the mapped file belong to the cache
of the system, which takes them back when it needs them; the note states them.
"""

from sa3train.bench.checkpoints import make_random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import run_in_subprocess
from sa3train.bench.tasks import measure_loading

TARGET = 1.2


def run(options: Options) -> list[Figure]:
    """Measure loading of an fp32 checkpoint in `dtype`.

    Args:
        options: `arch` (default medium).

    Returns:
        Time and memory.
    """
    arch = options.arch or "medium"
    folder = make_random_checkpoint(arch)
    settings = (str(folder), options.device, options.dtype, options.threads)
    rounds = [run_in_subprocess(measure_loading, *settings) for _ in range(min(options.repeats, 2))]
    best = min(rounds, key=lambda one: one["seconds"])
    what = f"load {arch} from fp32 in {options.dtype}"
    file_bytes = (folder / "model.safetensors").stat().st_size
    memory = f"{what}: host memory / its size of {best['size'] / 1e9:.2f} GB"
    ratio = max(one["own"] for one in rounds) / best["size"]
    target = TARGET if arch == "medium" and options.dtype == "bf16" else None
    note = (
        "the process's own memory; with mapped pages of the file, which the system can take back, at most "
        f"{best['mapped'] / best['size']:.2f} ×"
    )
    figures = [
        Figure(what, best["seconds"], "s", note=f"{file_bytes / best['seconds'] / 1e9:.2f} GB/s of the file"),
        Figure(memory, ratio, "×", target, note=note),
    ]
    if options.is_cuda:
        figures.append(Figure(f"{what}: device memory", best["device"] / 1e9, "GB"))
    return figures
