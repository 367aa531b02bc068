"""Read caption lists as people's tools write them: CSV with commas, semicolons, tabs or bars, and JSON lines.

A row that can be read in more than one way is a problem of its line, never a guess.
"""

import contextlib
import csv
import io
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.data.sources.text import decode_text, normalize_field

LIST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
LIST_STEMS = ("metadata", "captions")
"""Names, without suffix, of the lists that are read in a folder."""

LIST_LIMIT = 1 << 30
"""Most bytes of a list."""

PATH_FIELDS = (
    *("file_name", "path", "file", "audio", "filename", "audio_path", "file_path", "filepath", "audio_file"),
    *("audio_filepath", "audio_filename", "wav"),
)
CAPTION_FIELDS = ("caption", "text", "prompt", "description")

_DELIMITERS = "\t;|,"
_SEPARATOR = re.compile(r"""["']?sep=([^\w"' ])["']?\s*""", re.IGNORECASE)
_NEXT_ROW = re.compile(rf"\n.*(?:{'|'.join(map(re.escape, AUDIO_SUFFIXES))})\b", re.IGNORECASE)
_NO_TEXT = re.compile(r"[\0-\x08\x0e-\x1b\x7f\ud800-\udfff]")
_MISSING = ("nan", "none", "null", "n/a", "#n/a", "<na>")
_FAULTS = ("#ref!", "#name?", "#value!", "#div/0!", "#null!", "#num!", "#error!")
"""Cells that tools write for no value, and that spreadsheets show for a formula that fails (a text that begins with =
or - becomes one).
"""
_PARSE_ERRORS = (ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class ListRow:
    """A row of a caption list.

    Attributes:
        line: Its first line in the file, from 1.
        paths: What its path fields say, in order of `PATH_FIELDS`.
        text: The row as a JSON object.
        problem: Why it cannot be used; empty for none.
        note: How it was read where that is not obvious.
    """

    line: int
    paths: tuple[str, ...] = ()
    text: str = ""
    problem: str = ""
    note: str = ""


def is_caption_list(name: str) -> bool:
    """Tell whether a file of a folder is a caption list.

    Args:
        name: Its path.

    Returns:
        Whether it is read as one.
    """
    return name.lower().endswith(LIST_SUFFIXES) and is_list_stem(name)


def is_list_stem(name: str) -> bool:
    """Tell whether a file is called like a caption list.

    Args:
        name: Its path.

    Returns:
        Whether its name without suffix is one of `LIST_STEMS`.
    """
    return posixpath.splitext(posixpath.basename(name))[0].lower() in LIST_STEMS


def read_list(content: bytes, name: str) -> tuple[Iterator[ListRow], str]:
    """Read a caption list.

    Args:
        content: The file.
        name: Its path; the suffix decides between tables and JSON lines.

    Returns:
        Its rows, those with problems included; and its encoding where that is not UTF-8. A `DataError` is raised when
        it is not text.
    """
    text, encoding = decode_text(content)
    is_json = name.lower().endswith((".jsonl", ".ndjson"))
    return (_read_json_lines(text) if is_json else _read_table(text)), encoding


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object whose fields have normalized names.

    Args:
        text: The JSON.

    Returns:
        The object.

    Raises:
        ValueError: It is not a JSON object, gives a field twice with different values, or holds what is not text.
    """
    try:
        content = json.loads(text, object_pairs_hook=_Pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, _Pairs):
        raise ValueError("it is not an object with fields")
    return _merge_fields([(normalize_field(name), _simplify(value)) for name, value in content])


class _Pairs(list[tuple[str, Any]]):
    """A JSON object before its fields are compared."""


def _simplify(value: Any) -> Any:
    if isinstance(value, str):
        if _NO_TEXT.search(value):
            raise ValueError("it has control characters, or halves of characters, in its text")
        return value
    if isinstance(value, _Pairs):
        return {name: _simplify(item) for name, item in value}
    return [_simplify(item) for item in value] if isinstance(value, list) else value


def _merge_fields(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        known = fields.get(name)
        if known in (None, ""):
            fields[name] = value
        elif value not in (None, "", known):
            raise ValueError(f"it gives {name!r} twice, with different values")
    return fields


def _make_row(line: int, fields: dict[str, Any], text: str, note: str = "") -> ListRow:
    values = [fields[name] for name in PATH_FIELDS if fields.get(name)]
    paths = (value.get("path") if isinstance(value, dict) else value for value in values)
    return ListRow(line, tuple(str(path) for path in paths if path), text, note=note)


def _read_json_lines(text: str) -> Iterator[ListRow]:
    lines = text.split("\n")
    first = next((line.strip() for line in lines if line.strip()), "")
    if first in ("{", "[") or first.startswith("[{"):
        yield ListRow(1, problem="is one piece of JSON, not a JSON object in each line: write one, or save it as .csv")
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _make_row(number, parse_object(line), line.strip())
            except _PARSE_ERRORS as error:
                yield ListRow(number, problem=f"is not a usable JSON object: {error}")


def _read_table(text: str) -> Iterator[ListRow]:
    lines = list(io.StringIO(text, newline=None))
    start = next((number for number, line in enumerate(lines) if line.strip()), 0)
    separator = _SEPARATOR.fullmatch(lines[start]) if lines else None
    start += separator is not None
    header = "".join(lines[start : start + 1])
    delimiters = separator[1] if separator else _DELIMITERS
    tables = [(delimiter, [normalize_field(cell) for cell in _split(header, delimiter)]) for delimiter in delimiters]
    tables = [(delimiter, columns) for delimiter, columns in tables if set(PATH_FIELDS) & set(columns)]
    if tables:
        delimiter, columns = max(tables, key=lambda table: len(table[1]))
        yield from _read_rows(lines, start + 1, delimiter, columns, is_loose=True)
        return
    # Without a header: a path and a caption.
    for delimiter in delimiters:
        cells = _split(header, delimiter)
        if len(cells) == 2 and cells[0].lower().endswith(AUDIO_SUFFIXES):
            yield from _read_rows(lines, start, delimiter, ["file_name", "caption"], is_loose=False)
            return
    if header.strip():
        yield ListRow(start + 1, problem="names no column for the files: begin with such as file_name,caption")


def _split(line: str, delimiter: str, skip_spaces: bool = True) -> list[str]:
    with contextlib.suppress(csv.Error):  # a cell that is too long
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=skip_spaces), [])
        return [cell.strip() for cell in cells] if skip_spaces else cells
    return []


def _read_rows(
    lines: list[str], start: int, delimiter: str, columns: Sequence[str], is_loose: bool
) -> Iterator[ListRow]:
    """Yield the rows from line `start` on. After a row that is not CSV, reading goes on in the next line."""
    while start < len(lines):
        rest = (lines[number] for number in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, skipinitialspace=True, strict=True)
        first = start
        try:
            for cells in reader:
                raw = "".join(lines[first : start + reader.line_num]).rstrip("\n")
                yield _parse_row(first + 1, cells, raw, delimiter, columns, is_loose)
                first = start + reader.line_num
            return
        except csv.Error as error:
            yield ListRow(first + 1, problem=f"is not readable as CSV ({error}); check its quotes")
            start = first + 1


def _parse_row(
    line: int, cells: list[str], raw: str, delimiter: str, columns: Sequence[str], is_loose: bool
) -> ListRow:
    note = ""
    if any(map(_NEXT_ROW.search, cells)):
        return ListRow(line, problem="has a quote that is not closed, or a cell with another row in it")
    while len(cells) > len(columns) and not cells[-1].strip():
        cells.pop()
    if len(cells) > len(columns):
        joined = _join_caption(raw, delimiter, columns) if is_loose else None
        if joined is None:
            problem = f"has {len(cells)} cells for {len(columns)} columns. Put captions with {delimiter!r} in quotes"
            return ListRow(line, problem=problem)
        cells, note = joined, f"its caption has {delimiter!r} and no quotes; all of it is read"
    if not raw.strip(f'{_DELIMITERS}" '):
        return ListRow(line)
    pairs = [(name, cell.strip()) for name, cell in zip(columns, cells, strict=False) if cell.strip()]
    fault = next((cell for _, cell in pairs if cell.lower() in _FAULTS), None)
    if fault:
        return ListRow(line, problem=f"has {fault}, the error of a formula, in a cell. Write its text there")
    pairs = [(name, cell) for name, cell in pairs if cell.lower() not in _MISSING]
    unnamed = next((cell for name, cell in pairs if not name and not cell.isdigit()), None)
    if unnamed:
        return ListRow(line, problem=f"has {unnamed[:40]!r} in a column without a name")
    try:
        fields = _merge_fields([(name, cell) for name, cell in pairs if name])
    except ValueError as error:
        return ListRow(line, problem=f"cannot be used: {error}")
    return _make_row(line, fields, json.dumps(fields, ensure_ascii=False), note) if fields else ListRow(line)


def _join_caption(raw: str, delimiter: str, columns: Sequence[str]) -> list[str] | None:
    """The two cells of a row of a path and a caption with delimiters; None unless that is the only way to read it."""
    cells = raw.split(delimiter)
    is_path_first = columns[0] in PATH_FIELDS
    if len(columns) != 2 or columns[is_path_first] not in CAPTION_FIELDS:
        return None
    if not is_path_first:
        cells.reverse()
    ends = [n for n in range(1, len(cells)) if cells[n - 1].strip().lower().endswith(AUDIO_SUFFIXES)]
    was_quoted = _split(raw, delimiter, skip_spaces=False) != raw.split(delimiter)
    if len(ends) != 1 or was_quoted:
        return None
    path, caption = cells[: ends[0]], cells[ends[0] :]
    if is_path_first:
        return [delimiter.join(path), delimiter.join(caption)]
    return [delimiter.join(reversed(caption)), delimiter.join(reversed(path))]
