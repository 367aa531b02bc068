"""Shared by training of nano's base and distillation: parts of the model, batches of latents, saving and resuming.

Shapes: B items, C latent channels, T latent frames, L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from speed import fast_cpu_muon
from start import MASK_NOISE, PATCH
from store import Store
from targets import LOUDEST, load_code, silence
from text import Prompts, embed, new_encoder, train_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sa3train.diffusion.masks import build_attention_mask, extend_into_silence
from sa3train.models.checkpoint import build_modules
from sa3train.models.conditioners import Conditioning
from sa3train.models.nano import (
    CONDITION_WIDTH,
    LATENT_WIDTH,
    MAX_TOKENS,
    SAMPLE_SIZE,
    build_checkpoint_config,
    build_dit_config,
    build_nano_config,
    build_same_config,
)
from sa3train.models.parse import parse_model
from sa3train.models.text_source import TextEncoderSource

FRAMES_PER_SECOND = 44100 / 4096
SILENCE = "silence.safetensors"  # of `latents.py`: the frame of silence
WIDE_LOUDEST = 16.0  # of the next nano's latents: at 8 the loudest waveforms lose 6 % of their energy
DIT = {"width": 256, "depth": 3, "memory_tokens": 8, "ff_mult": 2.0}  # of the next nano


class Cap(NamedTuple):
    """A kind of batch: `items` clips of at most `frames` frames, with `tail` frames of silence after the longest.

    `silence` is the mean length in seconds of the silence that counts as real; the released trainer has 4.
    """

    frames: int
    items: int
    tail: int
    silence: float
    share: float


SHORT = (Cap(24, 96, 8, 0.5, 0.6), Cap(48, 56, 16, 1.0, 0.4))  # to begin with: more clips a second
LONG = (Cap(24, 96, 24, 1.5, 0.35), Cap(48, 56, 48, 3.0, 0.4), Cap(130, 20, 62, 4.0, 0.25))
WHOLE = (Cap(24, 48, 66, 10.0, 0.4), Cap(48, 40, 66, 10.0, 0.4), Cap(130, 18, 66, 10.0, 0.2))  # tails as generation has


def latest(work: Path, name: str) -> dict[str, Any] | None:
    """Find the checkpoint of a part, the cooled one if there is one; None without any."""
    for path in (work / f"{name}-cool.pt", work / f"{name}.pt"):
        if path.exists():
            saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            return saved
    return None


def load_silence(work: Path) -> Tensor:
    """Load the latent frame of silence, (C,): of `latents.py` if that encoded the corpus, else of `targets.py`."""
    path = work / SILENCE
    return load_file(path)["silence"] if path.exists() else silence(load_code(work))


def load(work: Path, split: str) -> list[Tensor]:
    """Load the latents of a split's first chunks, as far as they are encoded, in the order of the store."""
    chunks, folder = list(Store(work / split).chunks), work / "latents"
    encoded = sorted(int(path.stem.split("-")[1]) for path in folder.glob(f"{split}-*.pt"))
    if encoded != chunks[: len(encoded)]:
        raise FileNotFoundError(
            f"{folder} has chunks {encoded} of {split}, which are not the first of {chunks}: delete those that are not"
            " there, and run the script that encoded the others (recipes/nano/latents.py or targets.py)"
        )
    paths = [folder / f"{split}-{number}.pt" for number in encoded]
    return [z for path in paths for z in torch.load(path, weights_only=True)]


