"""One table in twelve dialects and four scripts."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

Rows = list[dict[str, str]]
# towns, and the words of a target, in four scripts
SCRIPTS = {
    "latin": (("Köln", "Fürth", "Überlingen"), ("größer", "kleiner", "süß")),
    "cyrillic": (("Москва", "Тверь", "Псков"), ("больше", "меньше", "сладко")),
    "chinese": (("北京", "上海", "广州"), ("大", "小", "中")),
    "greek": (("Αθήνα", "Πάτρα", "Βόλος"), ("μεγάλο", "μικρό", "μέσο")),
}


def tidy_rows(script: str, count: int = 240) -> Rows:
    """Rows with numbers, amounts, postcodes, dates, gaps, truth values and categories."""
    rng = np.random.default_rng(7)
    towns, sizes = SCRIPTS[script]
    rows = []
    for i in range(count):
        day = np.datetime64("2020-01-01") + int(rng.integers(0, 900))
        rows.append({
            "id": f"p{i}",
            "height": "" if i % 17 == 3 else f"{rng.normal(1.7, 0.2):.4f}",
            "income": f"{rng.uniform(1000, 9_000_000):.2f}",
            "postcode": f"{int(rng.integers(0, 40)) * 1000 + 67:05d}",
            "born": str(day),
            "town": towns[int(rng.integers(3))],
            "note": f"{towns[i % 3]}, {i % 5}; {'|' * (i % 2)}",
            "active": ("TRUE", "FALSE")[int(rng.integers(2))],
            "sick": ("1", "0", "NA")[int(rng.integers(3))],
            "size": sizes[int(rng.integers(3))],
            "cost": f"{rng.normal(0, 1000):.3f}",
            "split": ("train", "val", "test")[i % 3],
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Written:
    """How a file is written."""

    delimiter: str = ","
    decimal: str = "."
    thousands: str = ""
    encoding: str = "utf-8"
    ending: str = "\n"
    quoted: bool = False
    date: str = "{y}-{m}-{d}"
    pack: Callable[[bytes], bytes] = bytes
    name: str = "t.csv"


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


GERMAN, US, SLASHES = "{d}.{m}.{y}", "{m}/{d}/{y}", "{y}/{m}/{d}"
DIALECTS: dict[str, tuple[str, Written]] = {
    "tidy": ("latin", Written()),
    "german spreadsheet": ("latin", Written(";", ",", encoding="cp1252", ending="\r\n", date=GERMAN)),
    "german thousands": ("latin", Written(";", ",", ".", "utf-8-sig", "\r\n", date=GERMAN)),
    "latin-1 tabs": ("latin", Written("\t", ",", encoding="latin-1", name="t.tsv", date=GERMAN)),
    "utf-16 of a spreadsheet": ("cyrillic", Written("\t", ",", encoding="utf-16", ending="\r\n", date=GERMAN)),
    "french spaces": ("latin", Written(";", ",", " ", "utf-8")),
    "american thousands": ("greek", Written(thousands=",", quoted=True, date=US)),
    "bars in gzip": ("chinese", Written("|", pack=gzip.compress, name="t.csv.gz", date=SLASHES)),
    "bzip2": ("greek", Written(";", pack=bz2.compress, name="t.bz2")),
    "xz without a suffix": ("cyrillic", Written(";", ",", pack=lzma.compress, name="table")),
    "zstd": ("chinese", Written("\t", pack=_zstd, name="t.txt.zst")),
    "utf-16 big end": ("chinese", Written(";", encoding="utf-16-be", quoted=True)),
}


def write_table(file: Path, rows: Rows, how: Written) -> Path:
    """Write rows in a dialect."""
    lines = [list(rows[0]), *([_cell(name, cell, how) for name, cell in row.items()] for row in rows)]
    text = "".join(how.delimiter.join(_quoted(cell, how) for cell in cells) + how.ending for cells in lines)
    mark = "\ufeff" if how.encoding == "utf-16-be" else ""
    file.write_bytes(how.pack((mark + text).encode(how.encoding)))
    return file


def _cell(name: str, cell: str, how: Written) -> str:
    if name == "born":
        year, month, day = cell.split("-")
        return how.date.format(y=year, m=month, d=day)
    if name in ("height", "income", "cost") and cell:
        shown = f"{float(cell):,.{len(cell.partition('.')[2])}f}" if how.thousands else cell
        return shown.translate(str.maketrans({",": how.thousands, ".": how.decimal}))
    return cell


def _quoted(cell: str, how: Written) -> str:
    marked = how.quoted or any(mark in cell for mark in (how.delimiter, '"', "\n"))
    return '"' + cell.replace('"', '""') + '"' if marked else cell
