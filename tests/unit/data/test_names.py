"""What names of files and folders say: as vendors write them, and never a tempo that is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3train.data.sources.names import confirm_tempo, find_common_words, parse_name

NAMES = [
    ("Kick_04_128bpm_Am.wav", {"bpm": 128, "key": "A minor", "kind": "kick"}),
    ("124_Cmin_Bass.wav", {"candidates": (124,), "key": "C minor", "kind": "bass"}),
    ("Loops/Deep House/x.wav", {"genre": "deep house", "form": "loop"}),
    ("SC_TR_128_bass_loop_hypnotic_F#m.wav", {"candidates": (128,), "key": "F# minor", "words": ("hypnotic",)}),
    ("Vendor - Synth Loop 1 - 140 BPM F# Min.wav", {"bpm": 140, "key": "F# minor", "kind": "synth", "form": "loop"}),
    ("bpm_120.50_x.wav", {"bpm": 120.5}),
    ("Loop_90_BPM_04.wav", {"bpm": 90}),
    ("100bpm_F#_pluck.wav", {"bpm": 100, "root": "F#", "key": None}),
    ("120BPM/Drums/hat loop 03.wav", {"bpm": 120, "bpm_source": "folder name", "kind": "hi-hat"}),
    ("drum and bass/break174.wav", {"genre": "drum and bass", "kind": "drum break"}),
    ("LOOP_174_DnB.wav", {"genre": "drum and bass", "candidates": (174,)}),
    ("Trap/808 Bass.wav", {"genre": "trap", "kind": "bass"}),
    ("drum_bass_hard.flac", {"kind": "kick", "words": ("hard",)}),
    ("rain_on_tin_roof_03.wav", {"words": ("rain", "tin", "roof")}),
    ("dusty_pad_dup truncated.wav", {"kind": "pad", "words": ("dusty",)}),
    ("backup vocals resampled original.wav", {"kind": "vocal", "words": ("backup", "resampled", "original")}),
    ("temp conv trim fixed.wav", {"words": ("temp", "conv", "trim", "fixed")}),
    ("Loops/Crash.wav", {"form": "loop", "form_source": "folder name"}),
    ("One Shots/Crash Loop.wav", {"form": "loop", "form_source": "file name"}),
    ("HiHatOpen.wav", {"kind": "hi-hat", "words": ("open",)}),
    ("mono 8bit_hum rate 24bit.wav", {"words": ("hum",)}),
    ("Pad A minor slow.wav", {"key": "A minor", "kind": "pad"}),
    ("Dusty_Pad_Chords_Dmin_100bpm.wav", {"key": "D minor", "kind": "chord", "words": ("dusty", "pad"), "bpm": 100}),
    ("Bass drum top loop.wav", {"kind": "top", "words": ("kick",), "form": "loop"}),
]
NO_TEMPO = [
    "808_kick", "909 Clap", "Kick 120", "Kick_128", "Snare 140", "Juno-106 pad", "SH-101 bass", "MPC60 hats", "CR-78",
    "House 120-128 BPM/lead", "bass-100-120bpm", "90 to 100 bpm/x", "Loop_80_BPM_120", "120 bpm 140 bpm", "Vol. 128",
    "take 90", "44100Hz", "24bit", "2023-11-05", "Track 120", "1280bpm", "12bpm", "mic 87",
]  # fmt: skip
NO_KEY = [
    "Who I Am",
    "Where Am I 120bpm",
    "Take Em Down",
    "A Min of Silence",
    "Vocal_Gimme Em Loop",
    "Emaj7 chord",
    "FM bass",
    "AM radio",
    "Am7",
    "Bm9 stab",
    "A_B_C",
    "Cm and Dm",
    "Admin",
    "Amino",
]


@pytest.mark.parametrize(("name", "said"), NAMES)
def test_names(name: str, said: dict[str, object]) -> None:
    found = vars(parse_name(name))
    assert {field: found[field] for field in said} == said


@pytest.mark.parametrize("name", NO_TEMPO)
def test_numbers_that_are_no_tempo(name: str) -> None:
    found = parse_name(f"{name}.wav")
    assert found.bpm is None and confirm_tempo(found, 2.0) is None


@pytest.mark.parametrize("name", NO_KEY)
def test_letters_that_are_no_key(name: str) -> None:
    assert parse_name(f"{name}.wav").key is None


@given(st.integers(40, 250), st.sampled_from(["{}bpm", "{} BPM", "Loop_{}_bpm_03", "BPM{} x", "x-bpm-{}", "04 {}BPM"]))
def test_a_tempo_beside_bpm_is_one(bpm: int, shape: str) -> None:
    assert parse_name(f"drums/{shape.format(bpm)}.wav").bpm == bpm


@given(st.lists(st.sampled_from(["kick", "808", "loop", "take", "pad", "120", "A", "07", "TR-909", "v2"]), max_size=5),
       st.sampled_from([" ", "_", "-", ""]))  # fmt: skip
def test_without_the_word_no_number_is_a_tempo(words: list[str], joint: str) -> None:
    assert parse_name(f"{joint.join(words)}.wav").bpm is None


@given(st.text(max_size=40))
def test_any_name_can_be_parsed(name: str) -> None:
    bpm = parse_name(name).bpm
    assert bpm is None or 40 <= bpm <= 250


@pytest.mark.parametrize(
    ("name", "seconds", "bpm"),
    [
        ("124_Cmin_Bass", 8 * 60 / 124, 124),
        ("Loop 120", 2.0, 120),
        ("synth 120", 2.0, None),  # four beats prove too little where no name says loop
        ("124_Cmin_Bass", 4.2, None),
        ("124_Cmin_Bass", None, None),
        ("loop 120 60", 4.0, None),  # both fit
    ],
)
def test_numbers_that_the_length_confirms(name: str, seconds: float | None, bpm: int | None) -> None:
    assert confirm_tempo(parse_name(f"{name}.wav"), seconds) == bpm


def test_words_of_the_vendor_do_not_tell_clips_apart() -> None:
    sources = [
        f"Acme Dusty {word}.wav" for word in ("amber", "bold", "calm", "deep", "eerie", "faint", "grand", "hazy")
    ]
    assert find_common_words(sources) == {"acme", "dusty"}
    assert find_common_words(sources[:3]) == set()
