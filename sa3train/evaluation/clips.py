"""The clips that adapters are evaluated on, from latent shards, with the crops and prompts of validation."""

from dataclasses import dataclass
from pathlib import Path

from sa3train.core.errors import DataError
from sa3train.core.log import get_logger
from sa3train.data.loading.clip_batch import ClipBatch, split_clips
from sa3train.data.loading.loader import CropSettings, LatentDataset, SplitClips, ValidationLoader
from sa3train.data.loading.prompts import PromptBuilder
from sa3train.data.loading.sampler import SampleIndex
from sa3train.data.loading.settings import DataSettings
from sa3train.data.shards.index import check_autoencoder
from sa3train.data.shards.reader import LatentStore
from sa3train.models.checkpoint import StableAudio3

_logger = get_logger(__name__)

MAX_TRAINING_CLIPS = 256
"""Training clips that generated ones are compared with, spread over the set."""


@dataclass(frozen=True)
class EvaluationClips:
    """Clips to evaluate on.

    Attributes:
        paths: Folders of the shards.
        heldout: Held-out clips, batches of one.
        training: Training clips, likewise; empty where the shards have none.
    """

    paths: list[str]
    heldout: list[ClipBatch]
    training: list[ClipBatch]


def load_clips(
    data: DataSettings | str | Path, model: StableAudio3, limit: int, *, use_all: bool = False
) -> EvaluationClips:
    """Load clips for a model, the same for every adapter.

    Args:
        data: Folder or URL of latent shards, or the data settings of a training run, with its crops and prompts.
        model: The model, whose autoencoder must have made the latents.
        limit: Maximum number of held-out clips.
        use_all: Take every clip for a held-out one: the shards are of no training.

    Returns:
        The clips.

    Raises:
        DataError: If the shards cannot be read, belong to another autoencoder, or hold nothing out.
    """
    settings = data if isinstance(data, DataSettings) else DataSettings(str(data))
    sources = [source for source in settings.list_sources() if source.role == "train"]
    stores = [
        LatentStore(source.path, verify=settings.verify, allow_damaged=settings.allow_damaged) for source in sources
    ]
    for store in stores:
        check_autoencoder(store.index, model.name, model.autoencoder_fingerprint(), store.path)
    frames = settings.count_crop_frames(model.sample_rate, model.downsampling_ratio)
    crop = CropSettings(min(frames or model.max_frames, model.max_frames), settings.crop, settings.seconds)
    builder = PromptBuilder(settings.prompts)
    where = ", ".join(store.path for store in stores)
    if use_all:
        found = [clip for split in ("heldout", "train") for clip in _load_split(stores, split, crop, builder, limit)]
        return EvaluationClips([store.path for store in stores], found[:limit], [])
    heldout = _load_split(stores, "heldout", crop, builder, limit)
    training = _load_split(stores, "train", crop, builder, MAX_TRAINING_CLIPS)
    if not heldout:
        raise DataError(
            f"{where} holds no clip out, and clips that were trained on say nothing of new ones. Encode with "
            "split=0.1; or, if no adapter was trained on these clips, evaluate on all of them: --all-clips."
        )
    if not training:
        _logger.warning("there are no training clips in %s: no memorization score.", where)
    return EvaluationClips([store.path for store in stores], heldout, training)


def _load_split(
    stores: list[LatentStore], split: str, crop: CropSettings, builder: PromptBuilder, limit: int
) -> list[ClipBatch]:
    clips = [SplitClips(store, split, augmentations=False) for store in stores]
    samples = [
        SampleIndex(source, clip, int(frames), clip)
        for source, each in enumerate(clips)
        for clip, frames in enumerate(each.compute_lengths(crop.frames))
    ]
    if not samples:
        return []
    stride = max(1, len(samples) // limit) if split == "train" else 1
    dataset = LatentDataset(clips, crop, builder, fixed_prompts=True)
    return split_clips(ValidationLoader(dataset, [[[sample]] for sample in samples[::stride]]), limit)
