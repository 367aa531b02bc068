"""A small classifier of sounds by the statistics of their log-mel spectrum: a ruler for generated audio, not a product.

Shapes: C channels, N samples, T frames, M mel bands, B clips, K classes, D features.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sa3train.audio.metrics import mel_spectrogram
from sa3train.core.files import write_tensors

BANDS = 64
RANGE_DB = 70.0
FEATURES = 6 * BANDS
HIDDEN = 256


def features(audio_CN: Tensor, sample_rate: int) -> Tensor:
    """What the classifier sees, (D,): mean, spread, mean rise and fall, and the loudest and first 0.1 s of each mel
    band.

    Levels are relative to the clip's loudest point, floored 70 dB under it; frames 45 dB under the loudest are left
    out.
    """
    decibels_MT = mel_spectrogram(audio_CN, sample_rate, BANDS)
    decibels_MT = (decibels_MT - decibels_MT.max()).clamp_min(-RANGE_DB) / RANGE_DB + 1
    loudness_T = decibels_MT.amax(dim=0)
    decibels_MT = decibels_MT[:, loudness_T > loudness_T.max() - 45 / RANGE_DB]
    step_MT = decibels_MT.diff(dim=1) if decibels_MT.shape[1] > 1 else torch.zeros_like(decibels_MT)
    parts = [decibels_MT.mean(1), decibels_MT.std(1, correction=0), step_MT.clamp_min(0).mean(1) * 10]
    parts += [step_MT.clamp_max(0).mean(1) * 10, decibels_MT.amax(1), decibels_MT[:, :9].mean(1)]
    return torch.cat(parts)


@dataclass
class Classifier:
    """Two linear layers over standardised features; `names` are the classes in order."""

    network: nn.Sequential
    mean_D: Tensor
    spread_D: Tensor
    names: list[str]

    @torch.no_grad()
    def probabilities(self, audio_CN: Tensor, sample_rate: int) -> Tensor:
        """(K,), summing to 1."""
        standard_D = (features(audio_CN, sample_rate) - self.mean_D) / self.spread_D
        return self.network(standard_D[None]).softmax(dim=-1)[0]

    def name(self, audio_CN: Tensor, sample_rate: int) -> str:
        """The most probable class."""
        return self.names[int(self.probabilities(audio_CN, sample_rate).argmax())]

    def save(self, path: Path) -> None:
        """fp16 safetensors with the class names in its metadata."""
        state = {**self.network.state_dict(), "mean": self.mean_D, "spread": self.spread_D}
        halves = {name: tensor.half().contiguous() for name, tensor in state.items()}
        write_tensors(path, halves, {"names": json.dumps(self.names)})

    @staticmethod
    def load(path: Path) -> "Classifier":
        """The classifier in a file written by `save`."""
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            names = json.loads(file.metadata()["names"])
        network = _network(len(names))
        mean_D, spread_D = state.pop("mean"), state.pop("spread")
        network.load_state_dict(state)
        return Classifier(network.eval(), mean_D, spread_D, names)


def _network(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Dropout(0.3), nn.Linear(HIDDEN, classes))


def train(
    features_BD: Tensor, labels_B: Tensor, names: list[str], epochs: int = 120, rate: float = 2e-3, seed: int = 0
) -> Classifier:
    """Fit a classifier to features with labels (indices into `names`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean_D, spread_D = features_BD.mean(0), features_BD.std(0).clamp_min(1e-3)
        standard_BD = (features_BD - mean_D) / spread_D
        network = _network(len(names)).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
        for _ in range(epochs):
            for pick in torch.randperm(len(labels_B)).split(64):
                jittered = standard_BD[pick] + 0.1 * torch.randn_like(standard_BD[pick])
                loss = nn.functional.cross_entropy(network(jittered), labels_B[pick], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return Classifier(network.eval().requires_grad_(False), mean_D, spread_D, names)
