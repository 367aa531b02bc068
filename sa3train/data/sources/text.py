"""Text files as people's tools write them: in UTF-8, UTF-16 and Windows-1252, and names in any Unicode form."""

import codecs
import functools
import re
import unicodedata

from sa3train.core.errors import DataError

TEXT_LIMIT = 1 << 20
"""Most bytes of a caption file."""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8", ""),
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
"""Byte order mark, codec, and its name where it is not UTF-8."""

_NOT_WESTERN = re.compile(
    r"[a-zß-öø-ÿœšž][À-ÖØ-ÞŒŠŽŸ]"  # a capital after a small letter
    r"|ƒ[A-Za-z]"  # katakana
    r"|[^\W\d_][^\w\s\x00-\x7f’–—…·×‘®™©°][^\W\d_]"  # a symbol inside a word
    r"|[^\x00-\x7f’–—…‘“”«»]{3}"
)
"""What text in another 8-bit encoding (Cyrillic, Polish, Mac, DOS, Shift-JIS) looks like when it is read as
Windows-1252.
"""


_DAMAGED = "contains zero bytes or control characters: it is not text, or damaged. Write it again."
_ASCII = re.compile(rb"[\0\t\n\r -~]*")
_CONTROLS = re.compile(r"[\0-\x08\x0e-\x1b\x7f]")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_MISREAD = re.compile("[ÃÂ][\u0080-¿€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€")
"""What UTF-8 looks like that was read as Windows-1252 and saved again."""


def decode_text(content: bytes) -> tuple[str, str]:
    """Decode a text file whose encoding is not known.

    Args:
        content: The file.

    Returns:
        The text without a byte order mark; and the name of its encoding, empty for UTF-8.

    Raises:
        DataError: It is not text, or in an encoding that cannot be told.
    """
    if content.startswith(b"{\\rtf"):
        raise DataError("is RTF with its formatting. Save it as plain text, in UTF-8.")
    codec, name = "utf-8", ""
    for bom, marked, marked_name in _BOMS:
        if content.startswith(bom):
            content, codec, name = content[len(bom) :], marked, marked_name
            break
    else:
        if b"\0" in content:  # two bytes for each character, of which the higher ones are zero in plain letters
            odd, even = content[1::2].count(0), content[::2].count(0)
            codec, name = ("utf-16-le" if odd >= even else "utf-16-be"), "UTF-16"
            if _ASCII.fullmatch(content) and max(content.decode(codec, "replace")) > "\u3000":
                raise DataError(_DAMAGED)  # one byte for each character: other letters would come out
        elif not _is_utf8(content):
            codec = name = "Windows-1252"
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        raise DataError("is in an unknown encoding, or not text. Save it as UTF-8.") from error
    if _CONTROLS.search(text):
        raise DataError(_DAMAGED)
    if codec == "Windows-1252" and _NOT_WESTERN.search(text):
        raise DataError("is not in UTF-8, and its encoding is unknown. Save it as UTF-8.")
    return text, name


def tidy(text: str) -> str:
    """Put text on one line.

    Args:
        text: Any text.

    Returns:
        It with single spaces, and without soft hyphens and spaces of no width.
    """
    return " ".join((text if text.isascii() else _INVISIBLE.sub("", text)).split())


def find_misread(text: str) -> str:
    """Find letters that were converted with the wrong encoding before the text was saved.

    Args:
        text: Any text.

    Returns:
        The first of them, such as "Ã©"; empty for none.
    """
    found = None if text.isascii() else _MISREAD.search(text)
    return found[0] if found else ""


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def compose(name: str) -> str:
    """Convert a name to the Unicode form in which letters are one character each; Macs write another.

    Args:
        name: File name or path.

    Returns:
        The name in NFC.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def fold(name: str) -> str:
    """Make names that differ in case or Unicode form only equal.

    Args:
        name: File name or path.

    Returns:
        A key.
    """
    return name.lower() if name.isascii() else compose(compose(name).casefold())


@functools.lru_cache(maxsize=1024)
def normalize_field(name: str) -> str:
    """Normalize the name of a field or column.

    Args:
        name: Such as " File-Name".

    Returns:
        Such as "file_name".
    """
    return re.sub(r"[\s_-]+", "_", tidy(compose(name)).strip("\"'").strip()).lower()
