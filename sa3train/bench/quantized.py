"""The frozen base in few bits: what a training step takes, what the weights hold, and what the rounding costs in loss.

The step is that of `sa3-bench adapters` (dora-rows of rank 16, forward and backward), on the coded base and on the
whole one in turn. The loss is that of the bare base on fixed clips, noise and ten noise levels, as a run judges
held-out clips; on random weights it says how far rounding moves the model, not how it would sound.
Shapes: B items, C latent channels, T latent frames.
"""

import torch
from torch import Tensor

from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.bench.adapters import RANK, adapter_step, random_batch, velocity, weight_bytes
from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import Timings, dtype_of, interleaved, own_threads
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.training.quantization import KINDS, CodedWeights, round_weights, weights_of

CLIPS, LEVELS = 2, 10
SPEC = AdapterSpec("dora-rows", rank=RANK)


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (small) on crops of 258 frames, or of `seconds`, for every kind of codes."""
    folder, dtype = random_checkpoint(options.arch or "small"), dtype_of(options.dtype)
    with own_threads(options.threads):
        whole = load_checkpoint(folder, options.device, dtype, parts=("dit", "conditioner"))
        batch = random_batch(whole, options)
        exact, held = judged(whole, batch), weight_bytes(whole)
        whole_step = adapter_step(whole, inject(whole.adaptable(), SPEC), batch)
        figures = []
        for kind in KINDS:
            model = load_checkpoint(folder, options.device, dtype, parts=("dit", "conditioner"))
            round_weights(model.dit, kind)
            rounded = judged(model, batch)
            injected = inject(model.adaptable(), SPEC)
            saved = sum(weight.nbytes for weight in weights_of(model.dit).values())
            saved -= CodedWeights(model.dit, kind).nbytes
            tasks = {"whole": whole_step, "coded": adapter_step(model, injected, batch)}
            timings = interleaved(tasks, options.repeats, options.device)
            figures += _figures(options, kind, timings, held, saved, rounded, exact)
        return figures


def _figures(
    options: Options,
    kind: str,
    timings: Timings,
    held: int,
    saved: int,
    rounded: tuple[float, Tensor],
    exact: tuple[float, Tensor],
) -> list[Figure]:
    what = f"train {options.arch or 'small'}, {options.dtype}, base in {kind}"
    seconds = f"{timings.median('coded'):.2f} s against {timings.median('whole'):.2f} s"
    sizes = (
        f"{(held - saved) / 1e9:.3g} GB against {held / 1e9:.3g} GB in {options.dtype}; one layer is whole at a time"
    )
    error = ((rounded[1] - exact[1]).norm() / exact[1].norm()).item()
    losses = f"{rounded[0]:.4f} against {exact[0]:.4f}; velocities differ by {error:.2%} of their length"
    change = 100 * (rounded[0] / exact[0] - 1)
    return [
        Figure(
            f"{what}: step / on the whole base",
            timings.ratio("coded", "whole"),
            "×",
            note=f"{seconds}; {timings.spread('coded', 'whole')}",
        ),
        Figure(f"{what}: frozen weights / whole", (held - saved) / held, "×", note=sizes),
        Figure(f"{what}: the base's own loss, change by rounding", change, "%", note=losses),
    ]


@torch.no_grad()
def judged(model: StableAudio3, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """The flow-matching loss on fixed clips of noise and noise levels, and all velocities (B, C, T) end to end."""
    generator = torch.Generator().manual_seed(1)
    losses, found = [], []
    for _ in range(CLIPS):
        data_BCT, noise_BCT = (
            torch.randn(batch["data_BCT"].shape, generator=generator).to(batch["data_BCT"]) for _ in range(2)
        )
        for level in torch.linspace(0.05, 0.95, LEVELS).tolist():
            velocity_BCT = velocity(model, batch, (1 - level) * data_BCT + level * noise_BCT, level).float()
            losses.append((velocity_BCT - (noise_BCT - data_BCT)).square().mean().item())
            found.append(velocity_BCT)
    return sum(losses) / len(losses), torch.cat(found)
