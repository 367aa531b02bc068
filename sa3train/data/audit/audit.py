"""Audit a source: decode, measure and check every clip once. An interrupted audit resumes where it stopped.

Results go to a journal, one JSON row per clip, which stays valid while the clip's stamp is unchanged. `AuditIndex`
keeps a few columns of the journal in memory, so that a million clips fit, and finds duplicates among all of them.
"""

import copy
import hashlib
import inspect
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3train.audio import analysis, notes
from sa3train.audio.analysis import AudioAnalysis, analyze_audio
from sa3train.audio.io import read_whole
from sa3train.core.config import check_choice
from sa3train.core.errors import AudioError, DataError
from sa3train.core.log import track_progress
from sa3train.data.audit.checks import (
    FINDING_TYPES,
    FINGERPRINT_BITS,
    LIMITS,
    check_measurements,
    check_usable,
    is_rejected,
    make_finding,
    measure,
)
from sa3train.data.audit.duplicates import find_duplicates, find_near_duplicates
from sa3train.data.captioning import compose, template
from sa3train.data.captioning.template import DEFAULT_TEMPLATE, check_template
from sa3train.data.sources import facts, names
from sa3train.data.sources.captions import FACTS, read_clip_text
from sa3train.data.sources.latents import LATENT_FIELDS, RATE, read_imported_latents
from sa3train.data.sources.listing import Clip, Listing
from sa3train.data.sources.lists import CAPTION_FIELDS, PATH_FIELDS
from sa3train.data.sources.names import NAME_WORDS
from sa3train.data.sources.tags import EMBEDDED_TAGS, MAX_TAG_LENGTH, TAG_PATTERNS

CAPTION_RULES = ("required", "optional", "auto")

READ_ERRORS = (AudioError, DataError, MemoryError, RuntimeError, ValueError, OverflowError, OSError)
"""What reading a damaged file may raise."""

_COPY_NAME = re.compile(
    r"(^|/)copy of [^/]*$|[ _-]+(copy|dup(licate|e)?)([ _-]?\d+)?( ?\(\d+\))?(\.\w+)?$| ?\(\d+\)(\.\w+)?$",
    re.IGNORECASE,
)
"""Names that file managers give to copies."""


_UNHEARD = frozenset(("unreadable", "not_finite", "silent"))
"""Findings of clips of which no caption can be composed: that they have none is no finding then."""
COMPOSITION = (analysis, notes, compose, template, facts, names)
"""Modules that decide what a composed caption says; any change of them is a new version of the audit."""


