"""A small classifier of sounds from statistics of their log-mel spectrum, to evaluate generated audio.

Shapes: C channels, N samples, T frames, M mel bands, B clips, K classes, D features.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sa3train.audio.metrics import compute_mel_spectrogram
from sa3train.core.safetensors_file import write_tensors

BANDS = 64
RANGE_DB = 70.0
FEATURES = 6 * BANDS
HIDDEN = 256


def compute_features(audio_CN: Tensor, sample_rate: int) -> Tensor:
    """Compute what the classifier sees: mean, deviation, mean rise and fall, maximum and first 0.1 s of each mel band.

    Levels are relative to the loudest point and floored 70 dB below it; frames 45 dB below the loudest are skipped.

    Args:
        audio_CN: The clip.
        sample_rate: Samples per second.

    Returns:
        Features (D,).
    """
    decibels_MT = compute_mel_spectrogram(audio_CN, sample_rate, BANDS)
    decibels_MT = (decibels_MT - decibels_MT.max()).clamp_min(-RANGE_DB) / RANGE_DB + 1
    loudness_T = decibels_MT.amax(dim=0)
    decibels_MT = decibels_MT[:, loudness_T > loudness_T.max() - 45 / RANGE_DB]
    step_MT = decibels_MT.diff(dim=1) if decibels_MT.shape[1] > 1 else torch.zeros_like(decibels_MT)
    parts = [decibels_MT.mean(1), decibels_MT.std(1, correction=0), step_MT.clamp_min(0).mean(1) * 10]
    parts += [step_MT.clamp_max(0).mean(1) * 10, decibels_MT.amax(1), decibels_MT[:, :9].mean(1)]
    return torch.cat(parts)


@dataclass
class Classifier:
    """Two linear layers over standardized features.

    Attributes:
        network: The layers.
        mean_D: Mean of each feature in training.
        deviation_D: Its standard deviation.
        names: Classes in the order of the outputs.
    """

    network: nn.Sequential
    mean_D: Tensor
    deviation_D: Tensor
    names: list[str]

    @torch.no_grad()
    def predict(self, audio_CN: Tensor, sample_rate: int) -> Tensor:
        """Predict the probability of each class.

        Args:
            audio_CN: The clip.
            sample_rate: Samples per second.

        Returns:
            Probabilities (K,).
        """
        standard_D = (compute_features(audio_CN, sample_rate) - self.mean_D) / self.deviation_D
        return self.network(standard_D[None]).softmax(dim=-1)[0]

    def classify(self, audio_CN: Tensor, sample_rate: int) -> str:
        """Name the most probable class.

        Args:
            audio_CN: The clip.
            sample_rate: Samples per second.

        Returns:
            Name of the class.
        """
        return self.names[int(self.predict(audio_CN, sample_rate).argmax())]

    def save(self, path: Path) -> None:
        """Write the classifier as fp16 safetensors with the class names in the metadata.

        Args:
            path: The file.
        """
        state = {**self.network.state_dict(), "mean": self.mean_D, "spread": self.deviation_D}
        halves = {name: tensor.half().contiguous() for name, tensor in state.items()}
        write_tensors(path, halves, {"names": json.dumps(self.names)})

    @staticmethod
    def load(path: Path) -> "Classifier":
        """Load a classifier written by `save`.

        Args:
            path: The file.

        Returns:
            The classifier.
        """
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            names = json.loads(file.metadata()["names"])
        network = build_network(len(names))
        mean_D, deviation_D = state.pop("mean"), state.pop("spread")
        network.load_state_dict(state)
        return Classifier(network.eval(), mean_D, deviation_D, names)


def build_network(classes: int) -> nn.Sequential:
    """Build the layers.

    Args:
        classes: Number of classes.

    Returns:
        The untrained layers.
    """
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Dropout(0.3), nn.Linear(HIDDEN, classes))
