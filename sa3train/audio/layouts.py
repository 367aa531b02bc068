"""Which speaker each channel of an audio file is meant for, and the matrix that mixes speakers to stereo.

docs/audio-formats.md has the tables with their sources.
"""

import contextlib
import io
import math
import struct
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import mutagen.flac

from sa3train.audio.chunks import read_chunks
from sa3train.core.errors import AudioError

Source = str | PathLike[str] | bytes

_HALF_POWER = math.sqrt(0.5)
_LEFT, _RIGHT, _CENTER = (1.0, 0.0), (0.0, 1.0), (_HALF_POWER, _HALF_POWER)
_LEFT_SURROUND, _RIGHT_SURROUND, _CENTER_SURROUND = (_HALF_POWER, 0.0), (0.0, _HALF_POWER), (0.5, 0.5)
_NEAR_CENTER = math.cos(math.pi / 8), math.sin(math.pi / 8)  # halfway between left and center, at equal power

SPEAKERS = {
    **{"FL": _LEFT, "FR": _RIGHT, "FC": _CENTER, "LFE": (0.0, 0.0), "BL": _LEFT_SURROUND, "BR": _RIGHT_SURROUND},
    **{"FLC": _NEAR_CENTER, "FRC": _NEAR_CENTER[::-1], "BC": _CENTER_SURROUND},
    **{"SL": _LEFT_SURROUND, "SR": _RIGHT_SURROUND, "TC": _CENTER_SURROUND},
    **{"TFL": _LEFT_SURROUND, "TFC": _CENTER_SURROUND, "TFR": _RIGHT_SURROUND},
    **{"TBL": _LEFT_SURROUND, "TBC": _CENTER_SURROUND, "TBR": _RIGHT_SURROUND, "LW": _LEFT, "RW": _RIGHT},
}
"""Left and right gain of each speaker. The first 18 stand in the order of the bits of WAV's speaker mask."""

_MASK_ORDER = tuple(SPEAKERS)[:18]


def _parse_layouts(text: str) -> dict[int, tuple[str, ...]]:
    return {len(names): tuple(names) for names in map(str.split, text.split(";"))}


DEFAULT_LAYOUTS = _parse_layouts(
    "FC; FL FR; FL FR FC; FL FR BL BR; FL FR FC BL BR; FL FR FC LFE BL BR; FL FR FC LFE BC SL SR; "
    "FL FR FC LFE BL BR SL SR"
)
"""Speakers of a file that names none, by the number of channels (FLAC's order, RFC 9639 section 9.1.3)."""

_VORBIS_LAYOUTS = DEFAULT_LAYOUTS | _parse_layouts(
    "FL FC FR; FL FC FR BL BR; FL FC FR BL BR LFE; FL FC FR SL SR BC LFE; FL FC FR SL SR BL BR LFE"
)
"""Order of Ogg Vorbis (Vorbis I, section 4.3.9) and of Opus in mapping family 1 (RFC 7845, section 5.1.1.2)."""

_APPLE_NAMES = {
    **{"L": "FL", "R": "FR", "C": "FC", "Ls": "BL", "Rs": "BR", "Lc": "FLC", "Rc": "FRC", "Cs": "BC", "Lsd": "SL"},
    **{"Rsd": "SR", "Ts": "TC", "Vhl": "TFL", "Vhc": "TFC", "Vhr": "TFR", "Ltr": "TBL", "Rtr": "TBR", "Rls": "BL"},
    **{"Rrs": "BR", "Lw": "LW", "Rw": "RW", "Ltm": "TFL", "Rtm": "TFR"},
}

