"""Audit: every clip of a source is decoded, measured and judged, each once; a killed audit goes on where it was.

Rows are appended to a journal (one JSON line a clip, valid while the clip's stamp is unchanged). `AuditIndex` keeps a
few columns of the journal in memory, so that a million clips fit, and finds duplicates over all of them.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sa3train.audio.io import read_audio
from sa3train.core.errors import AudioError, ConfigError, DataError
from sa3train.core.log import progress
from sa3train.data.audit.checks import ERROR, exact_originals, finding, implausible, judge, measure, near_originals
from sa3train.data.sources.captions import describe
from sa3train.data.sources.listing import Clip, Listing

CAPTIONS = ("required", "optional")

UNREADABLE = (AudioError, DataError, MemoryError, RuntimeError, ValueError, OverflowError, OSError)
"""What reading a damaged file may raise."""


@dataclass(frozen=True)
class Rules:
    """What the audit needs to know of the model: its longest in seconds, and how it counts and limits tokens."""

    captions: str = "required"
    longest_seconds: float | None = None
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.captions not in CAPTIONS:
            raise ConfigError(f"captions is {self.captions!r}; choose one of: {', '.join(CAPTIONS)}.")


def audit_clip(clip: Clip, rules: Rules) -> dict[str, Any]:
    """The audit row of one clip. Never raises for what is wrong with the clip: that is what the findings say."""
    row: dict[str, Any] = {"source": clip.source, "stamp": clip.stamp, "findings": []}
    findings: list[dict[str, Any]] = row["findings"]
    path = clip.audio.local_path()
    content: bytes | None = None
    try:
        content = None if path else clip.audio.read()
        audio_CN, rate = read_audio(path if content is None and path else content or b"")
    except UNREADABLE as error:
        text = str(error) or type(error).__name__
        findings.append(finding("not_finite" if "NaN or infinite" in text else "unreadable", text))
    else:
        missing = missing_bytes(Path(path) if path else content)
        if missing:
            findings.append(finding("cut_short", f"{missing} bytes are missing"))
        strange = implausible(audio_CN.numpy(), rate)
        if strange:
            findings.append(finding("implausible", strange))
        else:
            row |= measure(audio_CN.numpy(), rate)
            findings += judge(row, rules.longest_seconds)
    row |= _described(clip, content, rules, findings)
    return row


def missing_bytes(file: Path | bytes | None) -> int:
    """By how many bytes a WAV or AIFF file is shorter than its header says; 0 for other kinds."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            head, size = opened.read(8), file.stat().st_size
    else:
        head, size = (file or b"")[:8], len(file or b"")
    orders: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"FORM": "big"}
    order = orders.get(head[:4])
    stated = int.from_bytes(head[4:], order) if order else 0
    # Streamed files say 0 or the largest number; a byte of padding is often left out.
    return max(0, stated + 8 - size - 1) if order and stated < 0xFFFFFF00 else 0


def _described(clip: Clip, content: bytes | None, rules: Rules, findings: list[dict[str, Any]]) -> dict[str, Any]:
    description = describe(clip, content)
    findings += [finding(code, detail) for code, detail in description.notes]
    told: dict[str, Any] = {"caption": description.caption, "tags": description.tags}
    if description.beats:
        told["beats"] = description.beats
    if not description.caption and rules.captions == "required":
        findings.append(finding("no_caption" if clip.text is None else "empty_caption"))
    if description.caption and rules.count_tokens is not None:
        told["tokens"] = rules.count_tokens([description.caption])[0]
        if rules.max_tokens is not None and told["tokens"] > rules.max_tokens:
            findings.append(finding("caption_long", f"{told['tokens']} tokens, the model reads {rules.max_tokens}"))
    return told


def problem_rows(listing: Listing) -> list[dict[str, Any]]:
    """Audit rows for what the listing could not make clips of."""
    return [
        {"source": source, "stamp": "", "findings": [finding("damaged_source", text)], "caption": "", "tags": {}}
        for source, text in listing.problems
    ]


