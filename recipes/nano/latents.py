"""Encode a corpus with the autoencoder that `codec.py` trained: WORK/latents, WORK/silence.safetensors.

    python recipes/nano/latents.py WORK       # WORK/codec[-cool].pt; resumable: finished chunks are skipped

WORK/latents.json says with which codec and share; what was made with others is neither continued nor decoded.

Waveform latents get `SHARE` of their scale: a root mean square of 0.9 beside the levels' 1.5. Noise hides them first,
so that the levels, which carry what a prompt asks for, are decided before phases are; but samplers end with one step
from a noise level of 0.12 to 0.27, in which smaller waveforms would be lost. `load_codec` puts the factor
into the autoencoder's weights; their export is not written yet.

Shapes: C latent channels, T latent frames.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from parts import SILENCE, latest
from start import FRAME, LATENTS, build_codec
from store import Store
from torch import Tensor, nn

from sa3train.core.files import replace_file, write_json
from sa3train.core.safetensors_file import write_tensors
from sa3train.models.autoencoder import Autoencoder

SHARE = 0.6
RECORD = "latents.json"
WAVES = LATENTS[0]


@torch.no_grad()
def scale_waves(model: Autoencoder, share: float) -> None:
    """Multiply waveform latents by `share`, and undo it where the decoder reads them."""
    into, out = model.encoder.layers[2], model.decoder.layers[1]
    into.weight[:WAVES] *= share
    into.bias[:WAVES] *= share
    out.weight[:, :WAVES] /= share


def read_weights(work: Path) -> tuple[dict[str, Tensor], str]:
    """Read the trained autoencoder's averaged weights, and hash them."""
    saved = latest(work, "codec")
    if saved is None:
        raise FileNotFoundError(f"no codec.pt in {work}: run recipes/nano/codec.py {work}")
    digest = hashlib.sha256()
    for name, tensor in sorted(saved["average"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return saved["average"], digest.hexdigest()[:16]


def load_codec(work: Path, share: float | None = None) -> Autoencoder:
    """Load the autoencoder of WORK/latents, its waveform latents scaled as those are.

    Raises:
        ValueError: The latents were made with other weights, or with another share than the one asked for.
    """
    weights, digest = read_weights(work)
    path = work / RECORD
    made = json.loads(path.read_text()) if path.exists() else {}
    asked = {"codec": digest, "share": made.get("share") if share is None else share}
    if made != asked:
        raise ValueError(
            f"{work}/latents was made with {made or 'what no latents.json says'}, not with {asked}: bring back that"
            f" codec.pt or --share, or delete {work}/latents and watch.pt and run recipes/nano/latents.py {work}"
        )
    model = build_codec()
    model.load_state_dict(weights)
    scale_waves(model, made["share"])
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
    folder = args.work / "latents"
    folder.mkdir(exist_ok=True)
    if not any(folder.glob("*.pt")):
        write_json(args.work / RECORD, {"codec": read_weights(args.work)[1], "share": args.share})
    model = load_codec(args.work, args.share)
    with torch.no_grad():
        silence_C = model.encode(torch.zeros(1, 2, 10 * FRAME))[0, :, 5]
    write_tensors(args.work / SILENCE, {"silence": silence_C.contiguous()})
    for split in ("val", "train"):
        store = Store(args.work / split)
        for number in store.chunks:
            path = folder / f"{split}-{number}.pt"
            if not path.exists():
                with replace_file(path) as temporary:
                    torch.save([encode_clip(model, store, index) for index in store.indices(number)], temporary)
                print(path.name, flush=True)


if __name__ == "__main__":
    main()
