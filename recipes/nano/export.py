"""Write trained nano to the package: fp16 weights in `sa3train/assets/nano`, as `sa3train.models.nano` reads them.

    python recipes/nano/export.py WORK VERSION    # WORK/{encoder,decoder,base,post}[-cool].pt, classifier.safetensors

Without post.pt the base's weights are also those of the post-trained model; the model card must then say so.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "datasets" / "nano"))

import numpy as np
import soundfile
import torch
from decoder import first
from numpy.typing import NDArray
from parts import Nano, latest, tokenizer_of
from sounds import NAMES
from store import Store
from torch import Tensor

from sa3train.core.files import write_text
from sa3train.core.safetensors_file import write_tensors
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import collect_state_dict
from sa3train.models.nano import ASSETS, STEP, TEXT_FOLDER


def load_autoencoder(work: Path) -> Autoencoder:
    """Load encoder and decoder; an untrained decoder as set by hand."""
    model = first(work)
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        saved = latest(work, name)
        if saved is not None:
            part.load_state_dict(saved["average"])
    return model


def load_models(work: Path) -> tuple[Nano, dict[str, Tensor]]:
    """Load the base (EMA weights) and the DiT weights of the post-trained model: the base's without post.pt."""
    model, saved, post = Nano(len(tokenizer_of(work))), latest(work, "base"), latest(work, "post")
    if saved is None:
        raise FileNotFoundError(f"no base.pt in {work}: run recipes/nano/base.py {work}")
    model.load_state_dict(saved["average"])
    if post is None:
        return model, {name: tensor.clone() for name, tensor in model.dit.state_dict().items()}
    return model, post["average"]


def write(path: Path, state: dict[str, Tensor]) -> None:
    """Write an fp16 safetensors file."""
    write_tensors(path, {name: tensor.half().contiguous() for name, tensor in state.items()})


def subtract(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Express matrices as whole steps from the base's fp16 weights, at most 127 in each row, and the steps' sizes."""
    made = {}
    for name, tensor in state.items():
        if tensor.ndim != 2:
            made[name] = tensor.half().contiguous()
            continue
        difference = tensor.float() - base[name].half().float()
        step = (difference.abs().amax(1, keepdim=True) / 127).clamp_min(1e-7).half()
        made[name], made[name + STEP] = (difference / step.float()).round().clamp(-127, 127).to(torch.int8), step
    return made


def write_references(work: Path, folder: Path) -> None:
    """Write the classifier, and the first held-out clip of each class with two seconds or more, cut to three."""
    shutil.copyfile(work / "classifier.safetensors", folder / "classifier.safetensors")
    (folder / "held_out").mkdir(exist_ok=True)
    store = Store(work / "val")
    for name in NAMES:
        long = (i for i, entry in enumerate(store.entries) if entry["length"] > 2 * 44100)
        pick = next(i for i in long if store.entries[i]["plan"]["sound"] == name)
        audio = store.audio(pick, 0, 3 * 44100)
        write_ogg(folder / "held_out" / f"{name.replace(' ', '_')}.ogg", audio)


def write_ogg(path: Path, audio_CN: NDArray[np.float32]) -> None:
    """Write an Ogg Vorbis file of low quality."""
    with soundfile.SoundFile(path, "w", 44100, 2, subtype="VORBIS", compression_level=0.85) as file:
        for start in range(0, audio_CN.shape[1], 44100):  # libvorbis wants no large writes
            file.write(audio_CN[:, start : start + 44100].T)


def export(work: Path, folder: Path, version: str) -> None:
    """Write all files of `folder`, `version.txt` last, since it marks the rest as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version.txt").unlink(missing_ok=True)
    write(folder / "autoencoder.safetensors", collect_state_dict({"autoencoder": load_autoencoder(work)}))
    model, post = load_models(work)
    parts = {"dit": model.dit, "conditioner": model.conditioner}
    base = {name: tensor.clone() for name, tensor in collect_state_dict(parts).items()}
    write(folder / "nano-base.safetensors", base)
    model.dit.load_state_dict(post)
    write_tensors(folder / "nano.safetensors", subtract(collect_state_dict(parts), base))
    model.text.to(torch.bfloat16).save_pretrained(folder / TEXT_FOLDER)
    (folder / TEXT_FOLDER / "model.safetensors").chmod(0o644)
    tokenizer_of(work).save_pretrained(folder / TEXT_FOLDER)
    write_references(work, folder)
    write_text(folder / "version.txt", version + "\n")


def main() -> None:
    """Export, and print the sizes of the files."""
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
