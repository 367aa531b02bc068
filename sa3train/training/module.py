"""The Lightning module: a frozen Stable Audio 3 with an adapter in it, trained on clips of latents.

Shape legend: S clips, C latent channels, F latent frames, T frames of a packed row, B = S unless packed.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.layers.inject import Injected
from sa3train.core.device import to_device
from sa3train.diffusion.objective import coupling_columns, effective_frames
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.conditioners import TextEmbedding
from sa3train.training.batch import Clips, clips_of, to_clips, to_rows
from sa3train.training.distributed import ShardedBaseStrategy, couple_across_ranks
from sa3train.training.ema import RunningAverage, swapped_in
from sa3train.training.optim import averaged_by_optimizer, make_scheduler
from sa3train.training.settings import Objective
from sa3train.training.step import Draw, Losses, draw_step, item_seeds, noised_inputs, step_losses

TextSource = Callable[[Sequence[str]], TextEmbedding]
MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]


class LoraModule(lightning.LightningModule):
    """Trains the adapter's parameters alone; the base stays as it is, byte for byte.

    `text` gives the frozen text embeddings of prompts (encoded once, cached). `average_decay` turns on a running
    average (EMA) of the adapter, which is then what is judged and exported.
    """

    strict_loading = False

    def __init__(
        self,
        model: StableAudio3,
        injected: Injected,
        text: TextSource,
        objective: Objective,
        *,
        make_optimizer: MakeOptimizer,
        learning_rate_factor: Callable[[int], float],
        seed: int = 0,
        average_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.root = model.adaptable()
        self._model, self._injected, self._text = model, injected, text
        self.objective, self.seed = objective, seed
        self._make_optimizer, self._factor = make_optimizer, learning_rate_factor
        self.trained: dict[str, nn.Parameter] = injected.named_parameters()
        self.average = RunningAverage(self.trained, average_decay) if average_decay is not None else None
        self.gradient_norm = torch.zeros(())

    @property
    def injected(self) -> Injected:
        """The adapter inside the model."""
        return self._injected

    @property
    def model(self) -> StableAudio3:
        """The model that is trained."""
        return self._model

    def forward(self, clips: Clips, draw: Draw) -> Tensor:
        """Velocity (S, C, F) of every clip, with the adapter as it is now."""
        x_SCF, local_SCF = noised_inputs(clips.data_SCF, draw)
        text = self._text(clips.prompts)
        condition = self._model.conditioner.condition(text, to_device(clips.seconds_S, x_SCF.device))
        cross_SMD = condition.cross_attn_cond_BLD.masked_fill(draw.dropped_B[:, None, None], 0.0)
        shared = {"cross_attn_cond_BLD": cross_SMD, "global_cond_BD": condition.global_cond_BD}
        ids_RT = clips.segment_ids_RT
        if ids_RT is None:
            return self._model.dit(
                x_SCF, draw.t_B, local_add_cond_BCT=local_SCF, padding_mask_BT=draw.padding_mask_BT, **shared
            )
        mask_SF = clips.padding_mask_SF  # that of the draw too, since nothing is extended in a packed row; on the CPU
        velocity_RCT = self._model.dit(
            to_rows(x_SCF, ids_RT, mask_SF),
            draw.t_B,
            local_add_cond_BCT=to_rows(local_SCF, ids_RT, mask_SF),
            segment_ids=ids_RT,
            **shared,
        )
        return to_clips(velocity_RCT, ids_RT, mask_SF)

    def losses(self, clips: Clips, draw: Draw) -> Losses:
        """The losses of one micro-batch for a given draw."""
        return step_losses(self.objective, self(clips, draw), clips.data_SCF, draw)

    def draw(self, clips: Clips, micro_step: int) -> Draw:
        """Everything random of micro-batch number `micro_step`, on the module's device."""
        model = self._model
        frames_S = torch.tensor(
            [effective_frames(s, model.sample_rate, model.downsampling_ratio) for s in clips.seconds_S.tolist()]
        )
        draw = draw_step(
            self.objective,
            item_seeds(self.seed, micro_step, clips.seeds),
            clips.data_SCF.shape,
            clips.padding_mask_SF,
            frames_S,
            model.sample_rate / model.downsampling_ratio,
            clips.at_end_S,
        ).to(self.device)
        if not self.objective.coupling:
            return draw
        noise_SCF = couple_across_ranks(clips.data_SCF, draw.noise_BCT, coupling_columns)
        return Draw(noise_SCF, draw.t_B, draw.padding_mask_BT, draw.inpaint_mask_B1T, draw.dropped_B)

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """The latents alone: masks and lengths are worked with on the CPU, and fetching them back would be a wait."""
        return batch | {"latents_BCT": to_device(batch["latents_BCT"], device)}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """One micro-batch: the loss to minimise, and what the meter shows."""
        micro_step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(self.seed * 1_000_003 + micro_step * 101 + self.global_rank)  # dropout inside the adapter
        clips = clips_of(batch)
        draw = self.draw(clips, micro_step)
        losses = self.losses(clips, draw)
        return {
            "loss": losses.total,
            "generated_loss": losses.loss.detach(),
            "context_loss": losses.context_loss.detach(),
            "item_loss_B": losses.item_loss_B,
            "t_B": draw.t_B,
            "frames": int(clips.padding_mask_SF.sum()),
        }

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over the adapter alone, and its schedule per step."""
        optimizer = self._make_optimizer(list(self.trained.items()))
        scheduler = make_scheduler(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Where the base is sharded nobody averages the adapter's gradients over ranks but us."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedBaseStrategy):
            strategy.average_gradients(self.trained.values())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients together, keeping the norm for the meter."""
        limit = float("inf") if not gradient_clip_val else float(gradient_clip_val)
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), limit).detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step, then the running average follows."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update()

    def trainer_precision(self) -> contextlib.AbstractContextManager[Any]:
        """The precision training runs in, for judging outside a step; nothing when there is no trainer."""
        return (
            self.trainer.precision_plugin.forward_context() if self._trainer is not None else contextlib.nullcontext()
        )

    def judged(self) -> dict[str, Tensor]:
        """The tensors to judge and export in place of the live ones: the running average, or schedule-free's."""
        if self.average is not None:
            return self.average.tensors
        optimizers = self.trainer.optimizers if self._trainer is not None else []
        if not optimizers:
            return {}
        averaged = averaged_by_optimizer(optimizers[0], self.trained.values())
        return {name: averaged[id(p)] for name, p in self.trained.items() if id(p) in averaged}

    def cpu(self) -> "LoraModule":
        """Off the GPU, as Lightning wants it after a run; a base in few bits has no weights to copy and stays."""
        if all(parameter.untyped_storage().nbytes() for parameter in self.parameters()):
            return super().cpu()
        for parameter in self.trained.values():
            parameter.data = parameter.data.cpu()
        return self

    def export(self, metadata: Mapping[str, str]) -> Adapter:
        """The adapter as it is to be judged (see `judged`), with `metadata`."""
        with swapped_in(self.trained, self.judged()):
            return self._injected.export(dict(metadata))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Only what is trained: the base is never saved."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Restore what `state_dict` gave. Raises `KeyError` when it is another adapter's."""
        if set(state) != set(self.trained):
            raise KeyError("the saved training state belongs to an adapter of other layers")
        with torch.no_grad():
            for name, tensor in state.items():
                self.trained[name].copy_(tensor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the running average to the training state."""
        if self.average is not None:
            checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running average. Raises `KeyError` when the state has none."""
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
