"""Columns of which the whole input is made: molecules, written as SMILES, and texts."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping

from pipelines.scaffold.inference import LOOKED_AT, ColumnSummary

LEAST_SHARE = 0.95  # of the values that are molecules; 0.8 if the name of the column says so
LEAST_SHARE_NAMED = 0.8
_NAMED = re.compile(r"(?i)smiles|molecule|molekül|molécule|structure|compound|ligand|drug|分子")
# an atom of the organic subset or in brackets, then bonds, branches, rings and charges (opensmiles.org, section 3)
_ATOM = r"(?:Br|Cl|[BCNOPSFI]|[bcnops]|\*|\[\d*(?:[A-Z][a-z]?|[a-z]{1,2}|\*)[^\[\]\s]*\])"
_SMILES = re.compile(rf"{_ATOM}(?:{_ATOM}|[()=#$:/\\.~@-]|%\d\d|\d)*")
_DRAWN = re.compile(r"[()=#\[\]]|[a-z]\d")  # no word of letters has these


def molecules(columns: Mapping[str, ColumnSummary]) -> ColumnSummary | None:
    """The column of molecules; None if there is none. One whose name says so comes first."""
    for column in sorted(columns.values(), key=lambda column: not _NAMED.search(column.name)):
        if _holds_molecules(column):
            return column
    return None


def _holds_molecules(column: ColumnSummary) -> bool:
    values = list(column.counts)[:LOOKED_AT]
    if column.numeric or len(values) < 3:
        return False
    drawn = sum(bool(_DRAWN.search(value)) for value in values)
    least = LEAST_SHARE_NAMED if _NAMED.search(column.name) else LEAST_SHARE
    if 2 * drawn < len(values) or sum(bool(_SMILES.fullmatch(value)) for value in values) < least * len(values):
        return False
    return importlib.util.find_spec("rdkit") is None or _share_of_rdkit(values) >= least


def _share_of_rdkit(values: list[str]) -> float:
    """The share of the values that rdkit reads."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        return sum(Chem.MolFromSmiles(value) is not None for value in values) / len(values)


def longest_text(columns: Mapping[str, ColumnSummary]) -> ColumnSummary | None:
    """The column with the longest texts of several words; None if there is none."""
    found = [column for column in columns.values() if column.is_text]
    return max(found, key=lambda column: sum(map(len, column.cells)), default=None)