@dataclass
class Batch:
    """Clips of one length with silence after them; `real_BT` counts a random part of that silence as real."""

    latents_BCT: Tensor
    real_BT: Tensor
    seconds_B: Tensor
    frames_B: Tensor
    ids_BL: Tensor
    mask_BL: Tensor

    def to(self, device: torch.device) -> Batch:
        """Move the batch to `device`."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Corpus:
    """Encoded clips of one split with their captions."""

    def __init__(self, work: Path, split: str, tokenizer: PreTrainedTokenizerFast, silence_C: Tensor) -> None:
        self.latents = load(work, split)
        self.entries = Store(work / split).entries[: len(self.latents)]
        self.prompts = Prompts(tokenizer, [entry["captions"] for entry in self.entries])
        self.silence_C = silence_C
        self.loudest = LOUDEST if len(silence_C) == LATENT_WIDTH else WIDE_LOUDEST

    def batch(self, picks: list[int], cap: Cap, rng: random.Random) -> Batch:
        """Make a batch of clips cut to `cap` (two in three from their start), each with a random caption."""
        whole_length = cap.frames + cap.tail
        latents_BCT = self.silence_C[None, :, None].repeat(len(picks), 1, whole_length)
        frames, seconds, texts = [], [], []
        for row, pick in enumerate(picks):
            entry = self.entries[pick]
            whole, caption = -(-entry["length"] // 4096), rng.randrange(len(entry["captions"]))
            length = min(whole, cap.frames)
            moved = whole > length and entry["plan"].get("tempo") and rng.random() < 1 / 3
            moved = moved and "bpm" not in entry["captions"][caption].lower()  # a stated tempo starts on a beat
            start = rng.randrange(whole - length + 1) if moved else 0
            z_CT = self.latents[pick][:, start : start + length].float()
            latents_BCT[row, :, :length] = z_CT.clamp(-self.loudest, self.loudest)
            frames.append(length)
            seconds.append(length / FRAMES_PER_SECOND if whole > length else entry["length"] / 44100)
            texts.append((pick, caption))
        frames_B = torch.tensor(frames)
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        real_BT = build_attention_mask(frames_B, whole_length)
        real_BT = extend_into_silence(real_BT, generator, mean_seconds=cap.silence)
        ids_BL, mask_BL = self.prompts.batch(texts)
        return Batch(latents_BCT, real_BT, torch.tensor(seconds), frames_B, ids_BL, mask_BL)

    def batches(self, seed: int, caps: Sequence[Cap]) -> Iterator[Batch]:
        """Yield random batches without end; clips much shorter than the cap go to batches of a smaller one.

        A clip of a class is drawn twice as often as others.
        """
        rng = random.Random(seed)
        groups = {}
        for cap, below in zip(caps, (0, *(cap.frames for cap in caps)), strict=False):
            fitting = [i for i, z in enumerate(self.latents) if z.shape[1] > below * 2 / 3]
            groups[cap] = fitting or list(range(len(self.latents)))
        weights = {cap: [1 + bool(self.entries[i]["plan"]["sound"]) for i in group] for cap, group in groups.items()}
        while True:
            cap = rng.choices(caps, [cap.share for cap in caps])[0]
            yield self.batch(rng.choices(groups[cap], weights[cap], k=cap.items), cap, rng)


def build_config(latent_width: int) -> dict[str, Any]:
    """Build the config of nano, or of the next nano if its latents are wider."""
    if latent_width == LATENT_WIDTH:
        return build_nano_config("rectified_flow")
    dit = build_dit_config(latent_width=latent_width, **DIT, condition_width=CONDITION_WIDTH)
    shared = {"channels": 128, "strides": [4], "chunk_size": 8, "chunk_midpoint_shift": True, "transformer_depths": [2]}
    decoder = {**shared, "sinusoidal_blocks": [2], "conv_mapping": True, "mask_noise": MASK_NOISE}
    autoencoder = build_same_config(latent_width, 2, {**shared, "mask_noise": 0.0}, decoder)
    autoencoder["pretransform"]["config"]["patch_size"] = PATCH
    return build_checkpoint_config("rectified_flow", SAMPLE_SIZE, dit, autoencoder, CONDITION_WIDTH, MAX_TOKENS)


@torch.no_grad()
def give_noise_back(dit: Any) -> None:
    """Let a DiT begin with its input as its output, which is right for pure noise: branches and convolutions are 0."""
    into, out = dit.transformer.project_in.weight, dit.transformer.project_out.weight
    nn.init.orthogonal_(into)
    out.copy_(into.T)
    empty = [dit.preprocess_conv, dit.postprocess_conv]
    for layer in dit.transformer.layers:
        empty += [layer.self_attn.to_out, layer.cross_attn.to_out, layer.ff.ff[2], layer.to_local_embed[2]]
    for part in empty:
        for parameter in part.parameters():
            parameter.zero_()


class Nano(nn.Module):
    """The trainable parts: DiT, conditioner and text encoder (a submodule here, unlike in `StableAudio3`)."""

    def __init__(self, pieces: int, latent_width: int = LATENT_WIDTH) -> None:
        super().__init__()
        model = parse_model(build_config(latent_width), "nano")
        built = build_modules(model, TextEncoderSource((), ()), device="cpu")
        self.dit, self.conditioner = built["dit"], built["conditioner"]
        self.text = new_encoder(pieces)
        if latent_width > LATENT_WIDTH:
            give_noise_back(self.dit)

    def condition(self, batch: Batch, drop_B: Tensor | None = None) -> Conditioning:
        """Compute the conditions of a batch; `drop_B` zeroes the cross-attention condition of those items."""
        condition = self.conditioner.condition(embed(self.text, batch.ids_BL, batch.mask_BL), batch.seconds_B)
        if drop_B is None:
            return condition
        kept_BLD = torch.where(drop_B[:, None, None], 0.0, condition.cross_attn_cond_BLD)
        return Conditioning(kept_BLD, condition.global_cond_BD, condition.prompt_mask_BL)


def tokenizer_of(work: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer trained on the corpus's captions; it is made on first use."""
    folder = work / "tokenizer"
    if not folder.is_dir():
        captions = [text for entry in Store(work / "train").entries for text in entry["captions"]]
        train_tokenizer(captions).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Average:
    """Exponential moving average of a module's weights, faster at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Update the average with the current weights."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, tensor in module.state_dict().items():
            if tensor.dtype.is_floating_point:
                self.state[name].lerp_(tensor, 1 - decay)


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the DiT's blocks and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "dit.transformer.layers" in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen and p.numel()]
    fast_cpu_muon()
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([{"params": others, "share": 0.5}], lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of each group, scaled by its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)


def state_of(**parts: Any) -> dict[str, Any]:
    """Collect state dicts of modules and optimizers by name, for `torch.save`."""
    return {name: part.state_dict() for name, part in parts.items()}
