"""Validation and demos: fixed clips encoded and decoded again and again, by the base beside the adapter.

Shape legend: C channels, N samples, I clips, R round trips.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sa3train.audio.metrics import compute_log_mel_distance, compute_si_sdr
from sa3train.core.seeds import derive_seed
from sa3train.models.autoencoder import Autoencoder
from sa3train.reports.loss_change import compute_loss_change
from sa3train.reports.run_files import ORIGINAL, ROUND_TRIPS, DemoFile
from sa3train.training.callbacks.checkpoint import CheckpointCallback
from sa3train.training.callbacks.demos import FixedDemoCallback
from sa3train.training.callbacks.validation import PART_TITLES, FixedValidationCallback
from sa3train.training.decoder.clips import AudioClip, AudioClips
from sa3train.training.decoder.module import DecoderModule
from sa3train.training.decoder.settings import DecoderDemoSettings, DecoderValidationSettings
from sa3train.training.ema import swap_parameters
from sa3train.training.loggers import LoggerCollection
from sa3train.training.module import AdapterModule

MEASURES = ("log_mel", "si_sdr", "drift")
"""What is measured after each round trip: log-mel distance and SI-SDR to the clip in dB, and by how much the latents
differ from the clip's, ‖z' − z‖ / ‖z‖."""


@torch.no_grad()
def play_round_trips(
    autoencoder: Autoencoder, audio_CN: Tensor, count: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Encode and decode a clip again and again. Between two round trips it is within ±1, as in a file.

    Args:
        autoencoder: The autoencoder.
        audio_CN: The clip.
        count: Number of round trips.
        seed: Seed of the autoencoder's noise.

    Returns:
        The audio (C, N) after each round trip, and the latents (1, C, T) of the clip and of each of these.
    """
    rng = torch.Generator().manual_seed(seed)
    played, latents = [], [autoencoder.encode(audio_CN[None], generator=rng)]
    for _ in range(count):
        decoded_1CN = autoencoder.decode(latents[-1], generator=rng)
        played.append(decoded_1CN[0, :, : audio_CN.shape[1]].float().clamp(-1, 1))
        latents.append(autoencoder.encode(played[-1][None], generator=rng))
    return played, latents


