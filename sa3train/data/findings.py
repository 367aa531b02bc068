"""What an audit can find, each with a code, a severity and a remedy. An `error` keeps a clip from being encoded."""

from dataclasses import dataclass
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Kind:
    """A kind of finding: how grave it is, what it says, and what to do."""

    severity: str
    title: str
    remedy: str


KINDS: dict[str, Kind] = {
    "unreadable": Kind(ERROR, "cannot be read", "export it again, as WAV or FLAC"),
    "not_finite": Kind(ERROR, "holds NaN or infinity", "export it again; check the effect or format that made it"),
    "implausible": Kind(ERROR, "its rate or level cannot be right", "export it again; its header may be damaged"),
    "too_short": Kind(ERROR, "shorter than one latent frame (93 ms)", "remove it, or join it with others"),
    "silent": Kind(ERROR, "silent throughout", "remove it, or export it again"),
    "no_caption": Kind(ERROR, "no caption", "write one to a .txt of the same name, or encode with captions=optional"),
    "empty_caption": Kind(ERROR, "the caption is empty", "write one, or encode with captions=optional"),
    "bad_text": Kind(ERROR, "its text cannot be read", "save the caption as UTF-8 text"),
    "bad_fields": Kind(WARNING, "its fields cannot be used", "mend the .json: one object with text and numbers"),
    "damaged_source": Kind(ERROR, "its container is damaged or its listing is wrong", "mend the manifest or the tar"),
    "changed": Kind(ERROR, "changed while it was being encoded", "run the same command again"),
    "bad_latent": Kind(ERROR, "the autoencoder gave no finite latents", "encode with model.dtype=fp32"),
    "dropped_duplicate": Kind(ERROR, "the same audio as another clip, dropped", "encode with duplicates=keep"),
    "duplicate": Kind(WARNING, "the same audio as another clip", "remove one, or encode with duplicates=drop"),
    "near_duplicate": Kind(WARNING, "sounds the same as another clip", "keep the better one"),
    "caption_conflict": Kind(WARNING, "two captions that differ", "keep one"),
    "caption_long": Kind(WARNING, "the caption is longer than the model reads", "shorten it; the end goes unread"),
    "cut_short": Kind(WARNING, "the file ends before its header says", "copy or download it again"),
    "clipped": Kind(WARNING, "clipped", "use the unclipped original, or restore it"),
    "over_full_scale": Kind(NOTE, "peaks beyond full scale", "turn it down before export, or encode with fix=loudness"),
    "leading_silence": Kind(WARNING, "starts with silence", "encode with fix=trim_silence"),
    "trailing_silence": Kind(WARNING, "ends with silence", "encode with fix=trim_silence"),
    "dc_offset": Kind(WARNING, "the waveform is off centre", "encode with fix=dc"),
    "quiet": Kind(WARNING, "very quiet", "encode with fix=loudness"),
    "low_rate": Kind(WARNING, "a low sample rate: no high frequencies", "use a source of 44.1 kHz or more"),
    "one_sided": Kind(WARNING, "one channel is silent", "export it as mono, or mend the channel"),
    "mono_as_stereo": Kind(NOTE, "both channels are the same", "nothing, if it is meant to be mono"),
    "mono": Kind(NOTE, "one channel; it will be doubled", "nothing, if it is meant to be mono"),
    "multichannel": Kind(NOTE, "more than two channels; they will be mixed", "mix it to stereo yourself to be sure"),
    "long": Kind(NOTE, "longer than the model's longest; training takes crops", "cut it into pieces with own captions"),
}


def finding(code: str, detail: str = "") -> dict[str, Any]:
    """A finding as it stands in an audit row."""
    return {"code": code, "severity": KINDS[code].severity, "detail": detail}


def is_rejected(row: dict[str, Any]) -> bool:
    """Whether an audit row has an error among its findings."""
    return any(found["severity"] == ERROR for found in row["findings"])


def reason(row: dict[str, Any]) -> str:
    """Why a row is rejected, in words."""
    errors = [found for found in row["findings"] if found["severity"] == ERROR]
    return "; ".join(KINDS[e["code"]].title + (f": {e['detail']}" if e["detail"] else "") for e in errors)


def worst(row: dict[str, Any]) -> int:
    """0 for an error, 1 for a warning, 2 for a note, 3 for a clean row."""
    return min((SEVERITIES.index(found["severity"]) for found in row["findings"]), default=len(SEVERITIES))