_APPLE_TAGS = """\
100 C; 101 L R; 107 W X Y Z; 108 L R Ls Rs; 109 L R Ls Rs C; 110 L R Ls Rs C Cs; 111 L R Ls Rs C Cs Lw Rw;
112 L R Rls Rrs Vhl Vhr Ltr Rtr; 113 L R C; 114 C L R; 115 L R C Cs; 116 C L R Cs; 117 L R C Ls Rs;
118 L R Ls Rs C; 119 L C R Ls Rs; 120 C L R Ls Rs; 121 L R C LFE Ls Rs; 122 L R Ls Rs C LFE;
123 L C R Ls Rs LFE; 124 C L R Ls Rs LFE; 125 L R C LFE Ls Rs Cs; 126 L R C LFE Ls Rs Lc Rc;
127 C Lc Rc L R Ls Rs LFE; 128 L R C LFE Ls Rs Rls Rrs; 129 L R Ls Rs C LFE Lc Rc; 131 L R Cs; 132 L R Ls Rs;
133 L R LFE; 134 L R LFE Cs; 135 L R LFE Ls Rs; 136 L R C LFE; 137 L R C LFE Cs; 138 L R Ls Rs LFE;
139 L R Ls Rs C Cs; 140 L R Ls Rs C Rls Rrs; 141 C L R Ls Rs Cs; 142 C L R Ls Rs Cs LFE;
143 C L R Ls Rs Rls Rrs; 144 C L R Ls Rs Rls Rrs Cs; 148 L R Ls Rs C Lc Rc; 149 C LFE; 150 L C R; 151 L C R Cs;
152 L C R LFE; 153 L R Cs LFE; 154 L C R Cs LFE; 183 C L R Ls Rs Rls Rrs LFE; 184 C L R Ls Rs LFE Vhl Vhr;
185 L R Rls Rrs; 186 L R C Rls Rrs; 187 L R C LFE Rls Rrs; 188 L R C LFE Cs Ls Rs; 189 L R C LFE Rls Rrs Ls Rs;
192 L R C LFE Ls Rs Rls Rrs Vhl Vhr Ltr Rtr; 193 L R C LFE Ls Rs Rls Rrs Lw Rw Vhl Vhr Ltm Rtm Ltr Rtr;
194 L R C LFE Ls Rs Ltm Rtm"""

_APPLE_LAYOUTS = {
    int(tag): tuple(_APPLE_NAMES.get(name, name) for name in names)
    for tag, *names in map(str.split, _APPLE_TAGS.split(";"))
}
"""Core Audio's layout tags (upper 16 bits), in AIFF-C and CAF."""

_APPLE_LABELS = dict(enumerate(_MASK_ORDER, 1)) | {
    **{33: "BL", 34: "BR", 35: "LW", 36: "RW", 37: "LFE", 42: "FC", 44: "BC", 49: "TFL", 51: "TFR"},
    **{52: "TBL", 53: "TBC", 54: "TBR", 200: "W", 201: "X", 202: "Y", 203: "Z", 204: "mid", 205: "side"},
    **{206: "FL", 207: "FR", 208: "FL", 209: "FR", 301: "FL", 302: "FR"},
}
"""Core Audio's channel labels. The first 18 are WAV's speakers."""

_AMBISONIC_GUID_TAIL = bytes.fromhex("2107d3118644c8c1ca000000")


