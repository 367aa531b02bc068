"""Write four held-out clips of an instrument that nano was not trained on, as reference for its adapter.

python recipes/nano/real_clips.py "steel drums" OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "datasets" / "nano"))

from corpus import chunk
from export import write_ogg
from sounds import HELD_OUT

SEED, COUNT = 1000, 4


def main() -> None:
    """Render and write the clips."""
    parser = argparse.ArgumentParser(description="write held-out clips of an instrument")
    parser.add_argument("sound", choices=[sound.name for sound in HELD_OUT])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    sound = next(each for each in HELD_OUT if each.name == args.sound)
    for number, clip in enumerate(chunk(SEED, 0, COUNT, sound, seconds=(2.5, 6.0))):
        write_ogg(args.out / f"{args.sound.replace(' ', '_')}_{number}.ogg", clip.audio[:, : 3 * 44100])


if __name__ == "__main__":
    main()
