"""What nano knows: the table of its sound classes, and what is kept from it for adapters to learn.

A class is what a listener would name: an instrument, a drum, a small band, an effect. `kind` says how it is made:
pitched (one instrument), drum (General MIDI percussion keys), band (several instruments) or effect (`effects.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sound:
    """One class. `low`..`high`: playable MIDI keys. `decay`: plucked or struck, so that a note dies by itself."""

    name: str
    kind: str
    program: int = 0
    low: int = 48
    high: int = 84
    decay: bool = False
    family: str = ""
    genres: tuple[str, ...] = ("Cinematic",)
    keys: tuple[int, ...] = ()  # drum: percussion keys, the first one leading


PITCHED = (
    Sound("piano", "pitched", 0, 36, 88, True, "keys", ("Classical", "Jazz", "Pop")),
    Sound("electric piano", "pitched", 4, 40, 80, True, "keys", ("Soul", "Lo-fi", "Jazz")),
    Sound("harpsichord", "pitched", 6, 41, 84, True, "keys", ("Baroque", "Classical")),
    Sound("music box", "pitched", 10, 60, 96, True, "mallets", ("Lullaby", "Cinematic")),
    Sound("vibraphone", "pitched", 11, 53, 89, True, "mallets", ("Jazz", "Lounge")),
    Sound("marimba", "pitched", 12, 45, 84, True, "mallets", ("Latin", "Minimal")),
    Sound("tubular bells", "pitched", 14, 60, 77, True, "mallets", ("Cinematic", "Orchestral")),
    Sound("hammond organ", "pitched", 16, 40, 84, False, "organ", ("Gospel", "Rock")),
    Sound("church organ", "pitched", 19, 36, 84, False, "organ", ("Sacred", "Baroque")),
    Sound("accordion", "pitched", 21, 53, 84, False, "organ", ("Folk", "Tango")),
    Sound("nylon guitar", "pitched", 24, 40, 76, True, "guitar", ("Flamenco", "Classical", "Latin")),
    Sound("steel guitar", "pitched", 25, 40, 76, True, "guitar", ("Folk", "Country")),
    Sound("distorted guitar", "pitched", 30, 40, 74, False, "guitar", ("Metal", "Rock")),
    Sound("acoustic bass", "pitched", 32, 28, 55, True, "bass", ("Jazz", "Swing")),
    Sound("slap bass", "pitched", 36, 28, 55, True, "bass", ("Funk", "Disco")),
    Sound("synth bass", "pitched", 38, 28, 55, False, "bass", ("House", "Techno")),
    Sound("violin", "pitched", 40, 55, 88, False, "strings", ("Classical", "Folk")),
    Sound("cello", "pitched", 42, 36, 69, False, "strings", ("Classical", "Cinematic")),
    Sound("pizzicato strings", "pitched", 45, 43, 84, True, "strings", ("Orchestral", "Comedy")),
    Sound("harp", "pitched", 46, 40, 88, True, "strings", ("Fantasy", "Orchestral")),
    Sound("string ensemble", "pitched", 48, 40, 84, False, "strings", ("Orchestral", "Cinematic")),
    Sound("choir", "pitched", 52, 48, 79, False, "voice", ("Sacred", "Cinematic")),
    Sound("trumpet", "pitched", 56, 55, 82, False, "brass", ("Jazz", "March")),
    Sound("trombone", "pitched", 57, 40, 70, False, "brass", ("Jazz", "March")),
    Sound("french horn", "pitched", 60, 41, 72, False, "brass", ("Orchestral", "Cinematic")),
    Sound("saxophone", "pitched", 66, 46, 75, False, "reeds", ("Jazz", "Blues")),
    Sound("oboe", "pitched", 68, 58, 84, False, "reeds", ("Classical", "Pastoral")),
    Sound("clarinet", "pitched", 71, 50, 84, False, "reeds", ("Classical", "Swing")),
    Sound("flute", "pitched", 73, 60, 92, False, "pipes", ("Classical", "Pastoral")),
    Sound("square synth lead", "pitched", 80, 48, 88, False, "synth", ("Chiptune", "Electro")),
    Sound("saw synth lead", "pitched", 81, 48, 88, False, "synth", ("Trance", "EDM")),
    Sound("warm pad", "pitched", 89, 48, 79, False, "synth", ("Ambient", "New Age")),
)
DRUMS = (
    Sound("kick drum", "drum", genres=("House", "Techno"), keys=(36,)),
    Sound("snare drum", "drum", genres=("March", "Rock"), keys=(38,)),
    Sound("hi-hat", "drum", genres=("Trap", "Funk"), keys=(42, 46)),
    Sound("crash cymbal", "drum", genres=("Rock", "Metal"), keys=(49,)),
    Sound("toms", "drum", genres=("Rock", "Tribal"), keys=(47, 43, 50)),
    Sound("hand claps", "drum", genres=("Disco", "Electro"), keys=(39,)),
    Sound("congas", "drum", genres=("Latin", "Salsa"), keys=(63, 64, 62)),
    Sound("rock drums", "drum", genres=("Rock",), keys=(36, 38, 42)),
    Sound("house drums", "drum", genres=("House",), keys=(36, 39, 46)),
)
BANDS = (
    Sound("jazz trio", "band", genres=("Jazz",)),
    Sound("rock band", "band", genres=("Rock",)),
    Sound("techno loop", "band", genres=("Techno",)),
    Sound("orchestra", "band", genres=("Orchestral",)),
)
EFFECTS = (
    Sound("riser", "effect", genres=("Sound Effects",)),
    Sound("downlifter", "effect", genres=("Sound Effects",)),
    Sound("impact", "effect", decay=True, genres=("Sound Effects",)),
    Sound("drone", "effect", genres=("Sound Effects",)),
    Sound("clicks", "effect", decay=True, genres=("Sound Effects",)),
    Sound("wind", "effect", genres=("Sound Effects",)),
    Sound("laser zap", "effect", decay=True, genres=("Sound Effects",)),
    Sound("alarm beeps", "effect", genres=("Sound Effects",)),
)
# Never in nano's training corpus: what adapters are to learn.
HELD_OUT = (
    Sound("koto", "pitched", 107, 45, 81, True, "strings", ("Japanese traditional",)),
    Sound("steel drums", "pitched", 114, 52, 84, True, "mallets", ("Calypso",)),
    Sound("bagpipe", "pitched", 109, 55, 79, False, "reeds", ("Celtic",)),
    Sound("sitar", "pitched", 104, 45, 77, True, "strings", ("Indian classical",)),
)
KNOWN = PITCHED + DRUMS + BANDS + EFFECTS
NAMES = tuple(sound.name for sound in KNOWN)
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
ROOT_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
