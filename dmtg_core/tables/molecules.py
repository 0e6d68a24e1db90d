"""Molecules of a table, written as SMILES, as numbers: the descriptors of RDKit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from dmtg_core.tables.cells import LARGEST

EXTRA = "pip install 'dmtg[molecules]'"
LEFT_OUT = "Ipc"  # grows exponentially with the number of atoms, beyond float32
_HELD = 32_768  # molecules whose descriptors are held, 30 MB


def read_molecule(smiles: str, column: str) -> Any:
    """The molecule of RDKit for the text of a cell, see `smiles_of`.

    Args:
        smiles: The text; RDKit reads an empty one as a molecule without atoms.
        column: Name of the column, for the error.

    Raises:
        ValueError: For a molecule that RDKit cannot read.
        ImportError: Without the package `rdkit`.
    """
    chem, base = _library()
    with base.BlockLogs():  # RDKit would write the error to stderr as well
        molecule = chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"{smiles!r} in column {column} is not a molecule that rdkit can read")
    return molecule


def smiles_of(cell: Any, column: str) -> str:
    """The text of a cell of a column of molecules.

    Raises:
        ValueError: If it is empty or not a text.
    """
    if not isinstance(cell, str) or not cell.strip():
        raise ValueError(f"expected a SMILES string in column {column}, got {cell!r}")
    return cell.strip()


@lru_cache(maxsize=1)
def descriptor_names() -> tuple[str, ...]:
    """The names of the descriptors, in the order of RDKit.

    Raises:
        ImportError: Without the package `rdkit`.
    """
    _library()
    from rdkit.Chem import Descriptors

    return tuple(name for name, _ in Descriptors.descList if name != LEFT_OUT)


@lru_cache(maxsize=_HELD)
def descriptors(smiles: str, column: str) -> np.ndarray:
    """The descriptors of a molecule: `rdkit.Chem.Descriptors`, such as its mass, its polar surface and its rings.

    Returns:
        float32 `(P,)`, not writeable, in the order of `descriptor_names`. NaN for those that are not defined for
        the molecule, and for those that float32 cannot hold.

    Raises:
        ValueError, ImportError: See `read_molecule`.
    """
    molecule = read_molecule(smiles, column)
    from rdkit.Chem import Descriptors

    with _library()[1].BlockLogs():
        every = Descriptors.CalcMolDescriptors(molecule, missingVal=np.nan)
    values = np.array([every[name] for name in descriptor_names()], np.float64)
    with np.errstate(invalid="ignore"):
        values[~(np.abs(values) <= LARGEST)] = np.nan
    found = values.astype(np.float32)
    found.flags.writeable = False
    return found


@lru_cache(maxsize=1)
def _library() -> tuple[Any, Any]:
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise ImportError(f"molecules need the package rdkit: {EXTRA}") from error
    return Chem, rdBase
