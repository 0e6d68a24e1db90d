"""`GroupedEstimator`: the checks of scikit-learn, kinds of targets, a pipeline, a grid search, copies, repr."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from dmtg_core import Grouping
from dmtg_core.sklearn import GroupedEstimator
from tests.dmtg_core.planted import planted_data
from tests.paths import ROOT

TINY = {"width": 8, "blocks": 1, "members": 2, "embedding": 2, "frequencies": 2}


def small(**options: Any) -> GroupedEstimator:
    given: dict[str, Any] = {"encoder_options": TINY, "epochs": 1, "random_state": 0, "search": "none"}
    return GroupedEstimator(**given | options)


def checks() -> list[Any]:
    skipped = {"check_array_api_input": "it needs the environment variable SCIPY_ARRAY_API"}
    soak = {"dmtg": [pytest.mark.soak]}  # to scikit-learn it is like the guided search
    found = [
        pytest.param(one, check, id=f"{search}-{check.func.__name__}", marks=soak.get(search, ()))
        for search in ("none", "guided", "dmtg")
        for one, check in estimator_checks_generator(small(search=search, random_state=None))
        if check.func.__name__ not in skipped
    ]
    assert len(found) >= 3 * 40
    return found


@pytest.mark.parametrize(("estimator", "check"), checks())
def test_the_checks_of_scikit_learn(estimator: GroupedEstimator, check: Any) -> None:
    check(estimator)


def flowers(rows: int = 90) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table with a number, a category and a date, and targets of each kind with missing labels."""
    rng = np.random.default_rng(0)
    x = pd.DataFrame(
        {
            "height": rng.normal(30.0, 5.0, rows),
            "soil": rng.choice(["clay", "sand", "loam"], rows),
            "sown": pd.Timestamp("2024-03-01") + pd.to_timedelta(rng.integers(0, 90, rows), "D"),
        },
        index=[f"plant {i}" for i in range(rows)],
    )
    x.loc[x.index[:9], "height"] = np.nan
    y = pd.DataFrame(
        {
            "alive": rng.choice([True, False], rows),
            "colour": rng.choice(["red", "blue", "white"], rows),
            "petals": rng.integers(3, 7, rows).astype(float),
            "weight": 1e6 + x["height"].fillna(30.0) * 2 + rng.normal(size=rows),
        },
        index=x.index,
    )
    y.loc[y.index[10:30], "petals"] = np.nan
    y["colour"] = y["colour"].where(rng.random(rows) < 0.8)
    return x, y


def test_targets_of_different_kinds_with_missing_labels() -> None:
    x, y = flowers()
    model = small(epochs=3).fit(x, y)
    assert model.kinds_ == {
        "alive": "binary", "colour": "multiclass", "petals": "multiclass", "weight": "regression",
    }  # fmt: skip
    assert model.groups_ == [["alive", "colour", "petals", "weight"]]
    assert [column["type"] for column in model.input_.preparation["features"]] == ["number", "category", "date"]
    predicted = model.predict(x)
    assert list(predicted.columns) == list(y.columns)
    assert predicted.index.equals(x.index)
    assert predicted["alive"].dtype == bool
    assert set(predicted["colour"]) <= {"red", "blue", "white"}
    assert set(predicted["petals"]) <= {3.0, 4.0, 5.0, 6.0}
    assert abs(predicted["weight"].mean() - y["weight"].mean()) < 100
    classes, shares = model.classes_, model.predict_proba(x)
    assert [list(one) for one in classes] == [[False, True], ["blue", "red", "white"], [3, 4, 5, 6]]
    for one, share, name in zip(classes, shares, ("alive", "colour", "petals"), strict=True):
        assert share.shape == (len(x), len(one))
        np.testing.assert_allclose(share.sum(1), 1)
        assert list(one[share.argmax(1)]) == list(predicted[name])


def test_a_score_is_the_mean_of_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, r2_score

    x, y = flowers()
    model = small(epochs=2).fit(x, y)
    predicted = model.predict(x)
    known = y.notna()
    scores = [
        accuracy_score(y[name][known[name]].astype(str), predicted[name][known[name]].astype(str))
        for name in ("alive", "colour", "petals")
    ]
    scores.append(r2_score(y["weight"], predicted["weight"]))
    assert model.score(x, y) == pytest.approx(np.mean(scores))


