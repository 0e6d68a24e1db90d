"""Molecules in tables: n-grams, fingerprints and descriptors, against RDKit and scikit-learn."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import QuantileTransformer

from dmtg_core.network.inputs import Normalise
from dmtg_core.sklearn import GroupedEstimator
from dmtg_core.tables.molecules import descriptor_names
from pipelines.data.preprocessing import load_preparation, prepare
from pipelines.data.sources.base import INPUT, BadSampleError
from pipelines.data.sources.table import TableSource
from pipelines.errors import UserError
from pipelines.report.features import table_values
from pipelines.storage import locate
from tests.paths import SHARED

TOX21 = SHARED / "data" / "tox21"
SICK = {"column": "sick", "kind": "binary"}
MOLECULES = ["id,smiles,sick,split", "a,CCO,1,train", "b,c1ccccc1,0,train", "c,C(,0,train", "d,,1,val"]
SALT = "[Na+].[Cl-]"  # has no descriptors of bonds
CHAINS = [chain + end for chain in ("C", "CC", "CCC", "CCCC", "C=CC") for end in ("O", "N", "Cl", "C#N", "S")]


def write(root: Path, *lines: str) -> Path:
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    return root


def source(root: Path, **options: Any) -> TableSource:
    given = {"file": "t.csv", "id_column": "id", "tasks": [SICK], "smiles": "smiles", **options}
    return TableSource(locate(str(root)), given)


def described(root: Path, **options: Any) -> TableSource:
    return source(root, molecule_features="descriptors", **options)


def stored_rows(reader: TableSource) -> np.ndarray:
    return np.stack([reader.read(entry)[INPUT] for entry in reader.entries()])


@pytest.fixture
def doses(tmp_path: Path) -> Path:
    """Molecules with a dose and a solvent; three of four rows are for training."""
    pytest.importorskip("rdkit")
    rows = [
        f"{i},{5 * i % 7},{smiles},{'water' if i % 2 else 'oil'},{i % 2},{'val' if i % 4 == 3 else 'train'}"
        for i, smiles in enumerate([*CHAINS, SALT])
    ]
    return write(tmp_path, "id,dose,smiles,solvent,sick,split", *rows)


def test_ngrams_of_molecules(tmp_path: Path) -> None:
    write(tmp_path, *MOLECULES)
    reader = source(tmp_path, bits=512, longest=2)
    description = reader.describe()
    assert (description.input.shape, description.input.dtype) == ((512,), "float16")
    a, _, _, d = list(reader.entries())
    counts = reader.read(a)[INPUT].astype(float) ** 2
    assert counts.sum() == pytest.approx(9, abs=0.01)  # 5 characters with the marks at the ends, 4 pairs
    assert counts.max() == pytest.approx(2, abs=0.01)  # two C
    with pytest.raises(BadSampleError, match="expected a SMILES string in column smiles, got '', line 5"):
        reader.read(d)


def test_morgan_fingerprints(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    write(tmp_path, *MOLECULES)
    reader = source(tmp_path, molecule_features="morgan", bits=128)
    description = reader.describe()
    assert (description.input.shape, description.input.dtype) == ((128,), "uint8")
    assert description.preparation["library"].startswith("rdkit 20")
    a, b, c, _ = list(reader.entries())
    ethanol, benzene = (reader.read(entry)[INPUT] for entry in (a, b))
    # three atoms and what is around each; in benzene all atoms are alike, up to two bonds away
    assert (ethanol.sum(), benzene.sum()) == (6, 3)
    with pytest.raises(BadSampleError, match=r"'C\(' in column smiles is not a molecule"):
        reader.read(c)


@pytest.mark.parametrize("features", ["morgan", "descriptors"])
def test_features_without_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str) -> None:
    write(tmp_path, *MOLECULES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="rdkit, which is not installed") as caught:
        source(tmp_path, molecule_features=features)
    assert "dmtg[molecules]" in caught.value.remedy


def test_descriptors_are_those_of_rdkit(doses: Path) -> None:
    from rdkit import Chem
    from rdkit.Chem import Descriptors

    reader = described(doses, features=[])
    (feature,) = reader.describe().preparation["features"]
    stored = stored_rows(reader)
    functions = dict(Descriptors.descList)
    assert len(feature["parts"]) > 40
    for smiles, row in zip(CHAINS, stored, strict=False):
        molecule = Chem.MolFromSmiles(smiles)
        expected = [functions[name](molecule) for name in feature["parts"]]
        np.testing.assert_allclose(row[:-1], expected, rtol=1e-6)
    assert feature["library"].startswith("rdkit 20")
    assert load_preparation(reader.describe().preparation).libraries == ("rdkit",)


def test_a_missing_descriptor_has_the_mean_of_training_and_a_flag(doses: Path) -> None:
    reader = described(doses, features=[])
    (feature,) = reader.describe().preparation["features"]
    stored = stored_rows(reader)
    train = np.array([entry.split == "train" for entry in reader.entries()])
    assert train[-1]
    assert feature["gaps"]
    assert stored[:, -1].tolist() == [0.0] * len(CHAINS) + [1.0]
    place = feature["parts"].index("BCUT2D_MWHI")
    assert stored[-1, place] == pytest.approx(stored[train, place][:-1].mean(), rel=1e-6)
    place = feature["parts"].index("MolWt")
    assert stored[-1, place] == pytest.approx(58.44, abs=0.01)  # g/mol of sodium chloride


def test_descriptors_become_normal_scores(doses: Path) -> None:
    reader = described(doses, features=[], scaling="quantile")
    stored = stored_rows(reader)
    train = np.array([entry.split == "train" for entry in reader.entries()])
    spec = reader.describe().input
    place = reader.describe().preparation["features"][0]["parts"].index("LabuteASA")
    expected = QuantileTransformer(n_quantiles=train.sum(), output_distribution="normal").fit(stored[train])
    scores = Normalise(spec)(torch.from_numpy(stored)).numpy()[:, place]
    inside = abs(scores) < 3  # scikit-learn has other scores for the ends
    assert inside.sum() > 15
    np.testing.assert_allclose(scores[inside], expected.transform(stored)[inside, place], atol=2e-3)


def test_other_columns_are_features_beside_the_molecule(doses: Path) -> None:
    names = [feature["column"] for feature in described(doses).describe().preparation["features"]]
    assert names == ["dose", "smiles", "solvent"]
    reader = described(doses, features=["solvent"])
    preparation = reader.describe().preparation
    assert [feature["column"] for feature in preparation["features"]] == ["smiles", "solvent"]
    frame = pd.read_csv(doses / "t.csv")
    given = prepare(json.loads(json.dumps(preparation)), frame)
    np.testing.assert_array_equal(given, stored_rows(reader))
    with pytest.raises(ValueError, match="row 0: no column solvent"):
        prepare(preparation, [{"smiles": "CCO"}])
    with pytest.raises(ValueError, match=r"row 1: 'C\(' in column smiles is not a molecule"):
        prepare(preparation, [{"smiles": "CCO", "solvent": "oil"}, {"smiles": "C(", "solvent": "oil"}])
    with pytest.raises(ValueError, match="expected a SMILES string in column smiles, got nan"):
        prepare(preparation, [{"smiles": float("nan"), "solvent": "oil"}])


def test_unreadable_molecules_are_bad_samples(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    write(tmp_path, *MOLECULES)
    reader = described(tmp_path)
    assert reader.describe().preparation["features"][0]["type"] == "molecule"
    a, _, c, d = list(reader.entries())
    assert reader.read(a)[INPUT].dtype == np.float32
    with pytest.raises(BadSampleError, match=r"'C\(' in column smiles is not a molecule"):
        reader.read(c)
    with pytest.raises(BadSampleError, match="expected a SMILES string in column smiles, got ''"):
        reader.read(d)


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (["C(", "C)"], {}, "no molecule in the train rows of column smiles"),
        (["CCO", "OCC"], {}, "the molecules in the train rows of column smiles are alike"),
        (["CCO", "CC"], {"categorical": ["smiles"]}, "categorical names smiles, the molecules"),
        (["CCO", "CC"], {"radius": 3}, "radius has no meaning"),
        (["CCO", "CC"], {"features": ["sick"]}, "sick cannot be a feature"),
    ],
)
def test_molecules_that_cannot_be_described(
    tmp_path: Path, cells: list[str], options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("rdkit")
    write(tmp_path, "id,smiles,sick,split", *(f"{i},{cell},{i % 2},train" for i, cell in enumerate(cells * 2)))
    with pytest.raises(UserError, match=message):
        described(tmp_path, **options).describe()


def test_a_descriptor_that_this_rdkit_does_not_have(doses: Path) -> None:
    preparation = described(doses, features=[]).describe().preparation
    preparation["features"][0] |= {"library": "rdkit 1999.1.1"}
    preparation["features"][0]["parts"][0] = "Phlogiston"
    with pytest.raises(ImportError, match="rdkit has no descriptor Phlogiston: install rdkit 1999.1.1"):
        prepare(preparation, ["CCO"])


def test_the_report_has_a_column_for_each_descriptor(doses: Path) -> None:
    reader = described(doses, features=["solvent"])
    preparation = reader.describe().preparation
    values = {one.name: one for one in table_values(stored_rows(reader), preparation)}
    assert list(values) == [*preparation["features"][0]["parts"], "solvent"]
    assert values["HeavyAtomCount"].array.tolist()[:4] == [2, 2, 2, 3]


def test_the_estimator_has_the_features_of_the_reader(doses: Path) -> None:
    frame = pd.read_csv(doses / "t.csv")
    x, y = frame[["dose", "smiles"]], frame[["sick"]].assign(other=frame["id"] % 3)
    model = GroupedEstimator(search="none", epochs=1, random_state=0, molecules=["smiles"]).fit(x, y)
    _, molecule = model.input_.preparation["features"]
    assert set(molecule["parts"]) < set(descriptor_names())
    assert model.predict(x).shape == (26, 2)
    with pytest.raises(ValueError, match="X has no column 'structure', which molecules names"):
        model.set_params(molecules=["structure"]).fit(x, y)
    with pytest.raises(TypeError, match=r"molecules must be a list of names, such as \['smiles'\]"):
        model.set_params(molecules="smiles").fit(x, y)
    with pytest.raises(ValueError, match=r"row 1 of X: 'C\(' in column smiles is not a molecule"):
        model.predict(x[:2].assign(smiles=["CCO", "C("]))


def test_what_is_read_of_molecules_is_logged(doses: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    described(doses).describe()
    assert "1 feature is a molecule: smiles" in caplog.text


@pytest.mark.skipif(not TOX21.is_dir(), reason="the shared Tox21 data is not beside the checkout")
def test_tox21() -> None:
    task = {"column": "SR-p53", "kind": "binary", "metric": "auroc"}
    reader = source(TOX21, file="tox21.csv", id_column="mol_id", tasks=[task])
    entries = list(reader.entries())
    assert len(entries) == 7831
    found = [reader.read(entry)["task.SR-p53"] for entry in entries[:1000]]
    missing = sum(value is None for value in found)
    assert 50 < missing < 300
