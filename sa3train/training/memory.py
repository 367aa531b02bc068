"""How much memory a run will take, before it takes it: measured from forward passes of short clips, then added up.

Activations are what autograd keeps for the backward pass, counted as it keeps them, so the figure holds on any device.
They grow by the same amount with every frame, so two short clips tell what a long one takes, without taking it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from sa3train.log import get_logger
from sa3train.shortage import GIB
from sa3train.training.clips import Clips
from sa3train.training.module import LoraModule
from sa3train.training.objective import Draw

_logger = get_logger(__name__)

STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "prodigy": 16, "schedule-free": 8, "lion": 4, "muon": 4}
"""Bytes of optimizer state per trained value."""

FULL = 0.85
"""Share of the free memory that a plan may fill before blocks are recomputed."""

SHORT = 32
"""Latent frames of the shorter trial; the other has twice as many."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each kind. `activations` is for a whole micro-batch with the checkpointing that was decided on."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    average: int
    checkpointing: bool

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.average

    def lines(self) -> list[str]:
        """The plan for a person."""
        named = {
            "frozen weights": self.weights,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "running average": self.average,
            "activations" + (" (blocks recomputed)" if self.checkpointing else ""): self.activations,
            "together": self.total,
        }
        return [f"  {name:<34} {size / GIB:7.3f} GiB" for name, size in named.items() if size]


def weight_bytes(root: nn.Module) -> int:
    """Bytes held by everything frozen (weights kept as codes hold nothing themselves)."""
    frozen = [p for p in root.parameters() if not p.requires_grad] + list(root.buffers())
    return sum(here(tensor).untyped_storage().nbytes() for tensor in frozen)


def here(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def kept_for_backward(module: nn.Module, run: Callable[[], Tensor], blocks: nn.ModuleList) -> tuple[int, int]:
    """Bytes that autograd keeps in `run()`: of everything, and of the blocks alone. Weights do not count."""
    owned = {here(t).untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
    seen: dict[int, tuple[int, bool]] = {}
    inside = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            seen.setdefault(storage._cdata, (storage.nbytes(), inside[0] > 0))
        return tensor.detach()  # the tensor itself would hold its own graph: an output that is kept is never let go

    def enter(*_: Any) -> None:
        inside[0] += 1

    def leave(*_: Any) -> None:
        inside[0] -= 1

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = run()  # alive until counted: what it keeps must not be freed and counted twice
        found = sum(size for size, _ in seen.values()), sum(size for size, block in seen.values() if block)
        del kept
        return found
    finally:
        for handle in handles:
            handle.remove()


def trial_clip(module: LoraModule, frames: int, prompt: str) -> tuple[Clips, Draw]:
    """One clip of noise, as long as the longest that will come, and a draw for it."""
    channels = module.model.latent_channels
    real_1F = torch.ones(1, frames, dtype=torch.bool)
    seconds = torch.tensor([frames * module.model.downsampling_ratio / module.model.sample_rate])
    data_1CF = torch.zeros(1, channels, frames, device=module.device)
    clips = Clips(data_1CF, real_1F, seconds, torch.zeros(1, dtype=torch.bool), [prompt], ["trial"])
    half = torch.full((1,), 0.5)
    draw = Draw(data_1CF, half, real_1F, torch.zeros(1, 1, frames), torch.zeros(1, dtype=torch.bool))
    return clips, draw.to(module.device)


def make_plan(
    module: LoraModule,
    *,
    frames: int,
    rows: int,
    prompt: str,
    optimizer: str,
    mode: str,
    coded_bytes: int | None = None,
) -> MemoryPlan:
    """The memory of a micro-batch of `rows` clips of `frames` frames; sets the model's checkpointing as `mode` says.

    `mode`: none, blocks, or auto (blocks when the plan without fills the free memory). `coded_bytes`: bytes of the base
    when it is kept in few bits; what is not, norms and small weights, is counted beside them.
    """
    transformer = module.model.dit.transformer
    transformer.checkpointing = False
    total, in_blocks = _kept_of_a_clip(module, frames, prompt)
    depth = len(transformer.layers)
    passed_on = frames * module.model.config.dit.width * transformer.memory_tokens.element_size()
    recomputed = total - in_blocks + in_blocks // max(1, depth) + depth * passed_on
    values = sum(parameter.numel() for parameter in module.trained.values())
    state = STATE_BYTES.get(optimizer, 8)
    fixed = {
        "weights": weight_bytes(module.root) + (coded_bytes or 0),
        "adapter": 4 * values + module.injected.worked_out_bytes,
        "gradients": 4 * values,
        "optimizer": state * values,
        "average": 4 * values if module.average is not None else 0,
    }
    plain = MemoryPlan(**fixed, activations=total * rows, checkpointing=False)
    lean = MemoryPlan(**fixed, activations=recomputed * rows, checkpointing=True)
    crowded = plain.total - fixed["weights"] > FULL * free_memory(module.device)
    chosen = lean if mode == "blocks" or (mode == "auto" and crowded) else plain
    transformer.checkpointing = chosen.checkpointing
    return chosen


def _kept_of_a_clip(module: LoraModule, frames: int, prompt: str) -> tuple[int, int]:
    """What `kept_for_backward` would find for a clip of `frames`."""

    def kept(length: int) -> tuple[int, int]:
        clips, draw = trial_clip(module, length, prompt)

        def run() -> Tensor:
            with module.trainer_precision():
                return module.losses(clips, draw).total

        return kept_for_backward(module.root, run, module.model.dit.transformer.layers)

    if frames <= 2 * SHORT:
        return kept(frames)
    short, longer = kept(SHORT), kept(2 * SHORT)
    total, in_blocks = (
        two + (two - one) * (frames - 2 * SHORT) // SHORT for one, two in zip(short, longer, strict=True)
    )
    return total, in_blocks


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`, the weights being there already."""
    if device.type == "cuda":  # what torch holds and does not use is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return int(psutil.virtual_memory().available)


def compare(plan: MemoryPlan, device: torch.device) -> str | None:
    """On a GPU: what the run really took against the plan, in a line."""
    if device.type != "cuda":
        return None
    measured = torch.cuda.max_memory_allocated(device)
    error = 100 * (plan.total - measured) / measured
    return f"memory: planned {plan.total / GIB:.2f} GiB, taken {measured / GIB:.2f} GiB (plan off by {error:+.0f} %)"
