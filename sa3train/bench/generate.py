"""Generation: the denoiser against exact fp32 and its roofline, with baked adapters, and whole generations.

Shapes: B items, C latent channels, T latent frames, L context tokens, D widths.
"""

import functools
import itertools
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.bench.checkpoints import load_random_model, make_random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import Timings, measure_peak_allocation, run_in_subprocess, time_interleaved, use_threads
from sa3train.bench.roofline import count_dit_sampling, measure_rates
from sa3train.bench.tasks import measure_generation
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.diffusion.schedule import build_schedule
from sa3train.inference import Generator
from sa3train.inference.resolve import count_generated_frames, count_real_frames
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.int8_linear import find_int8_fault, quantize_linears

DENOISER_TARGET, ROOFLINE_TARGET, ADAPTER_TARGET, STRENGTH_TARGET = 0.40, 1.6, 1.03, 0.25
CUDA_TARGETS: dict[tuple[str, float], tuple[float | None, float | None]] = {
    ("medium", 120): (0.30, 5.0),
    ("small", 30): (0.10, None),
}
"""By architecture and duration: seconds and gigabytes of a generation in 8 steps on an H200."""
EXACT_BYTES = {"nano": 0.1e9, "small": 3e9, "medium": 9e9}
"""Memory that the fp32 model needs beside the other."""
PROMPT = "warm analog synthesizer melody over a slow drum loop"


def run(options: Options) -> list[Figure]:
    """Measure the denoiser and whole generations.

    Args:
        options: `arch` (default small), `seconds` (default 30), `steps`.

    Returns:
        Times and memory.
    """
    arch, seconds = options.arch or "small", options.seconds or 30.0
    with use_threads(options.threads), torch.no_grad():
        fast = load_random_model(arch, options, "dit", "conditioner")
        figures = _measure_denoiser(options, arch, seconds, fast)
        figures += _measure_with_adapters(options, arch, seconds, fast)
        del fast
        return figures + _measure_whole_generation(options, arch, seconds)