def run_audit(clips: Iterable[Clip], rules: Rules, journal: Path, known: dict[str, str], threads: int = 2) -> None:
    """Append a row to `journal` for every clip whose stamp is not that of `known` (source → stamp)."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    _mend_journal(journal)
    todo = [clip for clip in clips if known.get(clip.source) != clip.stamp]
    with journal.open("a", encoding="utf-8") as file:
        for row in progress(_in_order(todo, rules, threads), "audit", total=len(todo), unit="clip"):
            file.write(json.dumps(row) + "\n")
            file.flush()


def _in_order(clips: Iterable[Clip], rules: Rules, threads: int) -> Iterator[dict[str, Any]]:
    """Rows in the order of `clips`, a few clips measured at a time; decoding and filters run outside Python's lock."""
    if threads <= 1:
        yield from (audit_clip(clip, rules) for clip in clips)
        return
    pending: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for clip in clips:
            pending.append(pool.submit(audit_clip, clip, rules))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _mend_journal(journal: Path) -> None:
    """Cut off a line that a kill left half written."""
    if not journal.is_file():
        return
    with journal.open("r+b") as file:
        size = end = file.seek(0, 2)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def journal_stamps(journals: Iterable[Path]) -> dict[str, str]:
    """source → stamp of every row there is."""
    return {row["source"]: row["stamp"] for _, _, row in _rows(journals)}


def _rows(journals: Iterable[Path]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    for journal in journals:
        with journal.open("rb") as file:
            at = 0
            for line in file:
                if line.endswith(b"\n"):
                    yield journal, at, json.loads(line)
                at += len(line)


class AuditIndex:
    """The audit of a whole source: a few columns in memory, rows read from the journals when asked for.

    `wanted`: source → stamp of the clips that are there now; other rows of the journals are old. `extra` rows
    (problems) are kept as they are. Order: by source.
    """

    def __init__(self, journals: Sequence[Path], wanted: dict[str, str], extra: Sequence[dict[str, Any]] = ()) -> None:
        self._journals = list(journals)
        self._extra = list(extra)
        places, self.sources = self._load(wanted)
        order = sorted(range(len(self.sources)), key=self.sources.__getitem__)
        self.sources = [self.sources[place] for place in order]
        self._file, self._at, self.seconds, self.rejected = (column[order] for column in places[:4])
        self.content, self.prints = places[4][order], places[5][order]
        comparable = ~self.rejected & (self.content != np.zeros(1, self.content.dtype))
        self.original = exact_originals(self.content, comparable)
        self.like = near_originals(self.prints, self.seconds, comparable & (self.original == np.arange(len(self))))

    def __len__(self) -> int:
        return len(self.sources)

    def row(self, number: int) -> dict[str, Any]:
        """The audit row of one clip, what was found by comparison with others included."""
        row = self._stored(number)
        if self.original[number] != number:
            row["findings"].append(finding("duplicate", f"of {self.sources[self.original[number]]}"))
        elif self.like[number] != number:
            row["findings"].append(finding("near_duplicate", f"of {self.sources[self.like[number]]}"))
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row, in order."""
        return (self.row(number) for number in range(len(self)))

    def families(self) -> np.ndarray:
        """For each clip, the number of the clip it is the same as or sounds like: they belong in one split."""
        return np.asarray(self.like[self.original])

    def _stored(self, number: int) -> dict[str, Any]:
        file = int(self._file[number])
        if file < 0:
            extra = self._extra[int(self._at[number])]
            return {**extra, "findings": list(extra["findings"])}
        with self._journals[file].open("rb") as handle:
            handle.seek(int(self._at[number]))
            row: dict[str, Any] = json.loads(handle.readline())
        return row

    def _load(self, wanted: dict[str, str]) -> tuple[list[np.ndarray], list[str]]:
        numbers: dict[str, int] = {}
        most = len(wanted) + len(self._extra)
        columns: list[np.ndarray] = [
            np.full(most, -1, np.int16),
            np.zeros(most, np.int64),
            np.zeros(most, np.float64),
            np.zeros(most, bool),
            np.zeros(most, "V16"),
            np.zeros((most, 30), np.uint8),
        ]
        files = {journal: number for number, journal in enumerate(self._journals)}
        for journal, at, row in _rows(self._journals):
            if wanted.get(row["source"]) != row["stamp"]:
                continue
            place = numbers.setdefault(row["source"], len(numbers))
            columns[0][place], columns[1][place] = files[journal], at
            columns[2][place] = row.get("seconds", 0.0)
            columns[3][place] = any(found["severity"] == ERROR for found in row["findings"])
            if "content" in row:
                columns[4][place] = np.void(bytes.fromhex(row["content"][:32]))
                columns[5][place] = np.frombuffer(bytes.fromhex(row["fingerprint"]), np.uint8)
        sources = list(numbers)
        for number, row in enumerate(self._extra):
            columns[1][len(sources)], columns[3][len(sources)] = number, True
            sources.append(row["source"])
        return [column[: len(sources)] for column in columns], sources
