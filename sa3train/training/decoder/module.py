"""The Lightning module: a frozen SAME autoencoder with an adapter on its decoder, trained on audio.

Shape legend: B clips, C channels (of audio or latents), N samples, T latent frames.
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sa3train.adapters.layers.inject import InjectedAdapter
from sa3train.core.seeds import derive_seed
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import StableAudio3
from sa3train.training.decoder.losses import compute_stft_loss, compute_waveform_loss, split_mid_side
from sa3train.training.decoder.settings import DecoderLossSettings, DecoderSettings
from sa3train.training.module import AdapterModule

TERMS = ("loss", "stft", "waveform", "mid_side", "round_trip")
"""What a step logs: the loss, and the terms that it is the weighted sum of."""


class DecoderModule(AdapterModule):
    """Trains an adapter on the decoder to render the clips that the frozen encoder was given.

    Args:
        model: The model, with its autoencoder.
        injected: The adapter inside its decoder.
        settings: Loss, optimizer, schedule and seed.
    """

    def __init__(self, model: StableAudio3, injected: InjectedAdapter, settings: DecoderSettings) -> None:
        super().__init__(model.get_adapter_root("decoder"), injected, settings)
        self.model, self.settings = model, settings
        self.autoencoder = model.autoencoder

    def compute_losses(self, audio_BCN: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Compute the losses of a micro-batch.

        A round trip encodes what the decoder made, within ±1 as a file holds it. No gradient passes the encoder: the
        decoder learns to render the clip from the latents of its own audio, however often that went round.

        Args:
            audio_BCN: Clips of whole frames.
            rng: Source of the autoencoder's noise.

        Returns:
            The loss to minimize and its terms, by the names in `TERMS`.
        """
        weights: DecoderLossSettings = self.settings.loss
        made_BCN = self.autoencoder.decode(_encode(self.autoencoder, audio_BCN, rng), generator=rng)
        losses = self._compare(audio_BCN, made_BCN)
        losses["loss"] = self._weigh(losses)
        if weights.round_trip:
            latents_BCT = self._go_round(made_BCN, rng)
            again_BCN = self.autoencoder.decode(latents_BCT, generator=rng)
            losses["round_trip"] = self._weigh(self._compare(audio_BCN, again_BCN))
            losses["loss"] = losses["loss"] + weights.round_trip * losses["round_trip"]
        return losses

    @torch.no_grad()
    def _go_round(self, audio_BCN: Tensor, rng: torch.Generator) -> Tensor:
        """Latents of decoded audio after up to `loss.round_trips` encodings."""
        count = int(torch.randint(1, self.settings.loss.round_trips + 1, (), generator=rng))
        latents_BCT = _encode(self.autoencoder, audio_BCN.clamp(-1, 1), rng)
        for _ in range(count - 1):
            audio_BCN = self.autoencoder.decode(latents_BCT, generator=rng)
            latents_BCT = _encode(self.autoencoder, audio_BCN.clamp(-1, 1), rng)
        return latents_BCT

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Compute the loss to minimize, and what `MetricsCallback` logs."""
        self.start_step(batch_idx)
        audio_BCN = batch["audio_BCN"]
        seed = derive_seed(self.settings.seed, "noise", self.global_rank, batch_idx)
        losses = self.compute_losses(audio_BCN, torch.Generator().manual_seed(seed))
        return {
            "loss": losses["loss"],
            "logged": {name: loss.detach() for name, loss in losses.items()},
            "frames": audio_BCN.shape[0] * audio_BCN.shape[2] // self.autoencoder.downsampling_ratio,
        }

    def _compare(self, real_BCN: Tensor, made_BCN: Tensor) -> dict[str, Tensor]:
        return {
            "stft": compute_stft_loss(real_BCN, made_BCN),
            "waveform": compute_waveform_loss(real_BCN, made_BCN),
            "mid_side": compute_stft_loss(split_mid_side(real_BCN), split_mid_side(made_BCN)),
        }

    def _weigh(self, losses: dict[str, Tensor]) -> Tensor:
        weights = self.settings.loss
        return sum((getattr(weights, name) * loss for name, loss in losses.items()), torch.zeros_like(losses["stft"]))


@torch.no_grad()
def _encode(autoencoder: Autoencoder, audio_BCN: Tensor, rng: torch.Generator) -> Tensor:
    return autoencoder.encode(audio_BCN, generator=rng, chunked=False)


def count_crop_samples(autoencoder: Autoencoder, seconds: float) -> int:
    """Count the samples of a crop: whole frames, as many as the encoder takes together, and at least one such group.

    Args:
        autoencoder: The autoencoder.
        seconds: Wanted length.

    Returns:
        Samples.
    """
    group = autoencoder.downsampling_ratio * autoencoder.encoder.resampler.groups_per_chunk
    return max(1, round(seconds * autoencoder.sample_rate / group)) * group
