"""Make `docs/nano/index.html`: forty generations with audio, spectrogram and measurements.

python recipes/nano/listen.py [--out docs/nano]     # from the weights in sa3train/assets/nano
"""

from __future__ import annotations

import argparse
import html
import io
from pathlib import Path

from PIL import Image

from sa3train.audio.io import encode_audio
from sa3train.audio.metrics import plot_mel_spectrogram
from sa3train.bench.nano import ATTRIBUTE_PROMPTS, CFG_SCALE
from sa3train.core.files import write_bytes, write_text
from sa3train.evaluation.classifier import Classifier
from sa3train.inference import Generator
from sa3train.models.nano import ASSETS

RATE, SECONDS = 44100, 4.0
MORE = (
    "A soft sad piano plays a legato melody in C minor at 72 BPM.",
    "TrackType: Instrument, Instruments: Trumpet, Genre: Jazz, Mood: cheerful, BPM: 112, Key: F major",
    "TrackType: Instrument, Instruments: Violin, Genre: Folk, BPM: 132",
    "solo cello, low register, legato, melody",
    "solo harp, arpeggio, 96 BPM",
    "distorted guitar, chords, loud, 132 BPM",
    "A rock band in E minor at 132 BPM.",
    "TrackType: Music, Instruments: Techno loop, BPM: 132",
    "TrackType: Music, Instruments: Orchestra, Mood: dramatic",
    "TrackType: Drums, Instruments: Rock drums, BPM: 104",
    "house drums, loop, 132 BPM",
    "congas, loop, 112 BPM",
    "Sound effect: impact.",
    "Sound effect: laser zap.",
    "The sound of alarm beeps.",
    "choir, chords, legato, with reverb",
)
HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nano: forty generations</title>
<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}img{width:100%}section{margin:2em 0}</style>
<h1>nano: forty generations</h1>
<p>The first seed of each prompt, without selection: base (50 steps, guidance 4) and post-trained (8 steps) in turn.
“Classified as” is the first choice of the small classifier.</p>
"""


def small(png: bytes) -> bytes:
    """Reduce the picture to two thirds of its size, as WebP: the repository has forty of them."""
    picture, made = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3), Image.Resampling.LANCZOS)
    picture.save(made, "WEBP", quality=80, method=6)
    return made.getvalue()


def main() -> None:
    """Generate and write the page."""
    parser = argparse.ArgumentParser(description="write nano's listening page")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "nano")
    args = parser.parse_args()
    classifier = Classifier.load(ASSETS / "classifier.safetensors")
    prompts = [*MORE, *(wish.prompt for wish in ATTRIBUTE_PROMPTS)]
    page = [HEAD]
    for name, settings in (("nano-base", {"cfg_scale": CFG_SCALE}), ("nano", {})):
        generator = Generator.from_pretrained(name, precision="fp32")
        numbers = [n for n in range(len(prompts)) if (n % 2 == 0) == (name == "nano-base")]
        made = generator.generate([prompts[n] for n in numbers], duration=SECONDS, seed=7, **settings)
        for number, clip in zip(numbers, made.audio, strict=True):
            heard = classifier.classify(clip, RATE)
            stem = f"{number:02d}"
            write_bytes(args.out / f"{stem}.ogg", encode_audio(clip, RATE, ".ogg"))
            write_bytes(args.out / f"{stem}.webp", small(plot_mel_spectrogram(clip, RATE, prompts[number])))
            where = f"{name}, seed 7, {SECONDS:g} s; classified as {heard}"
            page.append(
                f"<section><h2>{html.escape(prompts[number])}</h2><p>{where}</p>"
                f'<audio controls src="{stem}.ogg"></audio><img src="{stem}.webp" alt="mel spectrogram"></section>\n'
            )
    write_text(args.out / "index.html", "".join(page) + "</html>\n")


if __name__ == "__main__":
    main()
