"""A training step of each adapter kind against the floor: the same frozen DiT, forward plus backward to its input.

Step: conditions, forward, loss, backward to the adapter's parameters (no optimizer). Floor and kinds run in turn.
Shapes: B items, C latent channels, T latent frames, L text tokens, D widths.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sa3train.adapters.layers.inject import Injected, inject
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import dtype_of, interleaved, own_threads, peak_allocated
from sa3train.bench.roofline import dit_training_floor, measured_rates
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.conditioners import TextEmbedding

FRAMES, RANK = 258, 16
MEMORY_BAR = 0.15
BARS = {
    "lora": 1.25,
    "dora-rows": 1.45,
    "bora": 1.8,
    "lora-xs": 1.4,
    "dora-rows-xs": 1.4,
    "dora-cols-xs": 1.4,
    "bora-xs": 1.4,
}


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (small) on crops of 258 frames, or of `seconds`."""
    arch = options.arch or "small"
    with own_threads(options.threads):
        dtype, folder = dtype_of(options.dtype), random_checkpoint(arch)
        frozen = load_checkpoint(folder, options.device, dtype, parts=("dit", "conditioner"))
        adapted = load_checkpoint(folder, options.device, dtype, parts=("dit", "conditioner"))
        batch = random_batch(frozen, options)
        rates = measured_rates(dtype, options.device, options.repeats)
        frames, context = batch["data_BCT"].shape[-1], frozen.conditioner.max_length + 1
        floor = dit_training_floor(frozen.config.dit, frames, context).seconds(rates, dtype.itemsize)
        floor_step = frozen_step(frozen, batch)
        memory = weight_bytes(frozen) + peak_allocated(floor_step, options.device)
        figures = []
        for kind in options.kinds or KINDS:
            injected = inject(adapted.adaptable(), AdapterSpec(kind, rank=RANK))
            figures += _kind(options, arch, kind, adapted, injected, batch, floor_step, memory)
            injected.remove()
            adapted.adaptable().requires_grad_(False)
        again = interleaved({"floor": floor_step}, options.repeats, options.device)
    what = f"{arch} frozen forward and backward, {frames} frames, {options.dtype}"
    return [
        Figure(f"{what}, median of {options.repeats}", again.median("floor"), "s"),
        Figure(f"{what} / roofline floor", again.median("floor") / floor, "×", note=f"floor {floor:.2f} s"),
        *figures,
    ]


def _kind(
    options: Options,
    arch: str,
    kind: str,
    model: StableAudio3,
    injected: Injected,
    batch: dict[str, Tensor],
    floor_step: Callable[[], object],
    floor_memory: int,
) -> list[Figure]:
    step = adapter_step(model, injected, batch)
    timings = interleaved({"floor": floor_step, "kind": step}, options.repeats, options.device)
    own = sum(parameter.nbytes for parameter in injected.parameters())
    memory = weight_bytes(model) + own + peak_allocated(step, options.device)
    held = arch == "small" and options.device == "cpu"
    return [
        Figure(
            f"{kind} step / floor",
            timings.ratio("kind", "floor"),
            "×",
            BARS.get(kind) if held else None,
            note=f"{timings.median('kind'):.2f} s; {timings.spread('kind', 'floor')}",
        ),
        Figure(
            f"{kind} memory over the floor",
            memory / floor_memory - 1,
            "of it",
            MEMORY_BAR if held else None,
            note=f"{memory / 1e9:.2f} GB against {floor_memory / 1e9:.2f} GB, weights included",
        ),
    ]


def random_batch(model: StableAudio3, options: Options) -> dict[str, Tensor]:
    """One clip of noise, its target, and a text embedding of 40 tokens."""
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


def velocity(model: StableAudio3, batch: dict[str, Tensor], x_BCT: Tensor, t: float = 0.5) -> Tensor:
    """The model's velocity at noise level `t`, conditions and all."""
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


def _loss(model: StableAudio3, batch: dict[str, Tensor], x_BCT: Tensor) -> Tensor:
    return (velocity(model, batch, x_BCT).float() - batch["target_BCT"]).square().mean()


def frozen_step(model: StableAudio3, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward and backward to the input; nothing in the model is trained."""

    def step() -> Tensor:
        x_BCT = batch["data_BCT"].clone().requires_grad_()
        (gradient_BCT,) = torch.autograd.grad(_loss(model, batch, x_BCT), x_BCT)
        return gradient_BCT

    return step


def adapter_step(model: StableAudio3, injected: Injected, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward and backward to the adapter's parameters."""
    parameters = injected.parameters()

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = _loss(model, batch, batch["data_BCT"])
        loss.backward()
        return loss.detach()

    return step


def weight_bytes(model: StableAudio3) -> int:
    """Bytes of the frozen DiT and conditioner."""
    return sum(tensor.nbytes for tensor in model.adaptable().state_dict().values())