def make_inputs(model: StableAudio3, seconds: float, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Make random inputs of the denoiser for one generation.

    Args:
        model: The model.
        seconds: Duration of the audio.
        device: Device of the inputs.

    Returns:
        Start latents (B, C, T), and the conditions by the parameter's name.
    """
    config, generator = model.config.dit, torch.Generator().manual_seed(0)
    facts = Generator(model).facts
    frames = count_generated_frames(facts, seconds)
    real = count_real_frames(facts, seconds, frames)
    randn = functools.partial(torch.randn, generator=generator)
    conditions = {
        "cross_attn_cond_BLD": randn(1, model.conditioner.max_length + 1, config.context_width),
        "global_cond_BD": randn(1, config.global_width),
        "local_add_cond_BCT": torch.zeros(1, config.local_width, frames),
        "attention_mask_BT": (torch.arange(frames) < real)[None],
    }
    start_BCT = randn(1, config.latent_width, frames).to(device)
    return start_BCT, {name: tensor.to(device) for name, tensor in conditions.items()}


def denoise(model: StableAudio3, start_BCT: Tensor, conditions: dict[str, Tensor], steps: int) -> Tensor:
    """Run all steps of a generation: the conditions once, then the sampler.

    Args:
        model: The model.
        start_BCT: Noise.
        conditions: Conditions of `make_inputs`.
        steps: Sampling steps.

    Returns:
        Latents (B, C, T).
    """
    prepared = model.dit.prepare(start_BCT.shape, **conditions)

    def velocity(x_BCT: Tensor, t: Tensor) -> Tensor:
        return model.dit.predict_velocity(x_BCT, t.to(x_BCT.device).expand(x_BCT.shape[0]), prepared)

    sampler = SAMPLERS["pingpong" if model.objective == "rf_denoiser" else "euler"].sample
    return sampler(velocity, start_BCT, build_schedule(steps), generator=torch.Generator().manual_seed(0))


def _measure_denoiser(options: Options, arch: str, seconds: float, fast: StableAudio3) -> list[Figure]:
    start_BCT, conditions = make_inputs(fast, seconds, options.device)
    tasks: dict[str, Callable[[], object]] = {"fast": lambda: denoise(fast, start_BCT, conditions, options.steps)}
    if options.device == "cpu" and not find_int8_fault():
        integers = load_random_model(arch, options, "dit", "conditioner")
        quantize_linears(integers.dit.transformer.layers)
        tasks["int8"] = lambda: denoise(integers, start_BCT, conditions, options.steps)
    exact = _load_exact_model(options, arch)
    if exact is not None:
        tasks["exact"] = lambda: denoise(exact, start_BCT, conditions, options.steps)
    before = measure_rates(options)
    timings = time_interleaved(tasks, options.repeats, options.device)
    after = measure_rates(options)
    rates = max(before, after, key=lambda rates: rates.flops)
    frames, context = start_BCT.shape[-1], fast.conditioner.max_length + 1
    cost = count_dit_sampling(fast.config.dit, frames, context, options.steps)
    roofline = cost.compute_seconds(rates)
    memory = measure_peak_allocation(lambda: denoise(fast, start_BCT, conditions, 1), options.device)
    what = f"{arch} denoiser, {seconds:g} s, {options.steps} steps, {options.dtype}"
    has_target = arch == "small" and options.device == "cpu"
    figures = [Figure(f"{what}, median of {options.repeats}", timings.median("fast"), "s")]
    if exact is not None:
        target = DENOISER_TARGET if has_target else None
        figures.append(timings.compare(f"{what} / exact fp32", "fast", "exact", target))
    if "int8" in tasks:
        figures.append(timings.compare(f"{what} / int8", "fast", "int8"))
    note = (
        f"roofline {roofline:.2f} s = {cost.flops / 1e12:.2f} Tflop at {rates.flops / 1e9:.0f} Gflop/s; "
        f"fastest round {timings.best('fast') / roofline:.2f} ×"
    )
    target = ROOFLINE_TARGET if has_target else None
    return [
        *figures,
        Figure(f"{what} / roofline", timings.median("fast") / roofline, "×", target, note=note),
        Figure(f"{what}: working memory besides the weights", memory / 1e9, "GB"),
    ]


def _load_exact_model(options: Options, arch: str) -> StableAudio3 | None:
    """Load the fp32 model to compare with, if it fits beside the other."""
    if options.dtype == "fp32" or (options.device == "cpu" and psutil.virtual_memory().available < EXACT_BYTES[arch]):
        return None
    return load_random_model(arch, options, "dit", "conditioner", dtype="fp32")


def _make_random_adapter(model: StableAudio3, adapter_type: str, seed: int) -> Adapter:
    """Make an adapter of rank 16 on every layer, with a small random effect."""
    injected = inject(model.get_adapter_root(), AdapterSpec(adapter_type, rank=16))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    adapter = injected.export()
    injected.remove()
    model.get_adapter_root().requires_grad_(False)
    return adapter


def _measure_with_adapters(options: Options, arch: str, seconds: float, model: StableAudio3) -> list[Figure]:
    """Measure the denoiser with 0, 1 and 3 baked adapters, in turn, and the time that another strength takes."""
    start_BCT, conditions = make_inputs(model, seconds, options.device)
    with torch.enable_grad():
        adapters = [_make_random_adapter(model, name, seed) for seed, name in enumerate(("dora-rows", "lora", "bora"))]
    stack = AdapterStack(model.get_adapter_root())
    for adapter in adapters:
        stack.add(adapter, 0.0)
    names = {0: "none", 1: "1 baked adapter", 3: "3 baked adapters"}
    timings = Timings({name: [] for name in names.values()}, {name: [] for name in names.values()})
    for _ in range(options.repeats):
        for count, name in names.items():
            for index in range(len(adapters)):
                stack.set_strength(0.7 if index < count else 0.0, index)
            stack.apply()
            step = time_interleaved({name: lambda: denoise(model, start_BCT, conditions, 1)}, 1, options.device)
            timings.rounds[name] += step.rounds[name]
            timings.processor[name] += step.processor[name]
    strengths = itertools.cycle((0.3, 0.8))
    stack.set_strength(0.0)

    def change_strength() -> None:
        stack.set_strength(next(strengths), 0)
        stack.apply()

    changes = time_interleaved({"change": change_strength}, options.repeats, options.device)
    stack.clear()
    has_target = options.device == "cpu" and arch == "small"
    target = ADAPTER_TARGET if has_target else None
    return [
        *(
            timings.compare(f"{arch} denoiser with {names[count]} / without", names[count], names[0], target)
            for count in (1, 3)
        ),
        Figure(
            f"{arch}: another strength of a dora-rows adapter",
            changes.median("change"),
            "s",
            STRENGTH_TARGET if has_target else None,
            note=f"fastest round {changes.best('change'):.2f} s",
        ),
    ]


def _measure_whole_generation(options: Options, arch: str, seconds: float) -> list[Figure]:
    """Measure `Generator.generate`: text, denoiser and decoder, as a user waits for them."""
    what = f"{arch} {seconds:g} s, {options.steps} steps, {options.dtype}, whole generation"
    has_target = options.is_cuda and options.steps == 8
    target, memory_target = CUDA_TARGETS.get((arch, seconds), (None, None)) if has_target else (None, None)
    settings = (str(make_random_checkpoint(arch)), options.device, options.dtype, options.threads, PROMPT, seconds)
    figures = []
    for uses_cuda_graphs in (False, True) if options.is_cuda else (False,):
        rounds = max(1, options.repeats // 2)
        measured = run_in_subprocess(measure_generation, *settings, options.steps, rounds, uses_cuda_graphs)
        name = f"{what} with CUDA graphs" if uses_cuda_graphs else what
        note = ""
        if "similarity" in measured:
            note = f"latents against those without graphs: cosine similarity 1 − {1 - measured['similarity']:.1e}"
        figures += [
            Figure(f"{name}, text and decoder included", measured["seconds"], "s", target, note=note),
            Figure(f"{name}: peak memory, weights included", measured["peak"] / 1e9, "GB", memory_target),
        ]
    return figures
