"""What happens to the model on its device before the first step: quantization, memory plan, checkpointing, compile.

The plan says how much memory a run takes before it takes it. Activations are what autograd saves for the backward pass,
counted as it saves them, so the figure holds on any device. They grow linearly with the frames, so two short clips
measured tell what a long one takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as lightning
import psutil
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from sa3train.core.device import GIB, measure_device_memory, measure_peak_bytes
from sa3train.core.log import get_logger, report_stage
from sa3train.data.loading.clip_batch import ClipBatch
from sa3train.data.loading.datamodule import SAMPLE_RATE, SAMPLES_PER_FRAME, LatentDataModule
from sa3train.models import norms
from sa3train.models.dit import compile_blocks
from sa3train.training.module import LoraModule
from sa3train.training.quantization import QuantizedBase
from sa3train.training.settings import TrainerSettings
from sa3train.training.step import StepDraw, make_plain_draw

_logger = get_logger(__name__)

STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "prodigy": 16, "schedule-free": 8, "lion": 4, "muon": 4}
"""Bytes of optimizer state per trainable parameter."""

MAX_FILL = 0.85
"""Share of the free memory that a plan may fill before blocks are recomputed."""

TRIAL_FRAMES = 32
"""Latent frames of the shorter trial; the other has twice as many."""


@dataclass(frozen=True)
class MemoryPlan:
    """Planned memory, in bytes.

    Attributes:
        weights: Frozen weights.
        adapter: The adapter, with what is cached for it.
        gradients: The adapter's gradients.
        optimizer: Optimizer state.
        activations: Of a whole micro-batch, with the checkpointing that was decided on.
        ema: Running average of the adapter.
        checkpointing: Whether blocks are recomputed in the backward pass.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    ema: int
    checkpointing: bool

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.ema

    def format_lines(self) -> list[str]:
        """Format the plan.

        Returns:
            One line per part that takes memory, and the total.
        """
        named = {
            "frozen weights": self.weights,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "EMA": self.ema,
            "activations" + (" (blocks recomputed)" if self.checkpointing else ""): self.activations,
            "total": self.total,
        }
        return [f"  {name:<34} {size / GIB:7.3f} GiB" for name, size in named.items() if size]


def count_frozen_bytes(root: nn.Module) -> int:
    """Count the bytes of everything frozen; quantized weights hold nothing themselves.

    Args:
        root: The model.

    Returns:
        Bytes on this rank.
    """
    frozen = [p for p in root.parameters() if not p.requires_grad] + list(root.buffers())
    return sum(get_local_shard(tensor).untyped_storage().nbytes() for tensor in frozen)


