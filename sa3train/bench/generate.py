"""Generation: the denoiser's steps against exact fp32 and against its floor, adapters baked in, and whole requests.

Shapes: B items, C latent channels, T latent frames, L context tokens, D widths.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import available_memory, dtype_of, interleaved, own_threads, peak_allocated, run_apart
from sa3train.bench.roofline import Cost, dit_conditions, dit_step, measured_rates
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.diffusion.schedule import sampling_schedule
from sa3train.inference import Generator
from sa3train.inference.request import generated_frames, real_frames
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.precision import fast_fp32_products

DENOISER_BAR, FLOOR_BAR, ADAPTER_BAR = 0.40, 1.6, 1.03
PROMPT = "warm analog synthesizer melody over a slow drum loop"


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (small) for `seconds` (30) in `steps` (8)."""
    arch, seconds = options.arch or "small", options.seconds or 30.0
    with own_threads(options.threads), torch.no_grad():
        folder = random_checkpoint(arch)
        fast = load_checkpoint(folder, options.device, dtype_of(options.dtype), parts=("dit", "conditioner"))
        figures = _denoiser(options, arch, seconds, fast)
        figures += _with_adapters(options, arch, seconds, fast)
        del fast
        return figures + _whole(options, arch, seconds)


def inputs(model: StableAudio3, seconds: float, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Start latents and conditions of a request of `seconds`, random."""
    config, generator = model.config.dit, torch.Generator().manual_seed(0)
    frames = generated_frames(Generator(model).facts, seconds)
    real = real_frames(Generator(model).facts, seconds, frames)
    draw = functools.partial(torch.randn, generator=generator)
    conditions = {
        "cross_attn_cond_BLD": draw(1, model.conditioner.max_length + 1, config.context_width),
        "global_cond_BD": draw(1, config.global_width),
        "local_add_cond_BCT": torch.zeros(1, config.local_width, frames),
        "padding_mask_BT": (torch.arange(frames) < real)[None],
    }
    start_BCT = draw(1, config.latent_width, frames).to(device)
    return start_BCT, {name: tensor.to(device) for name, tensor in conditions.items()}


def denoise(model: StableAudio3, start_BCT: Tensor, conditions: dict[str, Tensor], steps: int) -> Tensor:
    """All steps of a request: conditions worked out once, then the sampler."""
    prepared = model.dit.prepare(start_BCT.shape, **conditions)

    def velocity(x_BCT: Tensor, t: Tensor) -> Tensor:
        return model.dit.velocity(x_BCT, t.to(x_BCT.device).expand(x_BCT.shape[0]), prepared)

    sampler = SAMPLERS["pingpong" if model.objective == "rf_denoiser" else "euler"]
    return sampler(velocity, start_BCT, sampling_schedule(steps), generator=torch.Generator().manual_seed(0))


def request_cost(model: StableAudio3, frames: int, steps: int) -> Cost:
    """What `denoise` cannot avoid computing."""
    context = model.conditioner.max_length + 1
    return dit_conditions(model.config.dit, frames, context) + dit_step(model.config.dit, frames, context) * steps


def _denoiser(options: Options, arch: str, seconds: float, fast: StableAudio3) -> list[Figure]:
    start_BCT, conditions = inputs(fast, seconds, options.device)
    tasks: dict[str, Callable[[], object]] = {
        "fast": lambda: denoise(fast, start_BCT, conditions, options.steps),
    }
    exact = _exact_model(options, arch)
    if exact is not None:
        tasks["exact"] = lambda: denoise(exact, start_BCT, conditions, options.steps)
    rates = measured_rates(dtype_of(options.dtype), options.device, options.repeats)
    timings = interleaved(tasks, options.repeats, options.device)
    again = measured_rates(dtype_of(options.dtype), options.device, options.repeats)
    rates = max(rates, again, key=lambda found: found.flops)
    cost = request_cost(fast, start_BCT.shape[-1], options.steps)
    floor = cost.seconds(rates, dtype_of(options.dtype).itemsize)
    memory = peak_allocated(lambda: denoise(fast, start_BCT, conditions, 1), options.device)
    what = f"{arch} denoiser, {seconds:g} s, {options.steps} steps, {options.dtype}"
    held = arch == "small" and options.device == "cpu"
    figures = [
        Figure(f"{what}, median of {options.repeats}", timings.median("fast"), "s"),
        Figure(
            f"{what} / roofline floor",
            timings.median("fast") / floor,
            "×",
            FLOOR_BAR if held else None,
            note=f"floor {floor:.2f} s = {cost.flops / 1e12:.2f} Tflop at {rates.flops / 1e9:.0f} Gflop/s; fastest "
            f"round {timings.best('fast') / floor:.2f} ×",
        ),
        Figure(f"{what}: working memory over the weights", memory / 1e9, "GB"),
    ]
    if exact is not None:
        bar = DENOISER_BAR if held else None
        note = f"fp32 takes {timings.median('exact'):.2f} s; {timings.spread('fast', 'exact')}"
        figures.insert(1, Figure(f"{what} / exact fp32", timings.ratio("fast", "exact"), "×", bar, note=note))
    if exact is not None and fast_fp32_products():
        step = {
            "fast": lambda: denoise(fast, start_BCT, conditions, 1),
            "plain": lambda: _as_torch_comes(lambda: denoise(exact, start_BCT, conditions, 1)),
        }
        plain = interleaved(step, min(options.repeats, 3), options.device)
        note = f"one step {plain.median('plain'):.2f} s; {plain.spread('fast', 'plain')}"
        name = f"{what} / exact fp32 without our choice of library for its products"
        figures.insert(2, Figure(name, plain.ratio("fast", "plain"), "×", note=note))
    return figures


def _as_torch_comes(task: Callable[[], object]) -> object:
    """Run `task` with fp32 products as torch does them by default."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return task()
    finally:
        torch.set_float32_matmul_precision(chosen)


def _exact_model(options: Options, arch: str) -> StableAudio3 | None:
    """The fp32 model to compare with, when it fits beside the other (medium's takes 6 GB more)."""
    needed, free = {"nano": 0.1e9, "small": 3e9, "medium": 9e9}[arch], available_memory()
    if options.dtype == "fp32" or (options.device == "cpu" and free is not None and free < needed):
        return None
    return load_checkpoint(random_checkpoint(arch), options.device, torch.float32, parts=("dit", "conditioner"))


def random_adapter(model: StableAudio3, kind: str, seed: int) -> Adapter:
    """An adapter of rank 16 on every layer, with a small random effect."""
    injected = inject(model.adaptable(), AdapterSpec(kind, rank=16))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    adapter = injected.export()
    injected.remove()
    model.adaptable().requires_grad_(False)
    return adapter


def _with_adapters(options: Options, arch: str, seconds: float, model: StableAudio3) -> list[Figure]:
    """The denoiser with 0, 1 and 3 adapters baked in, in turn."""
    start_BCT, conditions = inputs(model, seconds, options.device)
    with torch.enable_grad():
        adapters = [random_adapter(model, kind, seed) for seed, kind in enumerate(("dora-rows", "lora", "bora"))]
    stack = AdapterStack(model.adaptable())
    for adapter in adapters:
        stack.add(adapter, 0.0)
    rounds: dict[str, list[float]] = {"0": [], "1": [], "3": []}
    for _ in range(options.repeats):
        for name in rounds:
            for index in range(len(adapters)):
                stack.set_strength(0.7 if index < int(name) else 0.0, index)
            stack.apply()
            task = {name: lambda: denoise(model, start_BCT, conditions, 1)}
            rounds[name] += interleaved(task, 1, options.device).rounds[name]
    stack.clear()
    figures = []
    for name in ("1", "3"):
        ratios = sorted(mine / base for mine, base in zip(rounds[name], rounds["0"], strict=True))
        middle = ratios[len(ratios) // 2]
        figures.append(
            Figure(
                f"{arch} denoiser with {name} baked adapter{'s' if name != '1' else ''} / without",
                middle,
                "×",
                ADAPTER_BAR if options.device == "cpu" and arch == "small" else None,
                note=f"rounds from {ratios[0]:.3g} to {ratios[-1]:.3g}; fastest against fastest "
                f"{min(rounds[name]) / min(rounds['0']):.3g} ×",
            )
        )
    return figures


_PROGRAM = """
import json, statistics, sys, torch
from sa3train.inference import Generator
from sa3train.bench.measure import PeakMemory, interleaved
folder, device, dtype, threads, seconds, steps, repeats, prompt, graphs = sys.argv[1:]
torch.set_num_threads(int(threads))
with PeakMemory(device) as memory:
    generator = Generator.from_pretrained(folder, device, dtype, cuda_graphs=bool(int(graphs)))
    request = lambda: generator.generate(prompt, duration=float(seconds), steps=int(steps), seed=1, return_latents=True)
    timings = interleaved({"request": request}, int(repeats), device)
found = {"seconds": timings.median("request"), "peak": memory.bytes}
if generator.cuda_graphs:
    recorded = request().latents.flatten().double()
    generator.cuda_graphs = False
    plain = request().latents.flatten().double()
    found["likeness"] = float(torch.nn.functional.cosine_similarity(recorded, plain, dim=0))
print(json.dumps(found))
"""


def _whole(options: Options, arch: str, seconds: float) -> list[Figure]:
    """A request through `Generator.generate`: text, denoiser, decode, as a user waits for it."""
    settings = (random_checkpoint(arch), options.device, options.dtype, options.threads, seconds, options.steps)
    what = f"{arch} {seconds:g} s, {options.steps} steps, {options.dtype}, whole request"
    bar, memory_bar = _cuda_bars(replace(options, arch=arch, seconds=seconds))
    figures = []
    for graphs in (0, 1) if options.device.startswith("cuda") else (0,):
        found = run_apart(_PROGRAM, *settings, max(1, options.repeats // 2), PROMPT, graphs)
        name = f"{what} with CUDA graphs" if graphs else what
        likeness = found.get("likeness")
        note = "" if likeness is None else f"latents against those without: cosine similarity 1 − {1 - likeness:.1e}"
        figures += [
            Figure(f"{name}, incl. text and decode", found["seconds"], "s", bar, note=note),
            Figure(f"{name}: peak memory, weights included", found["peak"] / 1e9, "GB", memory_bar),
        ]
    return figures


def _cuda_bars(options: Options) -> tuple[float | None, float | None]:
    """Seconds and gigabytes asked of an H200."""
    if not options.device.startswith("cuda") or options.steps != 8:
        return None, None
    if options.arch == "medium" and options.seconds == 120:
        return 0.30, 5.0
    return (0.10 if options.arch == "small" and options.seconds == 30 else None), None
