"""The benchmark of tables: splits, mean errors, and the learners beside scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from sklearn.metrics import accuracy_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from bench.tables import sets
from bench.tables.__main__ import mean_error
from bench.tables.learners import errors
from dmtg_core import Task
from dmtg_core.training.data import ArrayData, Arrays


def test_a_split_has_its_shares_and_follows_its_seed(tmp_path: Path) -> None:
    found = sets.digits()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sets.write(found, tmp_path / f"{name}.csv", seed)
    table = pd.read_csv(tmp_path / "a.csv")
    assert table["split"].value_counts().to_dict() == {"train": 1078, "test": 449, "val": 270}
    pd.testing.assert_frame_equal(table.drop(columns="split"), found.frame, check_dtype=False)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert not table["split"].equals(pd.read_csv(tmp_path / "c.csv")["split"])


def test_rows_that_belong_together_are_in_one_part_of_a_split(tmp_path: Path) -> None:
    person = np.random.default_rng(0).integers(400, size=3_000)
    frame = pd.DataFrame({"age": person % 20, "town": person // 20, "y": np.arange(3_000)})
    splits = []
    for seed in (1, 1, 2):
        sets.write(sets.TableSet(frame, ("y",), together=("age", "town")), tmp_path / "a.csv", seed)
        table = pd.read_csv(tmp_path / "a.csv")
        pd.testing.assert_frame_equal(table.drop(columns="split"), frame)
        assert table.groupby(["age", "town"])["split"].nunique().eq(1).all()
        shares = table["split"].value_counts(normalize=True)
        assert shares[["train", "val", "test"]].to_list() == pytest.approx([0.6, 0.15, 0.25], abs=0.01)
        splits.append(table["split"])
    assert splits[0].equals(splits[1])
    assert not splits[0].equals(splits[2])


def test_a_mean_error_has_regressions_in_standard_deviations() -> None:
    tasks = [Task("a", "binary", metric="auroc"), Task("b", "regression", metric="rmse", scale=(4.0,))]
    assert mean_error(tasks, {"a": 0.2, "b": 2.0}) == pytest.approx((0.2 + 0.5) / 2)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_learner_has_the_error_of_scikit_learn() -> None:
    x, y = load_iris(return_X_y=True)
    x = x.astype(np.float32)
    parts = {"train": slice(0, None, 2), "test": slice(1, None, 2)}
    data = ArrayData(
        {split: Arrays(x[rows], {"species": y[rows].astype(np.int32)}, {}) for split, rows in parts.items()},
        [task := Task("species", "multiclass", channels=3, metric="accuracy")],
    )
    scale = StandardScaler().fit(x[::2])
    model = MLPClassifier(random_state=5).fit(scale.transform(x[::2]), y[::2])
    known = 1 - accuracy_score(y[1::2], model.predict(scale.transform(x[1::2])))
    assert errors("mlp_sklearn", [task], data, 5)["species"] == pytest.approx(known)
