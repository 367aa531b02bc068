"""Training on a quantized base: time of a step, size of the weights, and change of the loss.

The step is that of `sa3-bench adapters` (dora-rows of rank 16, forward and backward), on the quantized base and on the
whole one in turn. The loss is that of the base without adapter on fixed clips, noise and ten noise levels, as in a
run's validation; with random weights it shows how far rounding moves the model, not how it would sound.
Shapes: B items, C latent channels, T latent frames.
"""

import torch
from torch import Tensor

from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.bench.adapters import RANK, compute_velocity, count_weight_bytes, make_adapter_step, make_random_batch
from sa3train.bench.checkpoints import make_random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import time_interleaved, use_threads
from sa3train.core.dtypes import get_dtype
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.training.quantization import METHODS, QuantizedBase, list_quantizable_weights, round_weights

CLIPS, LEVELS = 2, 10
SPEC = AdapterSpec("dora-rows", rank=RANK)


def run(options: Options) -> list[Figure]:
    """Measure training on the base in each quantization.

    Args:
        options: `arch` (default small), `seconds` of the crop (default: 258 frames).

    Returns:
        For each quantization: time of a step and bytes of the weights relative to the whole base, and the loss.
    """
    arch = options.arch or "small"
    folder, dtype = make_random_checkpoint(arch), get_dtype(options.dtype)
    figures = []
    with use_threads(options.threads):
        whole = load_checkpoint(folder, options.device, dtype, parts=("dit", "conditioner"))
        batch = make_random_batch(whole, options)
        (exact_loss, exact_velocities), size = _evaluate_base(whole, batch), count_weight_bytes(whole)
        whole_step = make_adapter_step(whole, inject(whole.get_adapter_root(), SPEC), batch)
        for kind in METHODS:
            model = load_checkpoint(folder, options.device, dtype, parts=("dit", "conditioner"))
            round_weights(model.dit, kind)
            loss, velocities = _evaluate_base(model, batch)
            injected = inject(model.get_adapter_root(), SPEC)
            rest = size - sum(weight.nbytes for weight in list_quantizable_weights(model.dit).values())
            rest += QuantizedBase(model.dit, kind).nbytes
            tasks = {"whole": whole_step, "quantized": make_adapter_step(model, injected, batch)}
            timings = time_interleaved(tasks, options.repeats, options.device)
            error = ((velocities - exact_velocities).norm() / exact_velocities.norm()).item()
            what = f"train {arch}, {options.dtype}, base in {kind}"
            note = f"{rest / 1e9:.3g} GB against {size / 1e9:.3g} GB in {options.dtype}; one layer at a time is whole"
            change = 100 * (loss / exact_loss - 1)
            loss_note = f"{loss:.4f} against {exact_loss:.4f}; velocities differ by {100 * error:.2f}% of their norm"
            figures += [
                timings.compare(f"{what}: step / on the whole base", "quantized", "whole"),
                Figure(f"{what}: frozen weights / whole", rest / size, "×", note=note),
                Figure(f"{what}: the base's own loss, change by rounding", change, "%", note=loss_note),
            ]
    return figures


@torch.no_grad()
def _evaluate_base(model: StableAudio3, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Compute the flow-matching loss on fixed clips of noise and noise levels, and all velocities concatenated."""
    generator = torch.Generator().manual_seed(1)
    losses, velocities = [], []
    for _ in range(CLIPS):
        data_BCT, noise_BCT = (
            torch.randn(batch["data_BCT"].shape, generator=generator).to(batch["data_BCT"]) for _ in range(2)
        )
        for level in torch.linspace(0.05, 0.95, LEVELS).tolist():
            velocity_BCT = compute_velocity(model, batch, (1 - level) * data_BCT + level * noise_BCT, level).float()
            losses.append((velocity_BCT - (noise_BCT - data_BCT)).square().mean().item())
            velocities.append(velocity_BCT)
    return sum(losses) / len(losses), torch.cat(velocities)
