"""A training step with each adapter type against the frozen-base baseline.

Step: conditions, forward, loss, backward to the adapter's parameters (no optimizer). Baseline: the same frozen DiT,
forward and backward to its input. The two run in turn.
Shapes: B items, C latent channels, T latent frames, L text tokens, D widths.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sa3train.adapters.layers.inject import InjectedAdapter, inject
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.bench.checkpoints import load_random_model
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import measure_peak_allocation, time_interleaved, use_threads
from sa3train.bench.roofline import count_dit_training, measure_rates
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.conditioners import TextEmbedding

FRAMES, RANK = 258, 16
MEMORY_TARGET = 15  # %
TARGETS = {"lora": 1.25, "dora-rows": 1.45, "bora": 1.8}
TARGETS |= dict.fromkeys(("lora-xs", "dora-rows-xs", "dora-cols-xs", "bora-xs"), 1.4)


def run(options: Options) -> list[Figure]:
    """Measure training steps of all adapter types on one crop.

    Args:
        options: `arch` (default small), `seconds` of the crop (default: 258 frames), `adapter_types`.

    Returns:
        Time and memory of each step relative to the baseline.
    """
    arch = options.arch or "small"
    with use_threads(options.threads):
        frozen, adapted = (load_random_model(arch, options, "dit", "conditioner") for _ in range(2))
        batch = make_random_batch(frozen, options)
        rates = measure_rates(options)
        frames, context = batch["data_BCT"].shape[-1], frozen.conditioner.max_length + 1
        roofline = count_dit_training(frozen.config.dit, frames, context).compute_seconds(rates)
        baseline = make_frozen_step(frozen, batch)
        baseline_memory = count_weight_bytes(frozen) + measure_peak_allocation(baseline, options.device)
        has_target = arch == "small" and options.device == "cpu"
        figures = []
        for adapter_type in options.adapter_types or KINDS:
            injected = inject(adapted.get_adapter_root(), AdapterSpec(adapter_type, rank=RANK))
            step = make_adapter_step(adapted, injected, batch)
            timings = time_interleaved({"baseline": baseline, "adapter": step}, options.repeats, options.device)
            weights = count_weight_bytes(adapted) + sum(parameter.nbytes for parameter in injected.parameters())
            memory = weights + measure_peak_allocation(step, options.device)
            injected.remove()
            adapted.get_adapter_root().requires_grad_(False)
            target, memory_target = (TARGETS.get(adapter_type), MEMORY_TARGET) if has_target else (None, None)
            figures.append(timings.compare(f"{adapter_type} step / baseline", "adapter", "baseline", target))
            more = 100 * (memory / baseline_memory - 1)
            note = f"{memory / 1e9:.2f} GB against {baseline_memory / 1e9:.2f} GB, weights included"
            figures.append(Figure(f"{adapter_type} memory above the baseline", more, "%", memory_target, note=note))
        seconds = time_interleaved({"baseline": baseline}, options.repeats, options.device).median("baseline")
    what = f"{arch} frozen-base baseline (forward and backward), {frames} frames, {options.dtype}"
    return [
        Figure(f"{what}, median of {options.repeats}", seconds, "s"),
        Figure(f"{what} / roofline", seconds / roofline, "×", note=f"roofline {roofline:.2f} s"),
        *figures,
    ]


def make_random_batch(model: StableAudio3, options: Options) -> dict[str, Tensor]:
    """Make one item of noise, its target, and a text embedding of 40 tokens.

    Args:
        model: Model whose shapes it has.
        options: `device`, and `seconds` (default: 258 frames).

    Returns:
        "data_BCT", "target_BCT", "local_BCT" and "hidden_BLD".
    """
    generator, dit = torch.Generator().manual_seed(0), model.config.dit
    frames = FRAMES
    if options.seconds is not None:
        frames = int(options.seconds * model.sample_rate) // model.downsampling_ratio
    shape = (1, dit.latent_width, frames)
    batch = {
        "data_BCT": torch.randn(shape, generator=generator),
        "target_BCT": torch.randn(shape, generator=generator),
        "local_BCT": torch.zeros(1, dit.local_width, frames),
        "hidden_BLD": torch.randn(1, min(40, model.conditioner.max_length), dit.context_width, generator=generator),
    }
    return {name: tensor.to(options.device) for name, tensor in batch.items()}


def compute_velocity(model: StableAudio3, batch: dict[str, Tensor], x_BCT: Tensor, t: float = 0.5) -> Tensor:
    """Compute the model's velocity, conditions included.

    Args:
        model: The model.
        batch: A batch of `make_random_batch`.
        x_BCT: Noisy latents.
        t: Noise level in [0, 1].

    Returns:
        The velocity (B, C, T).
    """
    hidden_BLD = batch["hidden_BLD"]
    mask_BL = torch.ones(hidden_BLD.shape[:2], dtype=torch.bool, device=hidden_BLD.device)
    conditions = model.conditioner.condition(
        TextEmbedding(hidden_BLD, mask_BL), torch.tensor([24.0], device=hidden_BLD.device)
    )
    velocity_BCT: Tensor = model.dit(
        x_BCT,
        torch.tensor([t], device=x_BCT.device),
        cross_attn_cond_BLD=conditions.cross_attn_cond_BLD,
        global_cond_BD=conditions.global_cond_BD,
        local_add_cond_BCT=batch["local_BCT"],
    )
    return velocity_BCT


def _compute_loss(model: StableAudio3, batch: dict[str, Tensor], x_BCT: Tensor) -> Tensor:
    return (compute_velocity(model, batch, x_BCT).float() - batch["target_BCT"]).square().mean()


def make_frozen_step(model: StableAudio3, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Make the frozen-base baseline: forward, and backward to the input; no parameter is trained.

    Args:
        model: A frozen model.
        batch: A batch of `make_random_batch`.

    Returns:
        A function that runs one step.
    """

    def step() -> Tensor:
        x_BCT = batch["data_BCT"].clone().requires_grad_()
        (gradient_BCT,) = torch.autograd.grad(_compute_loss(model, batch, x_BCT), x_BCT)
        return gradient_BCT

    return step


def make_adapter_step(model: StableAudio3, injected: InjectedAdapter, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Make a training step: forward, and backward to the adapter's parameters.

    Args:
        model: A model with an injected adapter.
        injected: The adapter.
        batch: A batch of `make_random_batch`.

    Returns:
        A function that runs one step.
    """
    parameters = injected.parameters()

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = _compute_loss(model, batch, batch["data_BCT"])
        loss.backward()
        return loss.detach()

    return step


def count_weight_bytes(model: StableAudio3) -> int:
    """Count the bytes of the frozen DiT and conditioner.

    Args:
        model: The model.

    Returns:
        Bytes.
    """
    return sum(tensor.nbytes for tensor in model.get_adapter_root().state_dict().values())