def get_local_shard(tensor: Tensor) -> Tensor:
    """Get this rank's part of a tensor.

    Args:
        tensor: Sharded or not.

    Returns:
        The local shard, or the tensor itself.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measure_saved_activations(module: nn.Module, run: Callable[[], Tensor], blocks: nn.ModuleList) -> tuple[int, int]:
    """Measure what autograd saves for the backward pass; weights do not count.

    Args:
        module: The model.
        run: A forward pass.
        blocks: The transformer blocks.

    Returns:
        Bytes of everything, and of the blocks alone.
    """
    owned = {get_local_shard(t).untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
    seen: dict[int, tuple[int, bool]] = {}
    depth = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            seen.setdefault(storage._cdata, (storage.nbytes(), depth[0] > 0))
        return tensor.detach()  # the tensor itself would hold its own graph and never be freed

    def enter(*_: Any) -> None:
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run()  # alive until counted: what it saved must not be freed and counted twice
        found = sum(size for size, _ in seen.values()), sum(size for size, in_block in seen.values() if in_block)
        del output
        return found
    finally:
        for handle in handles:
            handle.remove()


def _make_trial_batch(module: LoraModule, frames: int, prompt: str) -> tuple[ClipBatch, StepDraw]:
    channels = module.model.latent_channels
    real_1F = torch.ones(1, frames, dtype=torch.bool)
    seconds = torch.tensor([frames * module.model.downsampling_ratio / module.model.sample_rate])
    data_1CF = torch.zeros(1, channels, frames, device=module.device)
    clips = ClipBatch(data_1CF, real_1F, seconds, torch.zeros(1, dtype=torch.bool), [prompt], ["trial"])
    return clips, make_plain_draw(data_1CF, torch.full((1,), 0.5), real_1F).to(module.device)


def make_memory_plan(
    module: LoraModule, *, frames: int, rows: int, prompt: str, optimizer: str, mode: str, quantized_bytes: int = 0
) -> MemoryPlan:
    """Plan the memory of training, and set the model's checkpointing as decided.

    Args:
        module: The module, on its device.
        frames: Latent frames of the largest micro-batch.
        rows: Its clips or packed rows.
        prompt: Any prompt of the data.
        optimizer: Name of the optimizer.
        mode: Activation checkpointing: "none", "blocks", or "auto" (blocks if the plan without it does not fit).
        quantized_bytes: Bytes of the quantized weights, which the model's own weights do not hold.

    Returns:
        The plan.
    """
    transformer = module.model.dit.transformer
    transformer.checkpointing = False
    total, in_blocks = _measure_clip(module, frames, prompt)
    depth = len(transformer.layers)
    passed_on = frames * module.model.config.dit.width * transformer.memory_tokens.element_size()
    recomputed = total - in_blocks + in_blocks // max(1, depth) + depth * passed_on
    values = sum(parameter.numel() for parameter in module.trainable.values())
    fixed = {
        "weights": count_frozen_bytes(module.root) + quantized_bytes,
        "adapter": 4 * values + module.injected.cached_bytes,
        "gradients": 4 * values,
        "optimizer": STATE_BYTES.get(optimizer, 8) * values,
        "ema": 4 * values if module.ema is not None else 0,
    }
    plain = MemoryPlan(**fixed, activations=total * rows, checkpointing=False)
    lean = MemoryPlan(**fixed, activations=recomputed * rows, checkpointing=True)
    is_crowded = plain.total - fixed["weights"] > MAX_FILL * measure_free_memory(module.device)
    chosen = lean if mode == "blocks" or (mode == "auto" and is_crowded) else plain
    transformer.checkpointing = chosen.checkpointing
    return chosen


def _measure_clip(module: LoraModule, frames: int, prompt: str) -> tuple[int, int]:
    """What `measure_saved_activations` would return for a clip of `frames`, extrapolated from two short ones."""

    def measure(length: int) -> tuple[int, int]:
        clips, draw = _make_trial_batch(module, length, prompt)

        def run() -> Tensor:
            with module.forward_context():
                return module.compute_losses(clips, draw).total

        return measure_saved_activations(module.root, run, module.model.dit.transformer.layers)

    if frames <= 2 * TRIAL_FRAMES:
        return measure(frames)
    short, longer = measure(TRIAL_FRAMES), measure(2 * TRIAL_FRAMES)
    total, in_blocks = (
        two + (two - one) * (frames - 2 * TRIAL_FRAMES) // TRIAL_FRAMES for one, two in zip(short, longer, strict=True)
    )
    return total, in_blocks


def measure_free_memory(device: torch.device) -> int:
    """Measure the memory that can still be allocated.

    Args:
        device: Where.

    Returns:
        Bytes; the weights are already there.
    """
    memory = measure_device_memory(device)
    return memory.free + memory.reserved - memory.allocated  # what torch has reserved and does not use is free, too


def compare_memory(plan: MemoryPlan, device: torch.device) -> str | None:
    """Compare the plan with what a GPU run took.

    Args:
        plan: The plan.
        device: Where the run was.

    Returns:
        One line, or None on the CPU, where the run's share is not known.
    """
    measured = measure_peak_bytes(device)
    if not measured:
        return None
    error = 100 * (plan.total - measured) / measured
    return f"memory: planned {plan.total / GIB:.2f} GiB, used {measured / GIB:.2f} GiB (plan off by {error:+.0f}%)"


@dataclass(eq=False)
class MemoryPlanCallback(lightning.Callback):
    """Quantizes the base if asked, logs the memory plan, decides on recomputing blocks, compiles.

    Args:
        settings: Quantization, checkpointing and compilation.
        optimizer: Name of the optimizer.
        frames: Latent frames of the largest micro-batch.
        rows: Its clips or packed rows.
        prompt: Any prompt of the data.
        suggest: Lists settings that save memory, given whether blocks are recomputed.

    Attributes:
        plan: The plan, once made.
        accuracy: After the run, a line that compares the plan with what was used; None if not known.
    """

    settings: TrainerSettings
    optimizer: str
    frames: int
    rows: int
    prompt: str
    suggest: Callable[[bool], list[str]]
    plan: MemoryPlan | None = field(default=None, init=False)
    accuracy: str | None = field(default=None, init=False)

    def suggest_savings(self) -> list[str]:
        """Suggest settings that save memory.

        Returns:
            Settings, the least costly first.
        """
        mode = self.settings.activation_checkpointing
        return self.suggest(mode == "blocks" or (self.plan is not None and self.plan.checkpointing))

    @report_stage("planning memory")
    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Quantize, plan, compile, in this order: the plan is of the model as it will train."""
        assert isinstance(pl_module, LoraModule)
        quantized_bytes = 0
        if self.settings.quantize != "none":
            quantized_bytes = QuantizedBase(pl_module.model.dit, self.settings.quantize).nbytes
        self.plan = make_memory_plan(
            pl_module,
            frames=self.frames,
            rows=self.rows,
            prompt=self.prompt,
            optimizer=self.optimizer,
            mode=self.settings.activation_checkpointing,
            quantized_bytes=quantized_bytes,
        )
        _logger.info("memory plan (%d clips of %d frames per micro-batch):", self.rows, self.frames)
        for line in self.plan.format_lines():
            _logger.info(line)
        if pl_module.device.type == "cpu":
            other = max(0, psutil.Process().memory_info().rss - self.plan.weights - self.plan.adapter)
            _logger.info("  %-34s %7.3f GiB", "not in the plan: Python, libraries", other / GIB)
        _logger.info("  Temporary buffers, validation and demos come on top.")
        free = measure_free_memory(pl_module.device)
        if self.plan.total - self.plan.weights > free:
            suggestions = "; ".join(self.suggest_savings()) or "a smaller model"
            _logger.warning(
                "the plan without the weights exceeds the free %.1f GiB. To save memory: %s.", free / GIB, suggestions
            )
        if self.settings.compile:
            compile_for_training(pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare the plan with what was used."""
        if self.plan is not None:
            self.accuracy = compare_memory(self.plan, pl_module.device)


def compile_for_training(module: LoraModule, backend: str = "inductor") -> None:
    """Compile each transformer block, except for its adapted layers.

    Adapted layers decide at run time what to save for the backward pass, which a traced graph would fix once for all
    layers. They run eagerly between compiled pieces. The model's own autograd functions are not traced either: through
    dynamo they gave wrong gradients (torch 2.11), which a test guards.

    Args:
        module: The module.
        backend: Backend of torch.compile.
    """
    for layer in module.injected.layers.values():
        assert isinstance(layer, nn.Module)
        layer.forward = torch.compiler.disable(layer.forward)
    for value in vars(norms).values():
        if isinstance(value, type) and issubclass(value, Function) and value is not Function:
            torch.compiler.allow_in_graph(value)
    compile_blocks(module.model.dit, backend)


def suggest_training_fixes(data: LatentDataModule, settings: TrainerSettings, is_recomputing: bool) -> list[str]:
    """Suggest settings that save memory.

    Args:
        data: The data module.
        settings: The trainer's settings.
        is_recomputing: Whether blocks are recomputed already.

    Returns:
        Settings as on the command line, the least costly first.
    """
    rows, pack_frames, longest = data.settings.batch_size, data.settings.pack_frames, data.longest_crop
    fewer = max((part for part in range(1, rows) if rows % part == 0), default=rows)
    seconds = longest * SAMPLES_PER_FRAME / SAMPLE_RATE / 2
    crop = f"crop_seconds={seconds:.1f}" if data.settings.crop_frames is None else f"crop_frames={longest // 2}"
    suggestions = [
        ("trainer.activation_checkpointing=blocks", not is_recomputing),
        (f"data.batch_size={fewer} trainer.accumulate={settings.accumulate * rows // fewer}", fewer < rows),
        (f"data.pack_frames={longest}", pack_frames is not None and pack_frames > longest),
        (f"data.{crop}", longest > 1),
        ("trainer.quantize=int8 or nf4", settings.quantize == "none"),
    ]
    return [suggestion for suggestion, would_help in suggestions if would_help]
