"""What happens to the model on its device before the first step: few bits, memory plan, checkpointing, compile."""

from collections.abc import Callable, Sequence

import lightning.pytorch as lightning
import torch
from torch import nn
from torch.autograd import Function

from sa3train.log import get_logger
from sa3train.models import norms
from sa3train.shortage import GIB
from sa3train.training.memory import MemoryPlan, compare, free_memory, make_plan
from sa3train.training.module import LoraModule
from sa3train.training.quantized import CodedWeights
from sa3train.training.settings import LoopSettings

_logger = get_logger(__name__)


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