def read_speakers(source: Source, channels: int) -> tuple[str, ...] | None:
    """Read from an audio file's header which speaker each channel is meant for.

    Args:
        source: Path, or the bytes of a file.
        channels: Number of channels.

    Returns:
        Names of `SPEAKERS` in the order of the channels; other names for channels that are meant for no speaker, such
        as "W" of ambisonics and "1" of a discrete channel. None where the file does not say.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        head = file.read(4096)
        if head.startswith(b"OggS"):
            speakers = _name_ogg(head, channels)
        elif head.startswith(b"fLaC"):
            file.seek(0)
            speakers = _name_flac(file, channels)
        else:
            speakers = _name_chunks(source, channels)
    # Nothing but left and right is meant where two channels have no speakers: many tools leave the mask at 0.
    return None if channels <= 2 and speakers and any(name.isdigit() for name in speakers) else speakers


def compute_downmix(speakers: Sequence[str]) -> list[tuple[float, float]]:
    """Compute the gains that mix speakers to stereo: ITU-R BS.775-4, annex 4, table 2, extended.

    Center and surrounds are mixed at -3 dB, the low-frequency channel is left out. The largest gain is 1, so that
    a single channel, or a pair of surrounds, keeps its level.

    Args:
        speakers: Name of each channel's speaker.

    Returns:
        (left, right) gain of each channel.

    Raises:
        AudioError: Channels are meant for no speaker.
    """
    if len(speakers) == 1:
        return [(1.0, 1.0)]
    foreign = next((name for name in speakers if name not in SPEAKERS), None)
    if foreign:
        reason = f"{'channel ' * foreign.isdigit()}{foreign} has no speaker"
        if foreign in "WXYZ" or foreign.startswith("ACN"):
            reason = f"{foreign} is ambisonics, which must be decoded first"
        raise AudioError(f"no rule to mix {len(speakers)} channels to stereo: {reason}. Mix it to stereo yourself.")
    gains = [SPEAKERS[name] for name in speakers]
    largest = max(map(max, gains)) or 1.0
    return [(left / largest, right / largest) for left, right in gains]


def _number(channels: int) -> tuple[str, ...]:
    """Names of discrete channels."""
    return tuple(str(channel + 1) for channel in range(channels))


def _name_ambisonics(channels: int) -> tuple[str, ...]:
    return tuple(f"ACN{channel}" for channel in range(channels))


def _name_mask(mask: int, channels: int) -> tuple[str, ...] | None:
    """Channels by the mask's bits from the lowest, those beyond its bits without speaker; None for the usual order.

    Many tools write a mask of 0, or left and right only, for channels in that order. Bit 31 stands for any speakers.
    """
    bits = [bit for bit in range(31) if mask >> bit & 1][:channels]
    names = tuple(_MASK_ORDER[bit] if bit < len(_MASK_ORDER) else str(place + 1) for place, bit in enumerate(bits))
    usual = DEFAULT_LAYOUTS.get(channels, ())
    if len(names) < len(usual) and names == usual[: len(names)]:
        return None
    return (*names, *_number(channels)[len(names) :])


def _name_ogg(head: bytes, channels: int) -> tuple[str, ...] | None:
    if b"\x7fFLAC" in head:
        return DEFAULT_LAYOUTS.get(channels)
    opus = head.find(b"OpusHead")
    family = head[opus + 18] if 0 <= opus < len(head) - 18 else 1
    if family in (2, 3):
        return _name_ambisonics(channels)
    return _number(channels) if family == 255 else _VORBIS_LAYOUTS.get(channels, _number(channels))


def _name_flac(file: BinaryIO, channels: int) -> tuple[str, ...] | None:
    if channels > 2:
        with contextlib.suppress(Exception):  # what mutagen raises for damaged tags is not one class
            mask = mutagen.flac.FLAC(file)["waveformatextensible_channel_mask"][0]
            return _name_mask(int(mask, 0), channels)
    return DEFAULT_LAYOUTS.get(channels)


def _name_chunks(source: Source, channels: int) -> tuple[str, ...] | None:
    order, chunks = read_chunks(source, b"fmt ", b"CHAN", b"chan")
    for name, content in chunks:
        if name == b"fmt ":
            if int.from_bytes(content[:2], order) == 0xFFFE and len(content) >= 40:
                if content[28:40] == _AMBISONIC_GUID_TAIL:
                    return tuple("WXYZ") if channels == 4 else _name_ambisonics(channels)
                return _name_mask(int.from_bytes(content[20:24], order), channels)
        elif name in (b"CHAN", b"chan") and len(content) >= 12:
            return _name_apple(content, channels)
    return None


def _name_apple(content: bytes, channels: int) -> tuple[str, ...] | None:
    """Channels by a Core Audio layout: its tag, bitmap or descriptions."""
    tag, bitmap, count = struct.unpack_from(">III", content)
    if tag == 0:
        count = min(count, channels, (len(content) - 12) // 20)
        labels = [struct.unpack_from(">I", content, 12 + 20 * number)[0] for number in range(count)]
        names = [_APPLE_LABELS.get(label, str(number + 1)) for number, label in enumerate(labels)]
        return (*names, *_number(channels)[len(names) :])
    if tag >> 16 == 1:
        return _name_mask(bitmap, channels)
    if tag >> 16 in (190, 191):
        return _name_ambisonics(channels)
    if tag >> 16 == 104 and channels == 2:
        return ("mid", "side")
    named = _APPLE_LAYOUTS.get(tag >> 16, ())
    return named if len(named) == channels else _number(channels)