def test_missing_labels_do_not_change_the_result() -> None:
    x, y = flowers()
    y = y.astype({"colour": object})
    other = y.copy()
    other["colour"] = other["colour"].where(other["colour"].notna(), None)
    other["petals"] = other["petals"].astype("Int64")
    found = [small(epochs=2).fit(x, one).predict(x) for one in (y, other)]
    pd.testing.assert_frame_equal(*found, check_dtype=False)


def test_a_value_that_training_did_not_have_and_a_missing_one_are_predicted() -> None:
    x, y = flowers()
    model = small().fit(x, y)
    new = pd.DataFrame({"height": [np.nan], "soil": ["peat"], "sown": [pd.Timestamp("2030-01-01")]})
    assert model.predict(new).shape == (1, 4)
    with pytest.raises(ValueError, match="row 0 of X: 'tall' in column height is not a finite number"):
        model.predict(new.astype({"height": object}).assign(height="tall"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1] * 20, "binary"),
        ([0.0, 1.0, np.nan, 1.0] * 10, "binary"),
        (["a", "b", None, "c"] * 10, "multiclass"),
        ([1, 2, 3, 4] * 10, "multiclass"),
        (list(range(40)), "regression"),
        (np.linspace(0, 1, 40), "regression"),
        ([True, False] * 20, "binary"),
        (pd.Categorical([1.5, 2.5, 3.5, 1.5] * 10), "multiclass"),
    ],
)
def test_kinds_follow_from_the_labels(values: Any, kind: str) -> None:
    x = np.arange(40.0)[:, None]
    model = small().fit(x, pd.Series(values, name="y"))
    assert model.kinds_ == {"y": kind}
    assert model.predict(x).shape == (40,)
    assert hasattr(model, "predict_proba") == hasattr(model, "classes_") == (kind != "regression")


def test_kinds_can_be_given() -> None:
    x = np.arange(40.0)[:, None]
    y = pd.DataFrame({"stars": [1, 2, 3, 4] * 10, "flag": [0, 1] * 20})
    assert small(kinds={"stars": "regression"}).fit(x, y).kinds_ == {"stars": "regression", "flag": "binary"}
    assert set(small(kinds="regression").fit(x, y).kinds_.values()) == {"regression"}
    for kinds, message in (
        ({"star": "binary"}, "kinds names star, expected some of stars, flag"),
        ({"stars": "binary"}, "target 'stars' is binary, its labels have 4 values"),
        ("ordinal", "unknown kind 'ordinal' of target 'stars'"),
    ):
        with pytest.raises(ValueError, match=message):
            small(kinds=kinds).fit(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "random"}, "unknown search 'random', expected one of guided, dmtg, none"),
        ({"scaling": "log"}, "unknown scaling 'log', expected one of standard, quantile, robust"),
        ({"max_values": 0}, "max_values must be a whole number of at least 1"),
        ({"groups": 0}, "groups must be a whole number of at least 1"),
        ({"epochs": "many"}, "epochs must be a whole number"),
        ({"validation_fraction": 1}, r"validation_fraction must be in \(0, 1\)"),
        ({"encoder": "tabn"}, "tabn"),
    ],
)
def test_parameters_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options).fit(np.arange(20.0)[:, None], np.arange(20) % 2)


def test_columns_and_labels_that_cannot_be_used_are_refused() -> None:
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    with pytest.raises(ValueError, match="X: no feature is left"):
        small().fit(np.ones((20, 2)), y)
    with pytest.raises(
        ValueError, match="different values, more than 100, and most occur once or twice, .*: remove it"
    ):
        small().fit(pd.DataFrame({"a": [f"text {i}" for i in range(300)]}), np.arange(300) % 2)
    with pytest.raises(ValueError, match="target 'target_1' has 1 labels: at least 2 are needed"):
        small().fit(x, np.stack([y, np.where(np.arange(20) == 5, 1, np.nan)], 1))
    with pytest.raises(ValueError, match="contains infinity"):
        small().fit(x, np.where(y == 1, np.inf, 0.5))
    with pytest.raises(ValueError, match="n_samples=1"):
        small().fit(x[:1], y[:1])


