"""Freeze the trained autoencoder with latents of unit scale, and encode the rendered corpus with it.

    python recipes/nano/latents.py WORK    # WORK/ae.pt -> WORK/ae.safetensors, WORK/linear/{train,val}-K.pt; resumable

Each channel gets mean 0. Its spread follows how much the decoder listens to it: what is heard gets a larger share of
the diffusion loss. All of it is folded into the bottleneck and the decoder's first layer, so the released layout holds
it. Shapes: B items, C latent channels, T latent frames, N samples.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from autoencoder import Crops, build
from safetensors.torch import load_file, save_file
from store import CHUNK, Store
from torch import Tensor, nn

from sa3train.files import atomic_path
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.linear_code import MARK, PATCH_DIMS, D, fold_scale

BUDGET = 40  # clips encoded together
LOUDEST = 8.0  # latents beyond this many spreads (the hardest drum strokes) are cut to it for the DiT


@torch.no_grad()
def loudness_of_channels(model: Autoencoder, z_BCT: Tensor, step: float = 0.5) -> Tensor:
    """RMS change of the audio per unit of each channel's spread, (C,): each channel is nudged alone."""
    spread_C = z_BCT.std((0, 2))
    channels = len(spread_C)
    heard = torch.zeros(channels)
    for z_CT in z_BCT[:2, :, :2]:
        nudges_CC = torch.diag(step * spread_C)
        made = model.decode(torch.cat([z_CT[None], z_CT + nudges_CC[..., None]]), noise=False)
        heard += (made[1:] - made[:1]).pow(2).mean((1, 2)) / step**2
    return heard.sqrt()


@torch.no_grad()
def set_scale(model: Autoencoder, audio_BCN: Tensor, power: float = 0.5, widest: float = 2.0) -> None:
    """Fold mean and spread into bottleneck and decoder; spread ~ loudness**power, within 1/widest..widest of its
    mean.
    """
    z_BCT = model.encode(audio_BCN, noise=False)
    mean_C, spread_C = z_BCT.mean((0, 2)), z_BCT.std((0, 2)).clamp_min(1e-4)
    heard_C = loudness_of_channels(model, z_BCT)
    wanted_C = (heard_C / heard_C.median().clamp_min(1e-9)).pow(power).clamp(1 / widest, widest)
    wanted_C = wanted_C / wanted_C.pow(2).mean().sqrt()
    gain_C = wanted_C / spread_C
    fold_scale(model.state_dict(), gain_C, mean_C)


def freeze(work: Path) -> Autoencoder:
    """The averaged weights of WORK/ae.pt, scaled once and kept as WORK/ae.safetensors."""
    model, path = build(), work / "ae.safetensors"
    if not path.exists():
        average = torch.load(work / "ae.pt", weights_only=True, map_location="cpu")["average"]
        model.load_state_dict({name[7:]: tensor for name, tensor in average.items() if name.startswith("module.")})
        torch.manual_seed(1)
        store = Store(work / "train")
        set_scale(model, Crops(store, 99).batch(48))
        whole = torch.cat(encode_chunk(model, store, range(min(60, len(store.entries)))), 1).float()
        model.bottleneck.running_std.mul_(whole.clamp(-LOUDEST, LOUDEST).std())
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    model.load_state_dict(load_file(path))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def encode_chunk(model: Autoencoder, store: Store, indices: range) -> list[Tensor]:
    """Latents (C, T) in fp16 of the store's clips, encoded `BUDGET` at a time."""
    latents: list[Tensor] = []
    for start in range(indices.start, indices.stop, BUDGET):
        clips = [torch.from_numpy(store.audio(index)) for index in range(start, min(start + BUDGET, indices.stop))]
        latents += [z.half() for z in model.encode_many(clips, noise=False)]
    return latents


@torch.no_grad()
def encode_linear(model: Autoencoder, store: Store, indices: range) -> list[Tensor]:
    """What `encode_chunk` gives while the encoder is the linear start, by two matrix products: 0.4 % apart."""
    state = model.state_dict()
    weight = state["encoder.layers.0.mapping.weight_v"]
    weight = weight * (state["encoder.layers.0.mapping.weight_g"] / weight.norm(dim=(1, 2), keepdim=True))
    patch = weight[:PATCH_DIMS, :, 0]
    values = (
        state["encoder.layers.0.transformers.1.self_attn.to_qkv.weight"][2 * D : 3 * D].unflatten(0, (4, 64)).clone()
    )
    values[3, 62:] = 0  # the channels of MARK and CONST
    quarters = torch.einsum("cqk,qkd->qdc", state["encoder.layers.2.weight"].unflatten(1, (4, 64)), values)
    latents = []
    for index in indices:
        audio = torch.from_numpy(store.audio(index))
        audio = nn.functional.pad(audio, (0, -audio.shape[1] % 8192))
        patches = audio.unflatten(1, (-1, 256)).permute(1, 0, 2).flatten(1) @ patch.T
        newest_first = patches.view(-1, 4, 4, PATCH_DIMS).flip(2).flatten(2)
        newest_first[..., MARK:] = 0
        z_TC = torch.einsum("tqd,qdc->tc", newest_first, quarters)
        latents.append(model.bottleneck.encode(z_TC.T[None])[0].half())
    return latents


def load(work: Path, split: str) -> list[Tensor]:
    """All latents of a split encoded so far, in the store's order."""
    paths = sorted((work / "linear").glob(f"{split}-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    return [z for path in paths for z in torch.load(path, weights_only=True)]


def main() -> None:
    """Freeze and encode what is not there yet."""
    parser = argparse.ArgumentParser(description="encode nano's corpus")
    parser.add_argument("work", type=Path)
    parser.add_argument("--linear", action="store_true", help="the encoder is the linear start: take the short way")
    args = parser.parse_args()
    model, encode = freeze(args.work), encode_linear if args.linear else encode_chunk
    (args.work / "linear").mkdir(exist_ok=True)
    for split in ("val", "train"):
        store = Store(args.work / split)
        for number in range(len(store.entries) // CHUNK):
            path = args.work / "linear" / f"{split}-{number}.pt"
            if not path.exists():
                began = time.monotonic()
                latents = encode(model, store, range(number * CHUNK, (number + 1) * CHUNK))
                with atomic_path(path) as temporary:
                    torch.save(latents, temporary)
                print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
