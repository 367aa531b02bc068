"""Encode a corpus with the autoencoder that `codec.py` trained: WORK/latents, WORK/silence.safetensors.

    python recipes/nano/latents.py WORK       # WORK/codec[-cool].pt; resumable: finished chunks are skipped

Waveform latents get `SHARE` of their scale: a root mean square of 0.9 beside the levels' 1.5. Noise hides them first,
so that the levels, which carry what a prompt asks for, are decided before phases are; but samplers end with one step
from a noise level of 0.12 to 0.27, in which smaller waveforms would be lost. The factor belongs to the exported
autoencoder (`load_codec`).

Shapes: C latent channels, T latent frames.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from parts import SILENCE, latest
from safetensors.torch import load_file
from start import FRAME, LATENTS, build_codec
from store import Store
from torch import Tensor, nn

from sa3train.core.files import replace_file
from sa3train.core.safetensors_file import write_tensors
from sa3train.models.autoencoder import Autoencoder

SHARE = 0.6
WAVES = LATENTS[0]


@torch.no_grad()
def scale_waves(model: Autoencoder, share: float) -> None:
    """Multiply waveform latents by `share`, and undo it where the decoder reads them."""
    into, out = model.encoder.layers[2], model.decoder.layers[1]
    into.weight[:WAVES] *= share
    into.bias[:WAVES] *= share
    out.weight[:, :WAVES] /= share


def load_codec(work: Path, share: float | None = None) -> Autoencoder:
    """Load the trained autoencoder's averaged weights, its waveform latents scaled: as WORK/latents by default."""
    saved = latest(work, "codec")
    if saved is None:
        raise FileNotFoundError(f"no codec.pt in {work}: run recipes/nano/codec.py {work}")
    model = build_codec()
    model.load_state_dict(saved["average"])
    scale_waves(model, float(load_file(work / SILENCE)["share"]) if share is None else share)
    return model.eval()


@torch.no_grad()
def encode_clip(model: Autoencoder, store: Store, index: int) -> Tensor:
    """Compute a clip's latents (C, T), its audio padded with silence to whole frames."""
    audio_CN = torch.from_numpy(store.audio(index))
    return model.encode(nn.functional.pad(audio_CN, (0, -audio_CN.shape[1] % FRAME))[None])[0].half()


def main() -> None:
    """Encode the missing chunks."""
    parser = argparse.ArgumentParser(description="encode a corpus with nano's next autoencoder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--share", type=float, default=SHARE)
    args = parser.parse_args()
    model = load_codec(args.work, args.share)
    (args.work / "latents").mkdir(exist_ok=True)
    for split in ("val", "train"):
        store = Store(args.work / split)
        for number in sorted({entry["chunk"] for entry in store.entries}):
            path = args.work / "latents" / f"{split}-{number}.pt"
            if not path.exists():
                indices = [index for index, entry in enumerate(store.entries) if entry["chunk"] == number]
                with replace_file(path) as temporary:
                    torch.save([encode_clip(model, store, index) for index in indices], temporary)
                print(path.name, flush=True)
    with torch.no_grad():
        silence_C = model.encode(torch.zeros(1, 2, 10 * FRAME))[0, :, 5]
    write_tensors(args.work / SILENCE, {"silence": silence_C.contiguous(), "share": torch.tensor(args.share)})


if __name__ == "__main__":
    main()
