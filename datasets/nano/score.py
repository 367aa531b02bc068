"""Scores as data, and their Standard MIDI File form.

A `Score` is what the composer writes: notes in seconds, one program per channel, a few controllers. `midi_bytes` lays
many scores on one time line, so that one FluidSynth run renders hundreds of clips (starting it costs more than a clip
does).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

TICKS_PER_SECOND = 1000  # one beat of one second, 1000 ticks a beat: times are milliseconds
DRUMS = 9  # the General MIDI percussion channel (channel 10, counted from 0)
PAN, REVERB, CHORUS, EXPRESSION = 10, 91, 93, 11
RESET_CONTROLLERS, ALL_SOUND_OFF = 121, 120


@dataclass(frozen=True)
class Note:
    """One note: start and length in seconds, MIDI key (60 = middle C) and velocity 1..127."""

    start: float
    seconds: float
    key: int
    velocity: int
    channel: int = 0


@dataclass
class Score:
    """Notes with their instruments. `seconds` is the clip's length, tails included."""

    seconds: float
    notes: list[Note] = field(default_factory=list)
    programs: dict[int, int] = field(default_factory=dict)  # channel -> General MIDI program, counted from 0
    controls: dict[int, dict[int, int]] = field(default_factory=dict)  # channel -> controller -> value


def _variable_length(value: int) -> bytes:
    parts = [value & 0x7F]
    while value := value >> 7:
        parts.append((value & 0x7F) | 0x80)
    return bytes(reversed(parts))


def _events(score: Score, at: float) -> list[tuple[int, int, bytes]]:
    """(tick, order, message) of one score starting `at` seconds; order settles what shares a tick."""
    tick = round(at * TICKS_PER_SECOND)
    channels = sorted({note.channel for note in score.notes} | set(score.programs) | set(score.controls))
    events: list[tuple[int, int, bytes]] = []
    for channel in channels:
        events.append((tick, 0, bytes([0xB0 | channel, ALL_SOUND_OFF, 0])))
        events.append((tick, 1, bytes([0xB0 | channel, RESET_CONTROLLERS, 0])))
        events.append((tick, 2, bytes([0xC0 | channel, score.programs.get(channel, 0)])))
        controls = {PAN: 64, REVERB: 40, CHORUS: 0} | score.controls.get(channel, {})
        events += [(tick, 3, bytes([0xB0 | channel, number, value])) for number, value in controls.items()]
    end = tick + round(score.seconds * TICKS_PER_SECOND)
    for note in score.notes:
        on = tick + round(note.start * TICKS_PER_SECOND)
        off = min(end, on + max(1, round(note.seconds * TICKS_PER_SECOND)))
        events.append((on, 5, bytes([0x90 | note.channel, note.key, note.velocity])))
        events.append((off, 4, bytes([0x80 | note.channel, note.key, 0])))
    events += [(end, 6, bytes([0xB0 | channel, ALL_SOUND_OFF, 0])) for channel in channels]
    return events


def midi_bytes(scores: Sequence[Score], starts: Sequence[float]) -> bytes:
    """A type-0 MIDI file with each score beginning at its start (seconds)."""
    events = [event for score, at in zip(scores, starts, strict=True) for event in _events(score, at)]
    events.sort(key=lambda event: event[:2])
    track = bytearray(b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big"))  # one beat a second
    last = 0
    for tick, _, message in events:
        track += _variable_length(tick - last) + message
        last = tick
    track += _variable_length(TICKS_PER_SECOND) + b"\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS_PER_SECOND)
    return header + b"MTrk" + struct.pack(">I", len(track)) + bytes(track)
