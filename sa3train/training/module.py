"""The Lightning modules: a frozen base with an adapter in it, and Stable Audio 3 as such, trained on latents.

Shape legend: S clips, C latent channels, F latent frames, T frames of a packed row, B = S unless packed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.layers.inject import InjectedAdapter
from sa3train.core.device import move_to_device
from sa3train.core.log import get_logger
from sa3train.core.seeds import derive_seed
from sa3train.data.loading.clip_batch import ClipBatch, make_clip_batch, pack_rows, unpack_rows
from sa3train.data.loading.loader import Batch
from sa3train.diffusion.objective import count_effective_frames, match_noise
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.conditioners import TextEmbedding
from sa3train.training.distributed import ShardedBaseStrategy, couple_across_ranks, get_rank_and_world_size
from sa3train.training.ema import EMA, swap_parameters
from sa3train.training.optim import (
    compute_schedule_free_average,
    get_group_settings,
    make_optimizer,
    restore_group_settings,
)
from sa3train.training.schedules import make_lr_lambda
from sa3train.training.settings import OptimizationSettings, TrainingSettings
from sa3train.training.step import (
    Losses,
    StepDraw,
    compute_step_losses,
    derive_clip_seeds,
    draw_step,
    make_noisy_inputs,
)

_logger = get_logger(__name__)

TextSource = Callable[[Sequence[str]], TextEmbedding]


class AdapterModule(lightning.LightningModule):
    """Trains the parameters of an adapter; the base model stays as it is, byte for byte.

    A subclass computes the loss in `training_step`, which begins with `start_step`.

    Args:
        root: The frozen base, which contains the adapter.
        injected: The adapter inside it.
        settings: Optimizer, schedule and seed.

    Attributes:
        trainable: The adapter's parameters by name.
        ema: Their running average, which is then what is validated and exported; None without `trainer.ema_decay`.
        gradient_norm: Norm of all gradients together before clipping, of the last optimizer step.
        has_stepped: Whether the last micro-batch ended with an optimizer step.
        callback_seconds: Time that validation, demos and checkpoints have taken after steps so far.
    """

    strict_loading = False

    def __init__(self, root: nn.Module, injected: InjectedAdapter, settings: OptimizationSettings) -> None:
        super().__init__()
        self.root, self.injected = root, injected
        self.optimization = settings
        self._lr_lambda = make_lr_lambda(settings.scheduler, settings.trainer.max_steps)
        self.trainable: dict[str, nn.Parameter] = injected.named_parameters()
        decay = settings.trainer.ema_decay
        self.ema = None if decay is None else EMA(self.trainable, decay)
        self.gradient_norm = torch.zeros(())
        self.has_stepped = False
        self.callback_seconds = 0.0

    def start_step(self, batch_idx: int) -> None:
        """Start a micro-batch: no optimizer step yet, and dropout inside the adapter as its number says.

        Args:
            batch_idx: Number of the micro-batch in the run.
        """
        self.has_stepped = False
        torch.manual_seed((self.optimization.seed * 1_000_003 + batch_idx * 101 + self.global_rank) % 2**64)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimizer of the adapter and its schedule per step."""
        optimizer = make_optimizer(self.optimization.optimizer, self.trainable.items())
        self._group_settings = get_group_settings(optimizer)
        scheduler = LambdaLR(optimizer, self._lr_lambda)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set what the optimizer is set to now: a resumed run has loaded the values of an earlier start."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        restore_group_settings(scheduler, self._group_settings)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the adapter's gradients over ranks where the base is sharded; otherwise DDP does."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedBaseStrategy):
            strategy.average_gradients(self.trainable.values())

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients together, and store the norm."""
        limit = float("inf") if not gradient_clip_val else float(gradient_clip_val)
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), limit).detach()

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take one step, then update the running average."""
        super().optimizer_step(*args, **kwargs)  # runs `training_step` first
        if self.ema is not None:
            self.ema.update()
        self.has_stepped = True

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Enter the precision that training runs in, for forward passes outside a step.

        Returns:
            A context manager; it does nothing without a trainer.
        """
        trainer = self._find_trainer()
        return contextlib.nullcontext() if trainer is None else trainer.precision_plugin.forward_context()

    @contextlib.contextmanager
    def start_evaluation(self) -> Iterator[None]:
        """Enter what evaluation needs: no dropout, no gradients, the precision that training runs in.

        Yields:
            Nothing.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.forward_context():
                yield
        finally:
            self.train(was_training)

    def get_eval_parameters(self) -> dict[str, Tensor]:
        """Get the values to validate and export in place of the live ones.

        Returns:
            The running average, or schedule-free's, by name; empty when the live values are to be used.
        """
        if self.ema is not None:
            return self.ema.tensors
        trainer = self._find_trainer()
        if trainer is None or not trainer.optimizers:
            return {}
        averaged = compute_schedule_free_average(trainer.optimizers[0])
        return {name: averaged[id(p)] for name, p in self.trainable.items() if id(p) in averaged}

    @override
    def cpu(self) -> "AdapterModule":
        """Move to the CPU, as Lightning does after a run; a quantized base has no weights to copy and stays."""
        if all(parameter.untyped_storage().nbytes() for parameter in self.parameters()):
            return super().cpu()
        for parameter in self.trainable.values():
            parameter.data = parameter.data.cpu()
        return self

    def export(self, metadata: Mapping[str, str]) -> Adapter:
        """Export the adapter with the values of `get_eval_parameters`.

        Args:
            metadata: Provenance to store in it.

        Returns:
            The adapter.
        """
        with swap_parameters(self.trainable, self.get_eval_parameters()):
            return self.injected.export(dict(metadata))

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Collect what is trained: the base is never saved."""
        return {name: parameter.detach() for name, parameter in self.trainable.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Restore what `state_dict` returned."""
        if set(state) != set(self.trainable):
            raise KeyError("the checkpoint belongs to an adapter with other layers")
        with torch.no_grad():
            for name, tensor in state.items():
                self.trainable[name].copy_(tensor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the running average to the checkpoint."""
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running average; where the run had none, it starts at the weights."""
        if self.ema is None:
            return
        if "ema" not in checkpoint:
            _logger.info("the run has no average of its weights yet: it starts at those of the checkpoint")
        self.ema.load_state_dict(checkpoint.get("ema", {"updates": 0, "tensors": checkpoint["state_dict"]}))

    def _find_trainer(self) -> lightning.Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # Lightning's answer while no trainer is attached
            return None


class LoraModule(AdapterModule):
    """Trains an adapter on a frozen Stable Audio 3, by the loss of `training/step.py` on latents.

    Args:
        model: The frozen base.
        injected: The adapter inside it.
        text: Gives the frozen text embeddings of prompts.
        settings: Loss, optimizer, schedule and seed.
    """

    def __init__(
        self, model: StableAudio3, injected: InjectedAdapter, text: TextSource, settings: TrainingSettings
    ) -> None:
        super().__init__(model.get_adapter_root(), injected, settings)
        self.model, self.settings, self._text = model, settings, text

    def forward(self, clips: ClipBatch, draw: StepDraw) -> Tensor:
        """Predict the velocity (S, C, F) of every clip, with the adapter as it is now."""
        x_SCF, local_SCF = make_noisy_inputs(clips.data_SCF, draw)
        text = self._text(clips.prompts)
        condition = self.model.conditioner.condition(text, move_to_device(clips.seconds_S, x_SCF.device))
        cross_SMD = condition.cross_attn_cond_BLD.masked_fill(draw.dropped_B[:, None, None], 0.0)
        shared = {"cross_attn_cond_BLD": cross_SMD, "global_cond_BD": condition.global_cond_BD}
        ids_RT = clips.segment_ids_RT
        if ids_RT is None:
            return self.model.dit(
                x_SCF, draw.t_B, local_add_cond_BCT=local_SCF, attention_mask_BT=draw.attention_mask_BT, **shared
            )
        mask_SF = clips.attention_mask_SF  # equal to the draw's, as packed rows are never extended; on the CPU
        velocity_RCT = self.model.dit(
            pack_rows(x_SCF, ids_RT, mask_SF),
            draw.t_B,
            local_add_cond_BCT=pack_rows(local_SCF, ids_RT, mask_SF),
            segment_ids=ids_RT,
            **shared,
        )
        return unpack_rows(velocity_RCT, ids_RT, mask_SF)

    def compute_losses(self, clips: ClipBatch, draw: StepDraw) -> Losses:
        """Compute the losses of one micro-batch.

        Args:
            clips: The micro-batch.
            draw: Its random draws, on the module's device.

        Returns:
            The losses.
        """
        return compute_step_losses(self.settings.loss, self(clips, draw), clips.data_SCF, draw)

    def draw(self, clips: ClipBatch, micro_step: int) -> StepDraw:
        """Draw everything random of a micro-batch.

        Args:
            clips: The micro-batch.
            micro_step: Its number in the run.

        Returns:
            The draw, on the module's device.
        """
        model, loss = self.model, self.settings.loss
        frames_S = torch.tensor(
            [count_effective_frames(s, model.sample_rate, model.downsampling_ratio) for s in clips.seconds_S.tolist()]
        )
        draw = draw_step(
            loss,
            derive_clip_seeds(self.settings.seed, micro_step, clips.seeds),
            list_clip_numbers(self.settings.seed, micro_step, len(clips.seeds)),
            clips.data_SCF.shape,
            clips.attention_mask_SF,
            frames_S,
            model.sample_rate / model.downsampling_ratio,
            clips.at_end_S,
        ).to(self.device)
        if not loss.coupling:
            return draw
        noise_SCF = couple_across_ranks(clips.data_SCF, draw.noise_BCT, match_noise)
        return StepDraw(noise_SCF, draw.t_B, draw.attention_mask_BT, draw.inpaint_mask_B1T, draw.dropped_B)

    @override
    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move the latents only: masks and lengths are used on the CPU, and fetching them back would be a wait."""
        return batch | {"latents_BCT": move_to_device(batch["latents_BCT"], device)}

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss to minimize, and what `MetricsCallback` logs."""
        self.start_step(batch_idx)
        clips = make_clip_batch(batch)
        draw = self.draw(clips, batch_idx)
        losses = self.compute_losses(clips, draw)
        return {
            "loss": losses.total,
            "logged": {"loss": losses.loss.detach(), "context_loss": losses.context_loss.detach()},
            "item_loss_B": losses.item_loss_B,
            "t_B": draw.t_B,
            "frames": int(clips.attention_mask_SF.sum()),
        }


def list_clip_numbers(seed: int, micro_step: int, clips: int) -> list[int]:
    """List the numbers of a micro-batch's clips on this rank in the order of the whole run, from a start of its seed.

    They count as if all micro-batches held as many clips: where packed rows hold more or fewer, numbers repeat or are
    left out.

    Args:
        seed: Seed of the run.
        micro_step: Number of the micro-batch in the run.
        clips: Clips of this rank.

    Returns:
        Their numbers.
    """
    rank, ranks = get_rank_and_world_size()
    first = derive_seed(seed, "timesteps") % 2**20  # small enough for the fractional part of its multiples
    return [first + (micro_step * clips + row) * ranks + rank for row in range(clips)]


class StepCallback(lightning.Callback):
    """A callback that acts after each optimizer step, in `on_step_end`."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `on_step_end` if the micro-batch ended with an optimizer step."""
        assert isinstance(pl_module, AdapterModule)
        if pl_module.has_stepped:
            start = time.perf_counter()
            self.on_step_end(trainer, pl_module)
            pl_module.callback_seconds += time.perf_counter() - start

    def on_step_end(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        """Run after an optimizer step, once per `trainer.global_step`."""
