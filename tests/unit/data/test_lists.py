"""Caption lists give what was written, whatever tool wrote them; a row with two meanings is a problem of its line."""

import csv
import io
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.errors import DataError
from sa3train.data.sources.lists import ListRow, is_caption_list, read_list

LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Cf"])
MISSING = ("", "nan", "none", "null", "n/a", "#n/a", "<na>")
"""What tools write where there is no caption."""
WORDS = st.text(LETTERS, max_size=40).filter(lambda text: text.strip().lower() not in MISSING and "#" not in text)
CAPTIONS = st.lists(WORDS, min_size=1, max_size=5)


def read(content: str | bytes, name: str = "metadata.csv") -> list[ListRow]:
    return list(read_list(content.encode() if isinstance(content, str) else content, name)[0])


def write_table(captions: Sequence[str], delimiter: str, header: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(header)
    writer.writerows([f"{number}.wav", "120", caption] for number, caption in enumerate(captions))
    return buffer.getvalue()


@given(
    CAPTIONS,
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from([("file_name", "bpm", "caption"), ("File Name", "BPM", "Caption "), ("PATH", "Bpm", "Text")]),
    st.booleans(),
)
def test_tables_of_spreadsheets(
    captions: list[str], delimiter: str, encoding: str, header: Sequence[str], names_delimiter: bool
) -> None:
    text = write_table(captions, delimiter, header)
    rows, found = read_list((f"sep={delimiter}\r\n" * names_delimiter + text).encode(encoding), "metadata.csv")
    rows = list(rows)
    assert found == ("UTF-16" if encoding == "utf-16" else "")
    assert [row.problem + row.note for row in rows] == [""] * len(captions)
    assert [row.paths for row in rows] == [(f"{number}.wav",) for number in range(len(captions))]
    fields = [json.loads(row.text) for row in rows]
    assert [row.get("caption", row.get("text")) for row in fields] == [caption.strip() for caption in captions]
    assert {row["bpm"] for row in fields} == {"120"}


@given(CAPTIONS.map(", ".join), st.booleans())
def test_two_columns_need_no_quotes(caption: str, is_path_first: bool) -> None:
    """A caption with delimiters is read whole, or its row is a problem; it is never cut."""
    row = f"a.wav,{caption}" if is_path_first else f"{caption},a.wav"
    (found,) = read(f"{'file,caption' if is_path_first else 'caption,file'}\n{row}\n")
    if not found.problem:
        assert found.paths == ("a.wav",)
        text = json.loads(found.text).get("caption", "")
        written = " ".join(caption.split()).strip(", ")
        assert " ".join(text.split()).strip(", ") == written or ('"' in caption and csv_cells(row) == ["a.wav", text])
    else:
        assert '"' in caption or any(suffix in caption.lower() for suffix in AUDIO_SUFFIXES)


def csv_cells(row: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([row], skipinitialspace=True))]


@pytest.mark.parametrize(
    ("line", "table"),
    [
        (2, "file_name,bpm,caption\na.wav,120,deep, punchy\n"),
        (3, "file_name,caption,bpm\nb.wav,ok,90\na.wav,deep, punchy,120\n"),
        (2, "file_name,caption,caption\na.wav,deep,high\n"),
        (2, "file_name,Caption,caption \na.wav,deep,high\n"),
        (2, "file_name,caption,\na.wav,deep,punchy\n"),
        (2, 'file_name,caption\na.wav,"808 kick\nb.wav,deep\nc.wav,end"\n'),
        (2, 'file_name,caption\na.wav,"808 kick\n'),
        (2, 'file_name,caption\na.wav,"808" kick\n'),
        (2, 'file_name,caption\na.wav,"deep, punchy", long\n'),
        (2, "file_name,caption\na.wav,sounds like b.wav, but deep\n"),
        (2, "file_name,caption\na.wav,#NAME?\nb.wav,deep\n"),
        (1, "deep kick\n"),
        (1, "name of the sound;what it is\na;deep\n"),
        (2, "a.wav,deep kick\nb.wav,soft, low\n"),
        (2, f"file_name,caption\na.wav,{'x' * 200_000}\n"),
    ],
)
def test_rows_with_two_meanings_are_problems_of_their_line(line: int, table: str) -> None:
    rows = read(table)
    assert [row.line for row in rows if row.problem] == [line]
    assert all(row.text for row in rows if not row.problem)


