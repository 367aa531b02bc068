"""What happens to the model on its device before the first step: few bits, memory plan, checkpointing, compile.

How much memory a run will take, before it takes it: measured from forward passes of short clips, then added up.

Activations are what autograd keeps for the backward pass, counted as it keeps them, so the figure holds on any device.
They grow by the same amount with every frame, so two short clips tell what a long one takes, without taking it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from sa3train.core.device import GIB
from sa3train.core.log import get_logger
from sa3train.models import norms
from sa3train.training.batch import Clips
from sa3train.training.module import LoraModule
from sa3train.training.quantization import CodedWeights
from sa3train.training.settings import LoopSettings
from sa3train.training.step import Draw

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


class Prepare(lightning.Callback):
    """Puts the base in few bits when asked, says what memory the run will take, decides on recomputing, compiles.

    `frames` and `rows`: the largest micro-batch to come. `remedies`: what would make it smaller, whether or not blocks
    are recomputed. After the run `verdict` says how far off the plan was.
    """

    def __init__(
        self,
        loop: LoopSettings,
        optimizer: str,
        frames: int,
        rows: int,
        prompt: str,
        remedies: Callable[[bool], Sequence[str]],
    ) -> None:
        self.loop, self.optimizer = loop, optimizer
        self.frames, self.rows, self.prompt, self.remedies = frames, rows, prompt, remedies
        self.plan: MemoryPlan | None = None
        self.verdict: str | None = None

    @property
    def recomputing(self) -> bool:
        """Whether blocks are recomputed, as far as that is known."""
        return self.loop.activation_checkpointing == "blocks" or (self.plan is not None and self.plan.checkpointing)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Everything, in this order: the plan is of the model as it will train."""
        assert isinstance(pl_module, LoraModule)
        coded = None
        if self.loop.quantize != "none":
            coded = CodedWeights(pl_module.model.dit, self.loop.quantize).nbytes
        self.plan = make_plan(
            pl_module,
            frames=self.frames,
            rows=self.rows,
            prompt=self.prompt,
            optimizer=self.optimizer,
            mode=self.loop.activation_checkpointing,
            coded_bytes=coded,
        )
        _logger.info("memory this run will take (%d clips of %d frames a step):", self.rows, self.frames)
        for line in self.plan.lines():
            _logger.info(line)
        free = free_memory(pl_module.device)
        if self.plan.total - self.plan.weights > free:
            given = free / GIB, "; ".join(self.remedies(self.recomputing)) or "a smaller model"
            _logger.warning("beside the weights that is more than the %.1f GiB that are free. What helps: %s.", *given)
        if self.loop.compile:
            compile_blocks(pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Hold the plan against what was taken."""
        if self.plan is not None:
            self.verdict = compare(self.plan, pl_module.device)


def compile_blocks(module: LoraModule, backend: str = "inductor") -> None:
    """torch.compile each block of the transformer, but for its adapted layers.

    Those choose at run time what to keep for the backward pass, which a traced graph would fix once for all layers.
    They run as they are, between compiled pieces. The model's own autograd functions are taken as they are too: traced
    by dynamo they gave wrong gradients (torch 2.11), which a test holds.
    """
    for layer in module.injected.layers.values():
        assert isinstance(layer, nn.Module)
        layer.forward = torch.compiler.disable(layer.forward)
    for value in vars(norms).values():
        if isinstance(value, type) and issubclass(value, Function) and value is not Function:
            torch.compiler.allow_in_graph(value)
    for block in module.model.dit.transformer.layers:
        block.compile(backend=backend, dynamic=True)
