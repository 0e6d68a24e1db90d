"""Bytes of a file as text: compression by content, and the encoding."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipelines.errors import UserError
from pipelines.storage import Location

BLOCK_BYTES = 2**20  # bytes of a file that are read at a time
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"(\xb5/\xfd": "zstd"}
_OTHER = {
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", "save the sheet as CSV, or unpack the archive"),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook", "save the sheet as CSV"),
    b"7z\xbc\xaf": ("a 7-Zip archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"%PDF": ("a PDF document", "save its table as CSV"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"\x89HDF": ("an HDF5 file", "convert it to Parquet or CSV"),
}
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FOREIGN = re.compile(r"[^\x00-\x7f]+")
_WORD = re.compile(r"[^\W\d_]+")
PACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)


def absent(location: Location) -> UserError:
    """The error of a table that does not exist."""
    return UserError("the table does not exist", where=str(location), remedy="correct its path")


@contextmanager
def unpacked(location: Location) -> Iterator[tuple[Any, str]]:
    """The content of a file, and the name of its compression; empty if it is not compressed.

    Raises:
        UserError: When the file does not exist, cannot be read, is an archive, or its compression is damaged.
    """
    try:
        with location.filesystem.open_input_file(location.path) as file:
            packing = packing_of(file.read(16), str(location))
            file.seek(0)
            with _opened(file, packing) as content:
                yield content, packing
    except FileNotFoundError as error:
        raise absent(location) from error
    except PACKING_ERRORS as error:
        raise _damaged(location, error) from error
    except OSError as error:
        if type(error) in (gzip.BadGzipFile, OSError) and "AWS" not in str(error) and error.errno is None:
            raise _damaged(location, error) from error
        raise location.unreachable(error) from error


def _damaged(location: Location, error: Exception) -> UserError:
    return UserError(
        f"the file is compressed, and damaged or cut off: {error}",
        where=str(location),
        remedy="compress it again, or unpack it",
    )


def packing_of(start: bytes, where: str) -> str:
    """The compression of a file by its first bytes; empty if it is not compressed.

    Raises:
        UserError: For an archive, and for other files that are no table of text.
    """
    for magic, (what, remedy) in _OTHER.items():
        if start.startswith(magic):
            raise UserError(f"the file is {what}, not a table of text", where=where, remedy=remedy)
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")


def _opened(file: Any, packing: str) -> Any:
    if packing == "gzip":
        return gzip.open(file)
    if packing == "bzip2":
        return bz2.open(file)
    if packing == "xz":
        return lzma.open(file)
    return pa.CompressedInputStream(file, "zstd") if packing else file


def encoding_of(head: bytes, where: str, *, cut: bool) -> str:
    """The encoding of a text by its first bytes: a byte order mark, UTF-8, else Windows-1252.

    Args:
        head: First bytes of the text.
        where: The file, for a message.
        cut: Whether the text is longer.

    Raises:
        UserError: When the bytes are in none of these encodings.
    """
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    if head and 4 * head.count(0) > len(head):  # every second byte of ASCII is 0
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=not cut)
    except UnicodeDecodeError as error:
        return _western(head, error, where)
    return "utf-8"


def _western(head: bytes, error: UnicodeDecodeError, where: str) -> str:
    """Windows-1252 or Latin-1, if words have ASCII letters besides the others, as in Western Europe."""
    whole = head.decode("utf-8", errors="ignore")
    if len(_FOREIGN.findall(whole)) > len(head.decode("utf-8", errors="replace")) - len(whole):
        raise not_decoded(head, error.start, "UTF-8", where, 0)  # most of it is UTF-8: the byte is damaged
    try:
        text, name = head.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        text, name = head.decode("latin-1"), "latin-1"
    words = [word for word in _WORD.findall(text) if _FOREIGN.search(word)]
    foreign = sum(len("".join(_FOREIGN.findall(word))) > 0.5 * len(word) for word in words if len(word) > 1)
    controls = sum(not one.isprintable() for one in text if one > "\x7f")
    if 2 * foreign > len(words) or controls:
        raise not_decoded(head, error.start, "UTF-8", where, 0)
    return name


def not_decoded(data: bytes, place: int, encoding: str, where: str, lines: int) -> UserError:
    """The error of a byte that an encoding does not have.

    Args:
        data: Bytes around it.
        place: Its index in `data`.
        encoding: The encoding.
        where: The file.
        lines: Number of lines before `data`.
    """
    line = lines + data.count(b"\n", 0, place) + 1
    column = place - data.rfind(b"\n", 0, place)
    return UserError(
        f"line {line}, byte {column} of it: 0x{data[place]:02x} is not {encoding.removesuffix('-sig').upper()}",
        where=where,
        remedy="name the encoding, for example source.options.dialect={encoding: cp1252} for Western Europe, "
        "cp1251 for Cyrillic, gb18030 for Chinese, shift_jis for Japanese",
    )


def bad_byte(location: Location, encoding: str) -> UserError:
    """The error of the first byte of a file that an encoding does not have, with its line."""
    decoder, lines, rest = codecs.getincrementaldecoder(encoding)(), 0, b""
    with unpacked(location) as (file, _):
        while block := file.read(BLOCK_BYTES):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                # the decoder may hold bytes of a character that began in the block before
                place = max(error.start - (len(error.object) - len(block)), 0)
                return not_decoded(rest + block, len(rest) + place, encoding, str(location), lines)
            lines += block.count(b"\n")
            rest = block[block.rfind(b"\n") + 1 :] if b"\n" in block else rest + block
    return UserError(
        f"the last character is cut off: the file is not whole {encoding.upper()}",
        where=str(location),
        remedy="copy the file again",
    )
