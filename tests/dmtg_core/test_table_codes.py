"""Numbers of a table whose repeated values are categories as well."""

import numpy as np
import pandas as pd

from dmtg_core.sklearn import GroupedEstimator
from dmtg_core.tables.features import TableRules, table_input
from dmtg_core.tables.scaling import is_irregular, table_codes


def cells(**columns):
    """Rows of cells."""
    return [dict(zip(columns, map(str, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def entities(count: int, rows: int, seed: int = 0) -> np.ndarray:
    """Random numbers, each of which repeats."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=count).astype(np.float32)[np.arange(rows) % count]


def test_numbers_that_stand_for_entities_have_codes():
    families, rows = entities(30, 600), 600
    table = cells(
        family=families, size=np.arange(rows) % 40 / 100, free=np.random.default_rng(1).normal(size=rows)
    )
    spec = table_input(table, ["family", "size", "free"], TableRules()).spec
    assert spec.codes == (tuple(np.unique(families).tolist()), (), ())
    standard = table_input(table, ["family", "size", "free"], TableRules(scaling="standard")).spec
    assert standard.codes == ()


def test_rare_values_and_missing_ones_have_none():
    families = entities(30, 600).astype(object)
    families[:2], families[2:50] = 9.5, ""
    spec = table_input(cells(family=families, x=np.arange(600)), ["family", "x"], TableRules()).spec
    known, flag, _ = spec.codes
    assert len(known) == 30
    assert 9.5 not in known
    assert flag == ()


def test_a_table_has_at_most_one_code_for_ten_rows():
    features = [{"type": "number", "column": name, "mean": 0.0, "gaps": False} for name in "ab"]
    counts = [{str(value): 3 for value in np.random.default_rng(n).normal(size=n)} for n in (60, 40)]
    assert [len(codes) for codes in table_codes(features, counts, 1_000)] == [60, 40]
    assert [len(codes) for codes in table_codes(features, counts, 990)] == [0, 40]
    assert [len(codes) for codes in table_codes(features, counts, 390)] == [0, 0]


def test_values_of_a_grid_are_regular():
    rng = np.random.default_rng(0)
    assert not is_irregular(np.unique(rng.normal(size=5_000).round(2)))
    assert not is_irregular(range(18, 90))
    assert is_irregular(rng.uniform(size=200))
    assert is_irregular(np.log(np.unique(rng.integers(1, 10_000, 200))))


def test_the_estimator_learns_the_values_of_entities():
    rng = np.random.default_rng(0)
    place = rng.integers(60, size=4_000)
    x = pd.DataFrame({"family": rng.normal(size=60)[place], "noise": rng.normal(size=4_000)})
    y = rng.normal(size=60)[place]
    model = GroupedEstimator(search="none", epochs=6, random_state=0).fit(x[:3_700], y[:3_700])
    assert len(model.input_.spec.codes[0]) == 60
    assert model.score(x[3_700:], y[3_700:]) > 0.8