def compute_audit_version() -> str:
    """Compute a hash of everything in the code that decides what an audit row says.

    Rows of journals written with other caption fields, findings or limits are not reused.

    Returns:
        Hex digest, equal for equal checks.
    """
    severities = {code: kind.severity for code, kind in FINDING_TYPES.items()}
    text_fields = [
        CAPTION_FIELDS,
        PATH_FIELDS,
        LATENT_FIELDS,
        EMBEDDED_TAGS,
        MAX_TAG_LENGTH,
        TAG_PATTERNS,
        FACTS,
        NAME_WORDS,
    ]
    measurements = sorted(measure(np.zeros((1, 4096), np.float32), 44100))
    composition = [inspect.getsource(module) for module in COMPOSITION]
    guarded = [text_fields, severities, LIMITS, FINGERPRINT_BITS, measurements, composition]
    return hashlib.sha256(repr(guarded).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class AuditRules:
    """What the audit needs to know of the model that the clips are meant for.

    Attributes:
        captions: "required" rejects clips without a caption, "optional" accepts them, "auto" composes one of tags, name
            and sound.
        allow_promotional: Use tags inside audio files that read like an advertisement or a web address.
        longest_seconds: Longest audio the model generates, in seconds; None for no limit.
        count_tokens: Counts the tokens of each caption; None to skip the check.
        max_tokens: Number of tokens the model reads.
        template: How captions are composed.
        common_words: Words in most names of the source, which composed captions leave out.
    """

    captions: str = "required"
    allow_promotional: bool = False
    longest_seconds: float | None = None
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None
    max_tokens: int | None = None
    template: str = DEFAULT_TEMPLATE
    common_words: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_choice("captions", self.captions, CAPTION_RULES)
        check_template(self.template)


def audit_clip(clip: Clip, rules: AuditRules) -> dict[str, Any]:
    """Audit one clip. What is wrong with the clip becomes a finding, never an exception.

    Args:
        clip: The clip.
        rules: Limits of the model.

    Returns:
        The audit row: source, stamp, findings, measurements, caption, tags.
    """
    row: dict[str, Any] = {"source": clip.source, "stamp": clip.stamp, "findings": []}
    findings: list[dict[str, Any]] = row["findings"]
    if clip.is_latents:
        row |= _audit_latents(clip, rules, findings)
        return row | _audit_text(clip, None, rules, findings, None)
    path = clip.audio.local_path()
    content: bytes | None = None
    sound = None
    try:
        content = None if path else clip.audio.read()
        decoded = read_whole(path if content is None and path else content or b"")
    except READ_ERRORS as error:
        text = str(error) or type(error).__name__
        findings.append(make_finding("not_finite" if "NaN or infinite" in text else "unreadable", text))
    else:
        audio_CN, rate = decoded.audio_CN, decoded.sample_rate
        findings += [make_finding(problem.code, problem.detail) for problem in decoded.problems]
        unusable = check_usable(audio_CN.numpy(), rate, decoded.speakers)
        if unusable:
            findings.append(unusable)
        else:
            row |= measure(audio_CN.numpy(), rate, decoded.speakers)
            findings += check_measurements(row, rules.longest_seconds)
            is_heard = rules.captions == "auto" and not row["silent"]
            sound = analyze_audio(audio_CN.numpy(), rate) if is_heard else None
    row |= _audit_text(clip, content, rules, findings, sound)
    return row


def _audit_latents(clip: Clip, rules: AuditRules, findings: list[dict[str, Any]]) -> dict[str, Any]:
    """What can be said of latents without their audio; near duplicates cannot be found among them."""
    assert clip.fields is not None
    try:
        imported = read_imported_latents(clip.audio, clip.fields)
    except READ_ERRORS as error:
        findings.append(make_finding("bad_imported", str(error) or type(error).__name__))
        return {}
    channels, real = imported.latents_CF.shape
    padding = f" and {imported.padding_CF.shape[1]} of padding, which is cut" if imported.padding_CF.size else ""
    findings.append(make_finding("imported", f"{channels} channels, {real} frames{padding}"))
    if imported.unused:
        findings.append(make_finding("unused_fields", ", ".join(imported.unused)))
    if rules.longest_seconds is not None and imported.seconds > rules.longest_seconds:
        findings.append(make_finding("long", f"{imported.seconds:.0f} s"))
    fingerprint = hashlib.sha512(imported.content.encode()).hexdigest()[: FINGERPRINT_BITS // 4]
    measured = dict.fromkeys(("seconds", "sound_seconds"), imported.seconds) | dict.fromkeys(("lufs", "peak_db"))
    described = {"sample_rate": RATE, "channels": 2, "path": imported.path, "latent_channels": channels}
    return {**measured, **described, "content": imported.content, "fingerprint": fingerprint, "thumb": ""}


def _audit_text(
    clip: Clip, content: bytes | None, rules: AuditRules, findings: list[dict[str, Any]], sound: AudioAnalysis | None
) -> dict[str, Any]:
    text = read_clip_text(clip, content, rules.allow_promotional)
    findings += [make_finding(code, detail) for code, detail in (*clip.notes, *text.problems)]
    pitchless = compose.list_pitchless(text, sound)
    columns: dict[str, Any] = {"tags": text.tags, "facts": [fact for fact in text.facts if fact.name not in pitchless]}
    if sound:
        composed = compose.compose_caption(text, sound, rules.template, rules.common_words)
        findings += [make_finding(code, detail) for code, detail in composed.problems]
        columns["facts"] += [fact for fact in composed.facts if fact.source == "heard"]
        if not text.caption and composed.caption and not text.unread_caption:
            text.caption = composed.caption
            findings.append(make_finding("auto_caption", composed.describe()))
    columns["caption"] = text.caption
    if text.beats:
        columns["beats"] = text.beats
    is_unheard = rules.captions == "auto" and not _UNHEARD.isdisjoint(each["code"] for each in findings)
    if not text.caption and not is_unheard:
        missing = "no_caption" if clip.text is None else "empty_caption"
        findings.append(make_finding("uncaptioned" if rules.captions == "optional" else missing))
    if text.caption and rules.count_tokens is not None:
        tokens = columns["tokens"] = rules.count_tokens([text.caption])[0]
        if rules.max_tokens is not None and tokens > rules.max_tokens:
            findings.append(make_finding("caption_long", f"{tokens} tokens, the model reads {rules.max_tokens}"))
    return columns


def list_problem_rows(listing: Listing) -> list[dict[str, Any]]:
    """List audit rows for what the listing could not make clips of.

    Args:
        listing: Listing of a source.

    Returns:
        One row for each problem.
    """
    return [
        {"source": source, "stamp": "", "findings": [make_finding(code, detail)], "caption": "", "tags": {}}
        for source, detail, code in listing.problems
    ]


def run_audit(clips: Iterable[Clip], rules: AuditRules, journal: Path, known: dict[str, str], threads: int = 2) -> None:
    """Append a row to the journal for every clip that is not covered yet.

    Args:
        clips: Clips to audit.
        rules: Limits of the model.
        journal: JSON lines file; created if needed, and repaired if its last line is incomplete.
        known: Stamp by source of the clips already audited; those with an equal stamp are skipped.
        threads: Number of clips decoded at a time.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    _drop_incomplete_line(journal)
    todo = [clip for clip in clips if known.get(clip.source) != clip.stamp]
    with journal.open("a", encoding="utf-8") as file:
        for row in track_progress(_audit_in_order(todo, rules, threads), "audit", total=len(todo), unit="clip"):
            file.write(json.dumps(row) + "\n")
            file.flush()


def _audit_in_order(clips: Iterable[Clip], rules: AuditRules, threads: int) -> Iterator[dict[str, Any]]:
    """Yield rows in the order of the clips. Decoding and filters release the GIL, so threads help."""
    pending: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for clip in clips:
            pending.append(pool.submit(audit_clip, clip, rules))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _drop_incomplete_line(journal: Path) -> None:
    """Cut off a last line that a killed process left half written."""
    if journal.is_file():
        with journal.open("r+b") as file:
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def read_stamps(journals: Iterable[Path]) -> dict[str, str]:
    """Read which clips journals cover.

    Args:
        journals: Audit journals.

    Returns:
        Stamp by source of every row.
    """
    return {row["source"]: row["stamp"] for _, _, row in _read_rows(journals)}


def _read_rows(journals: Iterable[Path]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (journal, byte offset, row) of every complete line."""
    for journal in journals:
        with journal.open("rb") as file:
            offset = 0
            for line in file:
                if line.endswith(b"\n"):
                    yield journal, offset, json.loads(line)
                offset += len(line)


class AuditIndex:
    """The audit of a whole source, ordered by source: some columns in memory, rows read from the journals on demand.

    Attributes:
        sources: Source of each clip.
        seconds: Length of each clip in seconds.
        rejected: Whether each clip has an error.
        content: First 16 bytes of each clip's audio hash.
        original: Index of the first clip with the same audio, of those that are accepted, captioned and not named as
            copies ("kick copy.wav", "kick (1).wav") if there are any; a clip's own index where there is none.
        similar: Index of the first clip that sounds the same; a clip's own index where there is none.
        alike: The same when clips at a close tempo count too.
        audited: Number of clips that were audited for it, those of all processes; the others were cached.
    """

    audited = 0

    def __init__(self, journals: Sequence[Path], stamps: dict[str, str], extra: Sequence[dict[str, Any]] = ()) -> None:
        """Load the columns and compare all clips.

        Args:
            journals: Audit journals.
            stamps: Stamp by source of the clips that exist now; other rows of the journals are outdated.
            extra: Further rows (problems of the source), taken as they are. Those without an error are of no clip and
                come after all clips.
        """
        self._journals = list(journals)
        self._extra = [row for row in extra if is_rejected(row)]
        self._remarks = [row for row in extra if not is_rejected(row)]
        columns, sources = self._load(stamps)
        order = sorted(range(len(sources)), key=sources.__getitem__)
        self.sources = [sources[index] for index in order]
        self._file, self._offset, self.seconds, sound, self.rejected, has_caption, self.content, fingerprints = (
            column[order] for column in columns
        )
        comparable = self.content != np.zeros(1, self.content.dtype)
        is_copy = np.array([_COPY_NAME.search(source) is not None for source in self.sources], dtype=bool)
        self.original = find_duplicates(self.content, comparable, 4 * self.rejected + 2 * ~has_caption + is_copy)
        distinct = comparable & (self.original == np.arange(len(self)))
        self.similar, self.alike = find_near_duplicates(fingerprints, sound, distinct)

    def __len__(self) -> int:
        return len(self.sources)

    def row(self, index: int) -> dict[str, Any]:
        """Read the audit row of one clip.

        Args:
            index: Index of the clip; from the number of clips on, of what is no clip.

        Returns:
            The row, with findings about duplicates.
        """
        if index >= len(self):
            return copy.deepcopy(self._remarks[index - len(self)])
        row = self._read_row(index)
        if self.original[index] != index:
            row["findings"].append(make_finding("duplicate", f"of {self.sources[self.original[index]]}"))
        elif self.similar[index] != index:
            row["findings"].append(make_finding("near_duplicate", f"of {self.sources[self.similar[index]]}"))
        return row

    def iterate_rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over all rows in order.

        Yields:
            Each clip's audit row, then the rows of what is no clip.
        """
        yield from map(self.row, range(len(self) + len(self._remarks)))

    def find_groups(self) -> np.ndarray:
        """Find groups of clips that belong in one split because they are or sound the same, at a close tempo too.

        Returns:
            (n,) index of the group's first clip, for each clip.
        """
        return np.asarray(self.alike[self.original])

    def _read_row(self, index: int) -> dict[str, Any]:
        file, offset = int(self._file[index]), int(self._offset[index])
        if file < 0:
            extra = self._extra[offset]
            return {**extra, "findings": list(extra["findings"])}
        with self._journals[file].open("rb") as handle:
            handle.seek(offset)
            row: dict[str, Any] = json.loads(handle.readline())
        return row

    def _load(self, stamps: dict[str, str]) -> tuple[list[np.ndarray], list[str]]:
        indices: dict[str, int] = {}
        count = len(stamps) + len(self._extra)
        file, offset = np.full(count, -1, np.int16), np.zeros(count, np.int64)
        seconds, sound, rejected, has_caption = (np.zeros(count, kind) for kind in (np.float64, np.float64, bool, bool))
        content, fingerprints = np.zeros(count, "V16"), np.zeros((count, FINGERPRINT_BITS // 8), np.uint8)
        numbers = {journal: number for number, journal in enumerate(self._journals)}
        for journal, start, row in _read_rows(self._journals):
            if stamps.get(row["source"]) != row["stamp"]:
                continue
            index = indices.setdefault(row["source"], len(indices))
            file[index], offset[index] = numbers[journal], start
            seconds[index], rejected[index] = row.get("seconds", 0.0), is_rejected(row)
            is_composed = any(finding["code"] == "auto_caption" for finding in row["findings"])
            has_caption[index] = bool(row.get("caption")) and not is_composed
            if "content" in row:
                sound[index] = row["sound_seconds"]
                content[index] = np.void(bytes.fromhex(row["content"][:32]))
                fingerprints[index] = np.frombuffer(bytes.fromhex(row["fingerprint"]), np.uint8)
        sources = list(indices)
        for number, row in enumerate(self._extra):
            offset[len(sources)], rejected[len(sources)] = number, True
            sources.append(row["source"])
        columns: list[np.ndarray] = [file, offset, seconds, sound, rejected, has_caption, content, fingerprints]
        return [column[: len(sources)] for column in columns], sources
