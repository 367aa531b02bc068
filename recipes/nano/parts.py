"""What training nano's base and its distillation share: the parts of the model, batches of latents, saving and
resuming.

Shapes: B items, C latent channels, T latent frames, L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from latents import LOUDEST, load
from store import Store
from text import Prompts, embed, new_encoder, train_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sa3train.diffusion.masks import extend_into_silence, padding_mask
from sa3train.models.checkpoint import build
from sa3train.models.conditioners import Conditioning
from sa3train.models.nano import nano_config
from sa3train.models.parse import parse_model
from sa3train.models.sources import TextEncoderSource

FRAMES_PER_SECOND = 44100 / 4096
CAPS = {24: 96, 48: 64, 72: 44, 130: 24}  # longest clip of a batch in frames -> items in it
CAP_SHARES = (0.25, 0.5, 0.15, 0.1)
TAIL = 24  # frames of silence after the longest clip
SILENCE_SECONDS = 2.0  # mean: half the released trainer's, since clips here are short


@dataclass
class Batch:
    """Clips cut to one length, silence behind them; `real_BT` counts a random part of that silence as real."""

    latents_BCT: Tensor
    real_BT: Tensor
    seconds_B: Tensor
    frames_B: Tensor
    ids_BL: Tensor
    mask_BL: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Corpus:
    """Encoded clips of one split with their captions."""

    def __init__(self, work: Path, split: str, tokenizer: PreTrainedTokenizerFast, silence_C: Tensor) -> None:
        self.latents = load(work, split)
        self.entries = Store(work / split).entries[: len(self.latents)]
        self.prompts = Prompts(tokenizer, [entry["captions"] for entry in self.entries])
        self.silence_C = silence_C

    def batch(self, picks: list[int], cap: int, rng: random.Random) -> Batch:
        """Those clips, cut to at most `cap` frames (two in three from their start), with a caption each by chance."""
        latents_BCT = self.silence_C[None, :, None].repeat(len(picks), 1, cap + TAIL)
        frames, seconds, texts = [], [], []
        for row, pick in enumerate(picks):
            whole = -(-self.entries[pick]["length"] // 4096)
            length = min(whole, cap)
            moved = whole > cap and self.entries[pick]["plan"]["tempo"] and rng.random() < 1 / 3
            start = rng.randrange(whole - cap + 1) if moved else 0
            latents_BCT[row, :, :length] = (
                self.latents[pick][:, start : start + length].float().clamp(-LOUDEST, LOUDEST)
            )
            frames.append(length)
            seconds.append(length / FRAMES_PER_SECOND if whole > cap else self.entries[pick]["length"] / 44100)
            texts.append((pick, rng.randrange(len(self.entries[pick]["captions"]))))
        frames_B = torch.tensor(frames)
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        real_BT = padding_mask(frames_B, cap + TAIL)
        real_BT = extend_into_silence(real_BT, generator, mean_seconds=SILENCE_SECONDS)
        ids_BL, mask_BL = self.prompts.batch(texts)
        return Batch(latents_BCT, real_BT, torch.tensor(seconds), frames_B, ids_BL, mask_BL)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random batches without end; clips much shorter than the cap are left to batches of a smaller one."""
        rng = random.Random(seed)
        groups = {}
        for cap, below in zip(CAPS, (0, *CAPS), strict=False):
            fitting = [i for i, z in enumerate(self.latents) if z.shape[1] > below * 2 / 3]
            groups[cap] = fitting or list(range(len(self.latents)))
        while True:
            cap = rng.choices(tuple(CAPS), CAP_SHARES)[0]
            yield self.batch(rng.choices(groups[cap], k=CAPS[cap]), cap, rng)


class Nano(nn.Module):
    """The trainable parts together: DiT, conditioner and text encoder (a submodule here, unlike in use)."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        built = build(parse_model(nano_config("rectified_flow"), "nano"), TextEncoderSource((), ()), device="cpu")
        self.dit, self.conditioner = built["dit"], built["conditioner"]
        self.text = new_encoder(pieces)

    def condition(self, batch: Batch, drop_B: Tensor | None = None) -> Conditioning:
        """Conditions of a batch; `drop_B` zeroes the cross-attention condition of those items."""
        condition = self.conditioner.condition(embed(self.text, batch.ids_BL, batch.mask_BL), batch.seconds_B)
        if drop_B is None:
            return condition
        kept_BLD = torch.where(drop_B[:, None, None], 0.0, condition.cross_attn_cond_BLD)
        return Conditioning(kept_BLD, condition.global_cond_BD, condition.prompt_mask_BL)


def tokenizer_of(work: Path) -> PreTrainedTokenizerFast:
    """The tokenizer trained on the corpus's captions, made on first use."""
    folder = work / "tokenizer"
    if not folder.is_dir():
        captions = [text for entry in Store(work / "train").entries for text in entry["captions"]]
        train_tokenizer(captions).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Average:
    """Exponential average of a module's weights, quicker at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the current weights."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, tensor in module.state_dict().items():
            if tensor.dtype.is_floating_point:
                self.state[name].lerp_(tensor, 1 - decay)


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the DiT's blocks, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "dit.transformer.layers" in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen and p.numel()]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([{"params": others, "share": 0.5}], lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def set_rate(optimizer: torch.optim.Optimizer, rate: float, progress: float) -> None:
    """Warm-up over 2 %, level to 55 %, then a line down to a fiftieth; `progress` in 0..1."""
    share = min(progress / 0.02 + 0.02, 1.0, 0.02 + 0.98 * max(0.0, 1 - progress) / 0.45)
    for group in optimizer.param_groups:
        group["lr"] = rate * share * group.get("share", 1.0)


def state_of(**parts: Any) -> dict[str, Any]:
    """State dicts of modules and optimizers by name, for `torch.save`."""
    return {name: part.state_dict() for name, part in parts.items()}
