"""Put trained nano into the package: fp16 weights in `sa3train/assets/nano`, as `sa3train.models.nano` assembles them.

    python recipes/nano/export.py WORK VERSION    # WORK/{encoder,decoder,base,post}[-cool].pt, classifier.safetensors

Without post.pt the base's weights serve as the post-trained model's; the model card must then say so.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "datasets" / "nano"))

import numpy as np
import soundfile
import torch
from decoder import first
from numpy.typing import NDArray
from parts import Nano, tokenizer_of
from sounds import NAMES
from store import Store
from torch import Tensor

from sa3train.core.files import write_tensors, write_text
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import released_state
from sa3train.models.nano import ASSETS, TEXT_FOLDER


def latest(work: Path, name: str) -> dict[str, Any] | None:
    """The checkpoint of a part, cooled where there is one; None without any."""
    found = [work / f"{name}-cool.pt", work / f"{name}.pt"]
    for path in found:
        if path.exists():
            saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            return saved
    return None


def load_autoencoder(work: Path) -> Autoencoder:
    """Encoder and decoder as trained; the decoder as set by hand where it is not."""
    model = first(work)
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        saved = latest(work, name)
        if saved is not None:
            part.load_state_dict(saved["average"])
    return model


def load_models(work: Path) -> tuple[Nano, dict[str, Tensor]]:
    """The base (averaged weights), and the DiT weights of the post-trained model: the base's own without post.pt."""
    model, saved, post = Nano(len(tokenizer_of(work))), latest(work, "base"), latest(work, "post")
    if saved is None:
        raise FileNotFoundError(f"no base.pt in {work}: run recipes/nano/base.py {work}")
    model.load_state_dict(saved["average"])
    if post is None:
        return model, {name: tensor.clone() for name, tensor in model.dit.state_dict().items()}
    return model, post["average"]


def write(path: Path, state: dict[str, Tensor]) -> None:
    """An fp16 safetensors file."""
    write_tensors(path, {name: tensor.half().contiguous() for name, tensor in state.items()})


def write_rulers(work: Path, folder: Path) -> None:
    """The classifier, and each class's first held-out clip of two seconds or more, cut to three and coded low."""
    shutil.copyfile(work / "classifier.safetensors", folder / "classifier.safetensors")
    (folder / "held_out").mkdir(exist_ok=True)
    store = Store(work / "val")
    for name in NAMES:
        long = (i for i, entry in enumerate(store.entries) if entry["length"] > 2 * 44100)
        pick = next(i for i in long if store.entries[i]["plan"]["sound"] == name)
        audio = store.audio(pick, 0, 3 * 44100)
        write_ogg(folder / "held_out" / f"{name.replace(' ', '_')}.ogg", audio)


def write_ogg(path: Path, audio_CN: NDArray[np.float32]) -> None:
    """A low-coded Ogg Vorbis file."""
    with soundfile.SoundFile(path, "w", 44100, 2, subtype="VORBIS", compression_level=0.85) as file:
        for start in range(0, audio_CN.shape[1], 44100):  # libvorbis wants no large writes
            file.write(audio_CN[:, start : start + 44100].T)


def export(work: Path, folder: Path, version: str) -> None:
    """Write all files of `folder`; `version.txt` last, since its presence means that the rest is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version.txt").unlink(missing_ok=True)
    write(folder / "autoencoder.safetensors", released_state({"autoencoder": load_autoencoder(work)}))
    model, post = load_models(work)
    parts = {"dit": model.dit, "conditioner": model.conditioner}
    write(folder / "nano-base.safetensors", released_state(parts))
    model.dit.load_state_dict(post)
    write(folder / "nano.safetensors", released_state(parts))
    model.text.to(torch.bfloat16).save_pretrained(folder / TEXT_FOLDER)
    (folder / TEXT_FOLDER / "model.safetensors").chmod(0o644)
    tokenizer_of(work).save_pretrained(folder / TEXT_FOLDER)
    write_rulers(work, folder)
    write_text(folder / "version.txt", version + "\n")


def main() -> None:
    """Export, and say what the files weigh."""
    parser = argparse.ArgumentParser(description="put trained nano into the package")
    parser.add_argument("work", type=Path)
    parser.add_argument("version")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    export(args.work, args.out, args.version)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