def test_scaling_and_the_limit_of_categories_are_those_that_are_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    x = pd.DataFrame({"town": [f"t{i % 120}" for i in range(960)], "size": np.arange(960.0) ** 2})
    y = np.arange(960) % 2
    model = small(scaling="robust").fit(x, y)
    assert "column town has 120 values and is hashed to 256 features; for a feature for each" in caplog.text
    assert (model.input_.spec.shape, model.input_.spec.quantiles) == ((257,), ())
    assert model.predict(x.assign(town="new")).shape == (960,)
    assert small(max_values=120).fit(x, y).input_.spec.shape == (122,)
    with pytest.raises(ValueError, match="town has 120 different values, more than max_values=119"):
        small(max_values=119).fit(x, y)


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_a_few_rows_are_enough(rows: int) -> None:
    x = np.arange(2.0 * rows).reshape(rows, 2)
    model = small(search="guided").fit(np.vstack([x, x]), np.arange(2 * rows) % 2)
    assert model.predict(x).shape == (rows,)


def test_a_pipeline_and_a_grid_search() -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 3)), np.tile([[0, 1], [1, 0], [1, 1]], (20, 1))
    pipeline = make_pipeline(StandardScaler(), small())
    assert pipeline.fit(x, y).predict(x).shape == (60, 2)
    found = GridSearchCV(pipeline, {"groupedestimator__learning_rate": [1e-6, 1e-2]}, cv=2).fit(x, y)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    assert found.best_estimator_[-1].learning_rate in (1e-6, 1e-2)


def test_copies_and_repetitions_predict_the_same() -> None:
    x, y = flowers()
    model = small(search="guided", epochs=2).fit(x, y)
    file = io.BytesIO()
    joblib.dump(model, file)
    for one in (joblib.load(file), clone(model).fit(x, y)):
        pd.testing.assert_frame_equal(one.predict(x), model.predict(x))
    assert not clone(model).set_params(random_state=1).fit(x, y).predict(x).equals(model.predict(x))


def test_known_groups_are_found() -> None:
    _, tasks, data, truth = planted_data(0, tasks=6, groups=2, features=8, rows=2000)
    parts = [data.splits[name] for name in ("train", "val")]
    x = np.concatenate([part.inputs for part in parts])
    y = pd.DataFrame({task.name: np.concatenate([part.labels[task.name] for part in parts]) for task in tasks})
    model = GroupedEstimator(
        groups=2, encoder="mlp", encoder_options={"widths": [16, 4]}, epochs=20, batch_size=128,
        learning_rate=0.01, weight_decay=0.0, random_state=0,
    ).fit(x, y)  # fmt: skip
    assert Grouping.of(model.groups_, truth.tasks).adjusted_rand_index(truth) == 1
    test = data.splits["test"]
    assert model.score(test.inputs, pd.DataFrame(test.labels)) > 0.75


def test_a_notebook_shows_the_groups() -> None:
    x, y = flowers()
    names = {"alive": "<script>alert(1)</script>"}
    model = small()
    assert "group 0" not in model._repr_html_()
    model.fit(x, y.rename(columns=names))
    for html in (model._repr_html_(), model._repr_mimebundle_()["text/html"]):
        assert "sk-" in html
        assert "group 0" in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt; <small>binary</small>" in html
        assert "<script>alert" not in html


def test_every_epoch_is_printed_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = flowers()
    small(verbose=True, epochs=2).fit(x, y)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("train: epoch 1, validation score ")
    assert second.startswith("train: epoch 2, validation score ")
    small().fit(x, y)
    assert not capsys.readouterr().out


CODE = """
import sys, dmtg_core
assert "sklearn" not in sys.modules and "pandas" not in sys.modules
sys.modules["sklearn"] = None  # cannot be imported
sys.meta_path.insert(0, type("Hidden", (), {"find_spec": staticmethod(lambda *_: None)}))
try:
    import dmtg_core.sklearn
except ImportError as error:
    print(error)
"""


def test_without_scikit_learn_the_error_names_the_extra() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "dmtg_core.sklearn needs scikit-learn: pip install 'dmtg[tables]'"
