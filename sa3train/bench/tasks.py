"""What runs in a process of its own, through `measure.run_in_subprocess`: whole benchmarks, and tasks of some.

Imports are inside the functions, so that a process loads what its task needs and nothing else.
"""

import importlib
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sa3train.bench.figures import Options, Record


def run_benchmark(name: str, options: "Options") -> "Record":
    """Run a benchmark in this process.

    Args:
        name: Name of its module in `sa3train.bench`.
        options: Its options.

    Returns:
        Its figures, with what is needed to measure them again.

    Raises:
        ConfigError: There is no such device.
    """
    from sa3train.bench.figures import Record, describe_machine
    from sa3train.core.device import choose_device, limit_to_cores

    threads = limit_to_cores("--threads", options.threads)
    options = replace(options, device=str(choose_device(options.device)), threads=threads)
    bench = importlib.import_module(f"sa3train.bench.{name}")
    return Record(name, options, bench.run(options), describe_machine(options.device))


def measure_benchmark(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run a benchmark, with arguments and result of types that JSON has.

    Args:
        name: Name of the benchmark.
        options: Fields of `Options`.

    Returns:
        Its record.
    """
    from sa3train.bench.figures import Options

    fields = {**options, "adapter_types": tuple(options["adapter_types"])}
    return run_benchmark(name, Options(**fields)).as_json()


def measure_loading(folder: str, device: str, dtype: str, threads: int) -> dict[str, float]:
    """Measure the time and memory of loading a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        device: Device to load it to.
        dtype: "fp32", "bf16" or "fp16".
        threads: CPU threads.

    Returns:
        "seconds"; in bytes "own" (anonymous host memory), "mapped" (with mapped file pages), "device" and "size" (of
        all tensors).
    """
    import torch

    from sa3train.bench.measure import PeakMemory, wait
    from sa3train.core.dtypes import get_dtype
    from sa3train.models.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    torch.zeros(1, device=device)
    with PeakMemory() as host, PeakMemory(device) as on_device:
        start = time.perf_counter()
        model = load_checkpoint(folder, device, get_dtype(dtype))
        wait(device)
        seconds = time.perf_counter() - start
    modules = (model.dit, model.conditioner, model.autoencoder)
    size = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    memory = {"own": host.bytes, "mapped": host.with_files, "device": on_device.bytes}
    return {"seconds": seconds, "size": size, **memory}


def measure_generation(
    folder: str, device: str, precision: str, threads: int, prompt: str, seconds: float, steps: int, repeats: int,
    uses_cuda_graphs: bool,
) -> dict[str, float]:  # fmt: skip
    """Measure whole generations: text encoder, denoiser and decoder.

    Args:
        folder: Folder of the checkpoint.
        device: Device to generate on.
        precision: "fp32", "bf16" or "fp16".
        threads: CPU threads.
        prompt: Text prompt.
        seconds: Duration of the audio.
        steps: Sampling steps.
        repeats: Measured generations.
        uses_cuda_graphs: Whether the denoiser runs as CUDA graphs.

    Returns:
        "seconds" (median); "peak" in bytes, weights included; with CUDA graphs, "similarity": the cosine similarity of
        the latents with those made without.
    """
    import torch

    from sa3train.bench.measure import PeakMemory, time_interleaved
    from sa3train.inference import Generator

    torch.set_num_threads(threads)
    with PeakMemory(device) as memory:
        generator = Generator.from_pretrained(folder, device, precision, cuda_graphs=uses_cuda_graphs)

        def generate() -> Any:
            return generator.generate(prompt, duration=seconds, steps=steps, seed=1, return_latents=True)

        timings = time_interleaved({"generate": generate}, repeats, device)
    measured = {"seconds": timings.median("generate"), "peak": float(memory.bytes)}
    if generator.cuda_graphs:
        recorded = generate().latents.flatten().double()
        generator.cuda_graphs = False
        plain = generate().latents.flatten().double()
        measured["similarity"] = float(torch.nn.functional.cosine_similarity(recorded, plain, dim=0))
    return measured


def measure_training(arguments: list[str], device: str, waits: list[int]) -> dict[str, Any]:
    """Measure a run of `sa3-train`.

    Args:
        arguments: Command line of `sa3-train`.
        device: Device it trains on.
        waits: Marks before which the device is waited for, counted from 0.

    Returns:
        "times": seconds at the start of each step and at the end of its backward pass, in turn; "memory": peak bytes.
    """
    from sa3train.bench.measure import PeakMemory, wait
    from sa3train.training.module import LoraModule

    times: list[float] = []

    def mark(*_: object) -> None:
        if len(times) in waits:
            wait(device)
        times.append(time.perf_counter())

    LoraModule.on_train_batch_start = LoraModule.on_after_backward = mark  # type: ignore[assignment]
    with PeakMemory(device) as memory:
        # Imported by name: benchmarks lie below the commands that they measure.
        if code := importlib.import_module("sa3train.cli.train").main(arguments):
            sys.exit(code)
    return {"times": times, "memory": memory.bytes}