@pytest.mark.parametrize(
    ("table", "caption"),
    [
        ("file_name,caption\na.wav,deep, punchy 808 kick, long tail\n", "deep, punchy 808 kick, long tail"),
        ('file_name,caption\na.wav,7" vinyl, dusty\n', '7" vinyl, dusty'),
        ('file_name, caption, bpm\na.wav, "deep, punchy", 120\n', "deep, punchy"),
        ('file_name,caption\na.wav,"deep\nand low"\n', "deep\nand low"),
        ("file_name,caption\ra.wav,deep\r", "deep"),
        ("\n\nfile_name,caption\n\n,\n;;;\na.wav , deep  \n\n", "deep"),
        (",file_name,caption\n0,a.wav,deep\n", "deep"),
        ("file_name,caption,,\na.wav,deep,,\n", "deep"),
        ("a.wav\tdeep, punchy\n", "deep, punchy"),
        ("file_name,caption,caption\na.wav,deep,deep\n", "deep"),
        ("file_name,caption\na.wav,deep,,\n", "deep"),
        ("file_name,genre,caption,text\na.wav,None,deep,nan\n", "deep"),
    ],
)
def test_tables_with_one_meaning(table: str, caption: str) -> None:
    (row,) = [row for row in read(table) if row.text]
    assert (row.problem, row.paths, json.loads(row.text)["caption"]) == ("", ("a.wav",), caption)
    assert bool(row.note) == ("," in caption and '"deep' not in table and "\t" not in table)


@pytest.mark.parametrize("key", ["file_name", "path", "filename", "audio", "audio_filepath", "File Name", "FilePath"])
def test_keys_of_other_tools(key: str) -> None:
    (row,) = read(json.dumps({key: "a.wav", "text": "deep"}), "metadata.jsonl")
    assert (row.paths, row.problem) == (("a.wav",), "")


def test_json_lines() -> None:
    lines = [
        '{"audio": {"path": "a.wav", "bytes": null}, "text": "deep"}',
        "",
        "{broken",
        "[1]",
        '{"file": "a.wav", "caption": "a", "caption": "b"}',
        '{"file": "a.wav", "caption": "\\ud83d"}',
        '{"file": "a.wav", "caption": "a\\u0000b"}',
        f'{{"file": "a.wav", "n": {"1" * 5000}}}',
        "[" * 100_000,
        '{"file": "b.wav", "caption": "\\ud83e\\udd41"}',
    ]
    rows = read("\r\n".join(lines), "list.ndjson")
    assert [row.line for row in rows if not row.problem] == [1, 10]
    assert [row.line for row in rows if row.problem] == [3, 4, 5, 6, 7, 8, 9]
    assert rows[0].paths == ("a.wav",)


@pytest.mark.parametrize(
    "text", ['[{"file": "a.wav"},\n{"file": "b.wav"}]', '[\n{"file": "a.wav"}\n]', '\n{\n"file": "a"\n}']
)
def test_json_that_is_not_by_lines_is_one_problem(text: str) -> None:
    (row,) = read(text, "metadata.jsonl")
    assert "each line" in row.problem


def test_a_list_that_is_not_text_is_refused() -> None:
    with pytest.raises(DataError, match="not text"):
        read(bytes(100))
    assert read("") == []


def test_names_of_lists() -> None:
    assert all(map(is_caption_list, ("metadata.csv", "a/Metadata.JSONL", "captions.tsv", "b/captions.ndjson")))
    assert not any(map(is_caption_list, ("other.csv", "metadata.txt", "metadata.json", "metadata.csv.bak")))