def measure_round_trips(
    real_CN: Tensor, played: Sequence[Tensor], latents: Sequence[Tensor], sample_rate: int
) -> Tensor:
    """Measure what round trips did to a clip.

    Args:
        real_CN: The clip.
        played: The audio after each, as `play_round_trips` returns it.
        latents: The latents of the clip and of each of these.
        sample_rate: Sample rate in Hz.

    Returns:
        (measures, R), float64 on the CPU, in the order of `MEASURES`.
    """
    first, *others = latents
    rows = [
        (
            compute_log_mel_distance(real_CN, made_CN.cpu(), sample_rate),
            compute_si_sdr(real_CN, made_CN.cpu()),
            float((other - first).norm() / first.norm()),
        )
        for made_CN, other in zip(played, others, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).T


class RoundTripValidationCallback(FixedValidationCallback):
    """Validates a decoder: its loss is the log-mel distance after the last round trip.

    Args:
        run_dir: The run folder.
        loggers: Where metrics go.
        checkpoint: Writes the best adapter.
        clips: Held-out and training clips.
        settings: Interval, clips, round trips, selection and early stopping.
    """

    name = ROUND_TRIPS

    def __init__(
        self,
        run_dir: Path,
        loggers: LoggerCollection,
        checkpoint: CheckpointCallback,
        clips: AudioClips,
        settings: DecoderValidationSettings,
    ) -> None:
        heldout, training = choose_clips(clips.heldout, settings.clips), choose_clips(clips.train, settings.clips)
        super().__init__(run_dir, loggers, checkpoint, heldout, training, settings)
        self.source, self.settings = clips, settings
        self.levels = tuple(float(number) for number in range(1, settings.round_trips + 1))

    @override
    def measure(self, module: AdapterModule, clips: Sequence[Any]) -> Tensor:
        """Measure every clip after each round trip: (I, measures × R)."""
        assert isinstance(module, DecoderModule)
        table = []
        for clip in clips:
            audio_CN, played, latents = _play_clip(module, self.source, clip, self.settings)
            table.append(measure_round_trips(audio_CN, played, latents, self.source.sample_rate).flatten())
        return torch.stack(table)

    def _split_table(self, table_IM: Tensor) -> dict[str, Tensor]:
        """The table (I, R) of each measure."""
        return dict(zip(MEASURES, table_IM.unflatten(1, (len(MEASURES), -1)).unbind(dim=1), strict=True))

    @override
    def get_item_losses(self, table_IN: Tensor) -> Tensor:
        """Get the log-mel distance after the last round trip."""
        return self._split_table(table_IN)["log_mel"][:, -1]

    @override
    def summarize_table(self, table_IN: Tensor) -> dict[str, Any]:
        """Average over clips: the loss, the log-mel distance by round trip, and the other measures by round trip."""
        means = {name: table_IR.mean(dim=0).tolist() for name, table_IR in self._split_table(table_IN).items()}
        return {"loss": means["log_mel"][-1], "by_level": means["log_mel"], **means}

    @override
    def name_metrics(self, part: str, summary: Mapping[str, Any]) -> dict[str, float]:
        """Name each measure after the first and after the last round trip."""
        last = len(self.levels)
        return {
            f"{part}/{name}_{number}": summary[name][number - 1] for name in MEASURES for number in sorted({1, last})
        }

    @override
    @staticmethod
    def describe(summary: Mapping[str, Any]) -> list[str]:
        """Describe each measure of base and adapter after the last round trip."""
        lines = []
        for part, base in summary["base"].items():
            last, change = summary["history"][-1][part], compute_loss_change(summary, part)
            values = ", ".join(
                f"{title} {base[name][-1]:.2f} -> {last[name][-1]:.2f}{unit}"
                for name, title, unit in (
                    ("log_mel", "log-mel distance", f" dB ({change.describe()})" if change else " dB"),
                    ("si_sdr", "SI-SDR", " dB"),
                    ("drift", "drift of latents", ""),
                )
            )
            lines.append(f"{PART_TITLES[part]} after {len(summary['levels'])} round trips, base -> adapter: {values}")
        return lines


def _play_clip(
    module: DecoderModule, source: AudioClips, clip: AudioClip, settings: DecoderValidationSettings
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The part of a clip that is played, and what `play_round_trips` returns for it."""
    audio_CN = source.read(clip)[:, : round(settings.seconds * source.sample_rate)]
    seed = derive_seed(settings.seed, "fixed", clip.keys[0])
    with module.start_evaluation():
        played, latents = play_round_trips(module.autoencoder, audio_CN.to(module.device), settings.round_trips, seed)
    return audio_CN, played, latents


def choose_clips(clips: Sequence[AudioClip], limit: int) -> list[AudioClip]:
    """Choose clips spread over a set.

    Args:
        clips: The set.
        limit: Most clips to choose.

    Returns:
        The clips in order of their keys.
    """
    ordered = sorted(clips, key=lambda clip: clip.keys)
    return ordered[:: max(1, len(ordered) // limit)][:limit]


class RoundTripDemoCallback(FixedDemoCallback):
    """Writes held-out clips as they are, after one round trip and after the last, by the base or the adapter.

    Args:
        run_dir: The run folder.
        loggers: Where audio, spectrograms and measures go.
        settings: How often, and how many clips.
        clips: The clips.
        validation: Length of the clips, round trips and seed.
        checkpoint: Tells whether the run has been asked to stop.
    """

    def __init__(
        self,
        run_dir: Path,
        loggers: LoggerCollection,
        settings: DecoderDemoSettings,
        clips: AudioClips,
        validation: DecoderValidationSettings,
        checkpoint: CheckpointCallback,
    ) -> None:
        super().__init__(run_dir, loggers, settings.every, checkpoint.is_stopping)
        self.source, self.validation = clips, validation
        self.clips = choose_clips(clips.heldout or clips.train, settings.clips)

    @override
    def play_module(self, module: AdapterModule, step: int) -> None:
        """Play every clip, by the base at step 0, else by the adapter."""
        assert isinstance(module, DecoderModule)
        with torch.random.fork_rng(), swap_parameters(module.trainable, module.get_eval_parameters()):
            off = contextlib.nullcontext() if step else module.injected.disable()
            with off:
                self.write_list(self._play_clips(module, step), step)

    def _play_clips(self, module: DecoderModule, step: int) -> list[DemoFile]:
        settings, rate, files = self.validation, self.source.sample_rate, []
        for clip in self.clips:
            self.stop_if_asked()
            audio_CN, played, _ = _play_clip(module, self.source, clip, settings)
            versions = {0: audio_CN} if not step else {}
            versions |= {1: played[0].cpu(), settings.round_trips: played[-1].cpu()}
            for number, version_CN in versions.items():
                name, stem = f"{clip.keys[0]}, {_name_round_trips(number)}", f"{clip.keys[0]}-{number}"
                player = module.model.name if number else ORIGINAL
                demo = DemoFile(
                    f"{stem}.wav", f"{stem}.png", name, ROUND_TRIPS, clip.prompts[0], player,
                    float(step > 0), settings.seed, step, {},
                )  # fmt: skip
                files.append(self.write_demo(demo, version_CN, rate))
        return files


def _name_round_trips(number: int) -> str:
    return {0: "as it is", 1: "1 round trip"}.get(number, f"{number} round trips")
