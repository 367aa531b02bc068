"""Check that latents of another tool were made by the autoencoder that their shards will name.

Such folders name no weights. Silence tells: its latents are the same for the same autoencoder. Where a folder has none,
latents are decoded and encoded again, which returns them for their own autoencoder only.
"""

from collections.abc import Iterator

import numpy as np
import torch

from sa3train.core.device import move_to_device
from sa3train.core.errors import DataError
from sa3train.core.log import get_logger
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.sources.latents import (
    DETAILS,
    RATIO,
    SILENCE,
    ImportedLatents,
    read_array,
    read_fields,
    read_imported_latents,
)
from sa3train.data.sources.listing import Listing

_logger = get_logger(__name__)

LARGEST_SILENCE_ERROR = 0.1
"""Relative to the autoencoder's own latents of silence."""
SMALLEST_CORRELATION = 0.7
"""Of latents with themselves, decoded and encoded again. With nano on datasets/sample it is 0.84 to 0.90, and 0.39 to
0.58 for latents of another autoencoder, whose channels mean something else.
"""
_FRAMES, _CLIPS = 128, 4


def check_imported(listing: Listing, encoder: Encoder, settings: EncodeSettings, source: str) -> None:
    """Check latents of another tool against the autoencoder, and that no setting is without effect on them.

    Args:
        listing: The source.
        encoder: The autoencoder that the shards will name.
        settings: Settings of the encode.
        source: Name of the source, for messages.

    Raises:
        DataError: Another autoencoder made them, this cannot be told, or a setting needs audio.
    """
    idle = [
        f"{name}={','.join(getattr(settings, name))}" for name in ("fixes", "augmentations") if getattr(settings, name)
    ]
    if idle:
        raise DataError(f"{' and '.join(idle)} need audio, but {source} has latents. Remove it, or encode the audio.")
    if details := listing.of_latents.get(DETAILS):
        _logger.info("%s says: %s", details.name, ", ".join(f"{k}={v}" for k, v in read_fields(details).items()))
    usable = _iterate_usable(listing)
    clips = [imported for imported, _ in zip(usable, range(_CLIPS), strict=False)]
    if not clips:
        return  # all are rejected, which the plan says
    channels, expected = len(clips[0].latents_CF), encoder.autoencoder.latent_channels
    if channels != expected or encoder.autoencoder.downsampling_ratio != RATIO:
        problem = f"they have {channels} channels, not {expected}"
    elif (silence_CF := _find_silence(listing, clips)) is not None:
        error = measure_silence_error(encoder, silence_CF)
        problem = f"silence is off by {error:.1%}" if not error <= LARGEST_SILENCE_ERROR else ""
    else:
        agreement = float(np.median([measure_round_trip(encoder, clip.latents_CF) for clip in clips]))
        lost = f"decoded and encoded again, they agree with themselves by {agreement:.1%} only"
        problem = lost if not agreement >= SMALLEST_CORRELATION else ""
    if problem:
        raise DataError(
            f"the latents in {source} were not made by the autoencoder of '{encoder.name}': {problem}. Set model= to "
            f"the one that made them, or encode the audio."
        )


def _iterate_usable(listing: Listing) -> Iterator[ImportedLatents]:
    for clip in listing.clips:
        if clip.is_latents and clip.fields is not None:
            try:
                yield read_imported_latents(clip.audio, clip.fields)
            except DataError:
                continue  # the audit rejects it


def _find_silence(listing: Listing, clips: list[ImportedLatents]) -> np.ndarray | None:
    """Latents of silence (C, F) away from its ends: `silence.npy`, else long padding."""
    if blob := listing.of_latents.get(SILENCE):
        return read_array(blob)
    longest = max((clip.padding_CF for clip in clips), key=lambda padding_CF: padding_CF.shape[1])
    is_silence = longest.shape[1] >= 4 * 16 and longest.any()  # not zeros that fill up the array
    return longest[:, 16:-16] if is_silence else None


def measure_silence_error(encoder: Encoder, silence_CF: np.ndarray) -> float:
    """Measure how far latents of silence are from those of an autoencoder.

    Args:
        encoder: The autoencoder.
        silence_CF: Latents of silence.

    Returns:
        The distance of their means over time, relative to the autoencoder's.
    """
    own_C = encoder.encode_silence().astype(np.float32).mean(axis=1)
    if len(own_C) != len(silence_CF):
        return float("inf")
    return float(np.linalg.norm(silence_CF.mean(axis=1) - own_C) / np.linalg.norm(own_C))


@torch.inference_mode()
def measure_round_trip(encoder: Encoder, latents_CF: np.ndarray) -> float:
    """Measure how well latents survive being decoded and encoded again.

    Args:
        encoder: The autoencoder.
        latents_CF: Latents; their first frames are used.

    Returns:
        Correlation.
    """
    autoencoder, rng = encoder.autoencoder, torch.Generator().manual_seed(0)
    z_1CT = move_to_device(torch.from_numpy(latents_CF[None, :, :_FRAMES].copy()), encoder.device)
    audio_1CN = autoencoder.decode(z_1CT, generator=rng)
    again_1CT = autoencoder.encode(audio_1CN, generator=rng)[..., : z_1CT.shape[-1]]
    pair = torch.stack([z_1CT.flatten().float(), again_1CT.flatten().float()])
    return float(torch.corrcoef(pair)[0, 1])
