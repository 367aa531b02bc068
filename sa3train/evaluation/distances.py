"""Distances of generated clips to real ones in the autoencoder's latent space.

Nearest neighbors are among windows of latents (1.5 s), by root mean square distance. Each channel is in units of its
spread over the training clips, or over the held-out ones where there are none.

Shapes: N and M windows, C channels, T frames, K = C × window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW, STRIDE = 16, 4


@dataclass(frozen=True)
class Memorization:
    """Mean nearest-neighbor distances, and the closest training clip of each generated clip.

    Attributes:
        generated_to_training: From windows of generated clips to training clips.
        generated_to_heldout: From generated clips to held-out clips.
        heldout_to_training: From held-out clips to training clips.
        nearest: Per generated clip: clip, training_clip, distance.
    """

    generated_to_training: float
    generated_to_heldout: float
    heldout_to_training: float
    nearest: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """Generated-to-training over held-out-to-training distance: about 1 for new music, towards 0 for copies."""
        return self.generated_to_training / max(self.heldout_to_training, 1e-9)


def extract_windows(latents: Sequence[Tensor], size: int = WINDOW, stride: int = STRIDE) -> tuple[Tensor, Tensor]:
    """Extract every window of some latents; a clip shorter than a window is repeated to its length.

    Args:
        latents: (C, T) each.
        size: Frames per window.
        stride: Frames between windows.

    Returns:
        The windows (N, K), and the number of the clip that each is from, (N,).
    """
    rows, owners = [], []
    for number, latent_CT in enumerate(latents):
        times = -(-size // latent_CT.shape[1])
        filled_CT = latent_CT.float().repeat(1, times)[:, : max(size, latent_CT.shape[1])]
        unfolded = filled_CT.unfold(1, size, stride).permute(1, 0, 2).flatten(1)
        rows.append(unfolded)
        owners.append(torch.full((len(unfolded),), number))
    return torch.cat(rows), torch.cat(owners)


def find_nearest(queries_NK: Tensor, keys_MK: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Find the nearest key of each query.

    Args:
        queries_NK: Windows.
        keys_MK: Windows to search.
        chunk: Queries compared at a time.

    Returns:
        Root mean square distances (N,), and the numbers of the keys (N,).
    """
    distances, numbers = [], []
    for start in range(0, len(queries_NK), chunk):
        found = torch.cdist(queries_NK[start : start + chunk], keys_MK).min(dim=1)
        distances.append(found.values)
        numbers.append(found.indices)
    return torch.cat(distances) / queries_NK.shape[1] ** 0.5, torch.cat(numbers)


def compute_frechet_distance(first_TC: Tensor, second_TC: Tensor) -> float:
    """Compute the Fréchet distance between normal distributions with the means and covariances of two sets.

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), equation 6 of Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update
    Rule". It grows with fewer samples, so that only distances of equally many are to be compared.

    Args:
        first_TC: Samples, at least two.
        second_TC: Samples, at least two.

    Returns:
        The distance, at least 0.
    """
    first_TC, second_TC = first_TC.double(), second_TC.double()
    shift = (first_TC.mean(dim=0) - second_TC.mean(dim=0)).square().sum()
    parts = [(x_TC - x_TC.mean(dim=0)) / (len(x_TC) - 1) ** 0.5 for x_TC in (first_TC, second_TC)]
    # tr (Σ₁ Σ₂)^½ with Σᵢ = XᵢᵀXᵢ is the sum of the singular values of X₁X₂ᵀ, which is stable where a Σ is singular;
    # a QR decomposition makes the product as small as the number of channels.
    roots = [torch.linalg.qr(x_TC, mode="r").R for x_TC in parts]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, float(shift + sum(x_TC.square().sum() for x_TC in parts) - 2 * cross))


class ReferenceClips:
    """Held-out and training clips that generated clips are compared with.

    Args:
        heldout: Latents (C, T) of held-out clips.
        training: Latents of training clips; may be empty.
        names: Names of the training clips.
    """

    def __init__(self, heldout: Sequence[Tensor], training: Sequence[Tensor], names: Sequence[str]) -> None:
        frames_CT = torch.cat([latent_CT.float() for latent_CT in training or heldout], dim=1)
        self._spread_C1 = frames_CT.std(dim=1, keepdim=True).clamp(min=1e-6)
        self.heldout, self.training, self.names = self._scale(heldout), self._scale(training), list(names)
        self._heldout_NK, _ = extract_windows(self.heldout) if heldout else (torch.empty(0), None)
        self.heldout_to_training = float("nan")
        if heldout and training:
            self.heldout_to_training = float(self._find_nearest_training(self._heldout_NK)[0].mean())

    def measure_frechet(self, generated: Sequence[Tensor]) -> tuple[float, list[float]]:
        """Measure the Fréchet distance between the frames of generated and of held-out clips.

        Args:
            generated: Latents (C, T), together of two frames or more.

        Returns:
            The distance; and with each generated clip left out, in turn, for the jackknife: none for a single clip.
        """
        clips, heldout_TC = self._scale(generated), torch.cat(self.heldout, dim=1).T

        def compute(some: Sequence[Tensor]) -> float:
            return compute_frechet_distance(torch.cat(list(some), dim=1).T, heldout_TC)

        left_out = [[*clips[:number], *clips[number + 1 :]] for number in range(len(clips))]
        has_covariance = all(sum(clip.shape[1] for clip in rest) > 1 for rest in left_out)
        return compute(clips), [compute(rest) for rest in left_out] if has_covariance else []

    def measure_nearest(self, generated: Sequence[Tensor]) -> list[float]:
        """Measure how far each generated clip is from the held-out ones.

        Args:
            generated: Latents (C, T).

        Returns:
            Mean distance of each clip's windows to the nearest window of a held-out clip.
        """
        windows = [extract_windows([latent_CT])[0] for latent_CT in self._scale(generated)]
        return [float(find_nearest(each_NK, self._heldout_NK)[0].mean()) for each_NK in windows]

    def measure_memorization(self, generated: Sequence[Tensor]) -> Memorization:
        """Measure how close generated clips come to training clips.

        Args:
            generated: Latents (C, T) of generated clips.

        Returns:
            Distances and closest clips.
        """
        made_NK, made_from_N = extract_windows(self._scale(generated))
        distance_N, clip_N = self._find_nearest_training(made_NK)
        closest = []
        for number in range(len(generated)):
            own = (made_from_N == number).nonzero()[:, 0]
            best = own[distance_N[own].argmin()]
            name = self.names[int(clip_N[best])]
            closest.append({"clip": number, "training_clip": name, "distance": float(distance_N[best])})
        to_heldout = sum(self.measure_nearest(generated)) / len(generated)
        return Memorization(float(distance_N.mean()), to_heldout, self.heldout_to_training, closest)

    def _scale(self, latents: Sequence[Tensor]) -> list[Tensor]:
        return [latent_CT.float() / self._spread_C1 for latent_CT in latents]

    def _find_nearest_training(self, queries_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (N,) to the nearest window of a training clip, and the clips' numbers; one clip at a time."""
        distances = torch.stack([find_nearest(queries_NK, extract_windows([clip])[0])[0] for clip in self.training])
        nearest = distances.min(dim=0)
        return nearest.values, nearest.indices


def measure_spread(latents: Sequence[Tensor]) -> float:
    """Measure the spread of latents.

    Args:
        latents: (C, T) each.

    Returns:
        Root mean square over channels of their standard deviation in time.
    """
    return float(torch.stack([latent_CT.float().var(dim=1).mean() for latent_CT in latents]).mean().sqrt())
