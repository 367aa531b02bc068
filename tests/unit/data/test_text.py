"""Text is what was written, in any encoding that people's tools use; other encodings are refused."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3train.core.errors import DataError
from sa3train.data.sources.text import compose, decode_text, fold, normalize_field

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"))
WORDS = (
    *("Größe", "café", "“noir”", "d’été", "crème", "naïve", "Øre", "smørrebrød", "Äpfel", "señor", "¿qué?", "90°"),
    *("Übung", "œuvre", "Ça", "coração", "très", "élevé", "MÜLLER", "créée", "12,50 €", "– laut –", "rock ‘n’ roll"),
)
WESTERN = st.lists(st.sampled_from(WORDS), min_size=1).map(lambda words: " ".join(["deep", *words]))


@given(TEXT, st.sampled_from(["utf-8", "utf-8-sig"]))
def test_utf8_is_read_as_it_is(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == (text, "")


@given(TEXT, st.sampled_from(["utf-16", "utf-32"]))
def test_byte_order_marks_are_followed(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == (text, encoding.upper())


@given(WESTERN, st.sampled_from(["utf-16-le", "utf-16-be"]))
def test_utf16_needs_no_mark(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == (text, "UTF-16")


@pytest.mark.parametrize("content", [b"ko\0to\n", b"deep kick\0", b"a\0bcdefgh"])
def test_stray_zeros_are_not_utf16(content: bytes) -> None:
    with pytest.raises(DataError, match="zero bytes"):
        decode_text(content)


@given(WESTERN)
def test_western_text_of_windows_is_read_and_named(text: str) -> None:
    content = text.encode("cp1252")
    assert decode_text(content) == (text, "Windows-1252")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        *(("cp1251", text) for text in ("глубокий бас", "Кик и бас", "звук 808")),
        *(("koi8_r", text) for text in ("глубокий бас", "звук 808")),
        *(("cp1250", text) for text in ("głęboki dźwięk", "żółty")),
        *(("cp1253", text) for text in ("βαθύ μπάσο",)),
        *(("mac_roman", text) for text in ("café crème", "Größe", "“deep”")),
        *(("cp850", text) for text in ("café crème", "Größe")),
        *(("shift_jis", text) for text in ("深いキック", "低音 808")),
        *(("gbk", text) for text in ("低沉的鼓", "鼓声")),
        *(("euc_kr", text) for text in ("깊은 킥",)),
        *(("big5", text) for text in ("低沉的鼓聲",)),
    ],
)
def test_other_encodings_are_refused(encoding: str, text: str) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        decode_text(text.encode(encoding))


@pytest.mark.parametrize(
    "content",
    [bytes(100), b"\xff\xfe\xfd", b"\x89PNG\r\n\x1a\n\0\0\0\r", b"RIFF\0\0\0\0WAVE", b"\x13\x20", rb"{\rtf1 deep}"],
)
def test_what_is_not_text_is_refused(content: bytes) -> None:
    with pytest.raises(DataError):
        decode_text(content)


@given(st.text())
def test_names_have_one_form(name: str) -> None:
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        assert compose(other) == compose(name)
        assert fold(other) == fold(name)
    assert fold(fold(name)) == fold(name)
    assert normalize_field(normalize_field(name)) == normalize_field(name)


@pytest.mark.parametrize("name", ["file_name", "File Name", " FILE-NAME ", "\ufefffile_name", '"File  name"'])
def test_field_names_have_one_form(name: str) -> None:
    assert normalize_field(name) == "file_name"
