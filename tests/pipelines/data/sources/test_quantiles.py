"""`scaling` of the reader of tables: normal scores, medians and interquartile ranges, against scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import QuantileTransformer, RobustScaler

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.inputs import Normalise
from dmtg_core.sklearn.frames import column_names, describe
from dmtg_core.tables.figures import sampled_rows
from pipelines.data.preprocessing import prepare
from pipelines.data.sources.base import INPUT
from pipelines.data.sources.columns import RowsOf
from pipelines.data.sources.table import TableSource
from pipelines.storage import locate

TASK = {"column": "sick", "kind": "binary"}


def table(folder: Path, rows: int = 600) -> pd.DataFrame:
    """Numbers with a long tail, with gaps and with two values, a category, dates; a third is not for training."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "income": np.exp(3 * rng.normal(size=rows)).round(3),
            "age": np.where(rng.random(rows) < 0.2, np.nan, rng.integers(18, 90, rows)),
            "insured": rng.integers(0, 2, rows),
            "plant": rng.choice(["oak", "elm"], rows),
            "seen": pd.date_range("2020-01-01", periods=rows).strftime("%Y-%m-%d"),
            "sick": rng.integers(0, 2, rows),
            "split": np.where(np.arange(rows) % 3 == 2, "val", "train"),
        }
    )
    frame.to_csv(folder / "t.csv", index=False)
    return frame


def source(folder: Path, **options: Any) -> TableSource:
    return TableSource(locate(str(folder)), {"file": "t.csv", "tasks": [TASK], "scaling": "quantile", **options})


def test_numbers_become_normal_scores_and_flags_do_not_change(tmp_path: Path) -> None:
    frame = table(tmp_path)
    reader = source(tmp_path)
    spec = reader.describe().input
    stored = np.stack([reader.read(entry)[INPUT] for entry in reader.entries()])
    scores = Normalise(spec)(torch.from_numpy(stored)).numpy()
    train = (frame["split"] == "train").to_numpy()
    income = frame[["income"]].to_numpy(np.float32)
    expected = QuantileTransformer(n_quantiles=256, output_distribution="normal").fit(income[train])
    inside = (income[:, 0] > income[train].min()) & (income[:, 0] < income[train].max())
    np.testing.assert_allclose(scores[inside, 0], expected.transform(income)[inside, 0], atol=2e-3)
    ages = frame["age"].to_numpy(np.float32)
    known = train & ~np.isnan(ages)
    assert spec.quantiles[1] == tuple(np.quantile(ages[known], np.linspace(0, 1, 256)).astype(np.float32).tolist())
    # the gap of age, the flag, and the categories (two and other values) are as they are; then six parts of dates
    assert [len(edges) for edges in spec.quantiles[2:7]] == [0] * 5
    assert np.array_equal(scores[:, 4:7], stored[:, 4:7])
    assert [bool(edges) for edges in spec.quantiles[7:]] == [
        True,
        False,
        True,
        True,
        True,
        True,
    ]  # one or two years


def test_a_small_table_has_a_quantile_for_each_row(tmp_path: Path) -> None:
    frame = table(tmp_path, rows=60)
    train = frame["split"] == "train"
    assert source(tmp_path).describe().input.quantiles[0] == tuple(
        np.sort(frame["income"][train].to_numpy(np.float32)).tolist()
    )


def test_the_manifest_keeps_the_quantiles(tmp_path: Path) -> None:
    table(tmp_path, rows=90)
    described = source(tmp_path).describe()
    assert InputSpec(**json.loads(json.dumps(described.input.to_dict()))) == described.input
    plain = source(tmp_path, scaling="standard").describe().input
    assert plain == InputSpec(plain.kind, plain.shape, plain.dtype, plain.mean, plain.std)


def test_a_long_table_is_sampled_and_the_sample_is_always_the_same(tmp_path: Path) -> None:
    table(tmp_path)
    reader = source(tmp_path)
    every = [row for row, split in RowsOf(reader._entries) if split == "train"]
    assert sampled_rows(every) == every
    some = [sampled_rows(every, 50) for _ in range(2)]
    assert len(every) == 400
    assert some[0] == some[1]
    lines = [row.line for row in some[0]]
    assert len(set(lines)) == 50
    assert set(lines) <= {row.line for row in every}
    assert max(lines) > 400  # not the first ones


def test_molecules_have_no_scaling(tmp_path: Path) -> None:
    table(tmp_path, rows=9)
    with pytest.raises(Exception, match="scaling has no meaning with these molecules"):
        source(tmp_path, smiles="plant")


def test_robust_scaling_is_that_of_scikit_learn(tmp_path: Path) -> None:
    frame = table(tmp_path)
    frame["age"] = frame["age"].mask(frame["age"] >= 88, 9e5)  # a few wrong ones
    frame["debt"] = np.where(np.arange(len(frame)) % 5 < 4, 0.0, frame["income"])
    frame.to_csv(tmp_path / "t.csv", index=False)
    reader = source(tmp_path, scaling="robust")
    described = reader.describe()
    stored = np.stack([reader.read(entry)[INPUT] for entry in reader.entries()])
    scaled = Normalise(described.input)(torch.from_numpy(stored)).numpy()
    train = (frame["split"] == "train").to_numpy()
    numbers = frame[["income", "age", "insured"]]
    expected = RobustScaler().fit(numbers[train])
    filled = numbers.fillna(numbers[train].median())
    np.testing.assert_allclose(scaled[:, [0, 1, 3]], expected.transform(filled), atol=1e-5, rtol=1e-4)
    assert described.preparation["features"][1]["mean"] == numbers["age"][train].median()
    # flags of gaps and categories are as they are
    assert np.array_equal(scaled[:, [2, 4, 5, 6]], stored[:, [2, 4, 5, 6]])
    # four of five debts are 0: RobustScaler divides by 1, and the others would stay in their unit
    assert described.input.mean[-1] == 0
    assert described.input.std[-1] == pytest.approx(frame["debt"][train].std(ddof=0))
    years = pd.to_datetime(frame["seen"]).dt.day_of_year[train]
    assert described.input.mean[-2] == years.median()
    assert described.input.std[-2] == years.quantile(0.75) - years.quantile(0.25)
    # the same in the manifest, in a DataFrame and at prediction
    assert InputSpec(**json.loads(json.dumps(described.input.to_dict()))) == described.input
    found = describe(frame.drop(columns=["sick", "split"]), [*column_names(frame)[:5], "debt"],
                     np.flatnonzero(train), "robust")  # fmt: skip
    assert (found.spec, found.preparation) == (described.input, described.preparation)
    assert np.array_equal(prepare(described.preparation, frame), stored)
