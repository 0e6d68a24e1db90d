"""Tree ensembles: equal to scikit-learn's own, with missing labels and rare classes."""

import math

import numpy as np
import pytest
from sklearn import ensemble
from sklearn import metrics as sk

from dmtg_core import ArrayData, Arrays, Task
from dmtg_core.evaluation.trees import (
    COUNT,
    EXTRA_TREES,
    GRADIENT_BOOSTING,
    QUICK_ROWS,
    QUICK_VALUES,
    TREES,
    quick_rows,
    train_trees,
    trees_apply,
)

TASKS = (
    Task("flag", "binary", metric="auroc"),
    Task("kind", "multiclass", 3),
    Task("value", "regression", offset=(5.0,), scale=(2.0,)),
)


def arrays(rows: int, seed: int, missing: float = 0.0) -> Arrays:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    noisy = x + rng.normal(size=x.shape)
    labels = {
        "flag": (noisy[:, 0] > 0).astype(np.uint8),
        "kind": np.digitize(noisy[:, 1], [-0.5, 0.5]).astype(np.uint8),
        "value": (5 + 2 * noisy[:, 2] * noisy[:, 3]).astype(np.float32),
    }
    present = {name: rng.random(rows) >= missing for name in labels} if missing else {}
    return Arrays(x, labels, present)


def splits(missing: float = 0.0) -> dict[str, Arrays]:
    return {"train": arrays(300, 0, missing), "val": arrays(100, 1, missing), "test": arrays(120, 2, missing)}


def known(part: Arrays, name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = part.present.get(name, np.ones(len(part), bool))
    return part.inputs[rows], part.labels[name][rows]


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("method", TREES)
def test_figures_are_those_of_scikit_learn(method, missing):
    parts = splits(missing)
    found = train_trees(method, TASKS, ArrayData(parts, TASKS), splits=["val", "test"], seed=3).metrics["test"]
    forest, boosting = ensemble.ExtraTreesClassifier, ensemble.HistGradientBoostingClassifier
    make = (lambda: forest(COUNT, random_state=3)) if method == EXTRA_TREES else lambda: boosting(random_state=3)
    x, y = known(parts["test"], "flag")
    scores = make().fit(*known(parts["train"], "flag")).predict_proba(x)[:, 1]
    assert found["flag"]["auroc"] == pytest.approx(sk.roc_auc_score(y, scores), abs=1e-6)
    x, y = known(parts["test"], "kind")
    shares = make().fit(*known(parts["train"], "kind")).predict_proba(x)
    assert found["kind"]["accuracy"] == pytest.approx(sk.accuracy_score(y, shares.argmax(1)), abs=1e-6)
    shares = shares.clip(1e-6, 1)
    loss = sk.log_loss(y, shares / shares.sum(1, keepdims=True))
    assert found["kind"]["loss"] == pytest.approx(loss, rel=1e-4)
    reg = {EXTRA_TREES: ensemble.ExtraTreesRegressor(COUNT, random_state=3)}
    reg[GRADIENT_BOOSTING] = ensemble.HistGradientBoostingRegressor(random_state=3)
    x, y = known(parts["train"], "value")
    predicted = 5 + 2 * reg[method].fit(x, (y - 5) / 2).predict(known(parts["test"], "value")[0])
    error = math.sqrt(sk.mean_squared_error(known(parts["test"], "value")[1], predicted))
    assert found["value"]["rmse"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("method", TREES)
def test_a_class_that_training_does_not_have_is_never_predicted(method):
    parts = splits()
    parts["train"].labels["kind"][parts["train"].labels["kind"] == 2] = 0
    found = train_trees(method, TASKS[1:2], ArrayData(parts, TASKS[1:2]), splits=["val"], seed=0)
    assert math.isfinite(found.score)
    assert found.metrics["val"]["kind"]["accuracy"] < 0.8
    assert found.seconds > 0


def test_values_of_several_channels_have_a_model_each():
    task = Task("both", "regression", 2)
    parts = {name: Arrays(part.inputs, {"both": part.inputs[:, :2] * 2}, {}) for name, part in splits().items()}
    for method in TREES:
        found = train_trees(method, [task], ArrayData(parts, [task]), splits=["val"], seed=0)
        assert found.metrics["val"]["both"]["r2"] > 0.9


def test_they_read_tables_of_sample_wise_tasks_only():
    assert trees_apply("features", TASKS)
    assert not trees_apply("image", TASKS)
    assert not trees_apply("features", [*TASKS, Task("depth", "dense_regression")])


def test_a_quick_figure_has_fewer_trees_on_the_first_rows(monkeypatch):
    monkeypatch.setattr("dmtg_core.evaluation.trees.BATCH", 64)  # so that the rows are of several batches
    parts, tasks = splits(), TASKS[:1]
    found = train_trees(EXTRA_TREES, tasks, ArrayData(parts, tasks), splits=["test"], seed=3, count=20, rows=150)
    x, y = (values[:150] for values in known(parts["train"], "flag"))
    forest = ensemble.ExtraTreesClassifier(20, random_state=3).fit(x, y)
    x, y = known(parts["test"], "flag")
    expected = sk.roc_auc_score(y, forest.predict_proba(x)[:, 1])
    assert found.metrics["test"]["flag"]["auroc"] == pytest.approx(expected, abs=1e-6)
    assert math.isnan(found.score)  # validation was not evaluated
    assert 1 < quick_rows(10**9, 50) == QUICK_ROWS
    assert quick_rows(10**9, 1000) == QUICK_VALUES // 1000
    assert quick_rows(70, 10**9) == 1
    assert quick_rows(70, 4) == 70
