"""`GroupedEstimator`: a multi-output estimator that finds which targets should share an encoder."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from dmtg_core.data_checks import check_choice, check_counts
from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.network.encoders.tabular import tabm_options
from dmtg_core.sklearn.diagram import groups_html
from dmtg_core.sklearn.frames import column_names, describe, is_frame, stored_rows
from dmtg_core.sklearn.targets import Labels, Target, read_labels, targets_of
from dmtg_core.sklearn.training import (
    GATE_RATE,
    SEARCHES,
    arrays_of,
    network_spec,
    outputs,
    split_rows,
    train,
)
from dmtg_core.tables.scaling import SCALINGS
from dmtg_core.training.settings import TrainSettings, table_schedule


def _classifies(estimator: GroupedEstimator) -> bool:
    """Whether a target has classes; before `fit` it is not known, and True."""
    return any(kind != "regression" for kind in getattr(estimator, "kinds_", {"": ""}).values())


@dataclass(kw_only=True, eq=False, repr=False)
class GroupedEstimator(BaseEstimator):
    """A network for several targets whose groups of targets share an encoder (DMTG; Gao et al., ICML 2024).

    It reads tables: numbers, categories and dates, with missing values. Targets can be of different kinds, and
    labels can be missing (NaN). It writes no files.

    Args:
        groups: Largest number of groups.
        search: "guided" for the default search of `dmtg_core.search`, "dmtg" for the single run of the paper,
            "none" for one group with all targets.
        encoder: An encoder of features, a key of `dmtg_core.ENCODERS`.
        encoder_options: Options of the encoder. By default, "tabm" has those of `tabm_options` for the table.
        epochs: Number of epochs of each training; "auto" for a number by the rows, with an early stop.
        batch_size: Rows of a step; "auto" as for the epochs.
        learning_rate: Learning rate of AdamW, with a cosine schedule; "auto" for a rate by the rows.
        weight_decay: Weight decay of AdamW.
        scaling: How numbers are scaled, one of `dmtg_core.tables.scaling.SCALINGS`. The encoder "tabm" embeds
            numbers only with "quantile".
        max_values: Largest number of values of a category. By default, a category of more than 100 values is
            hashed to 256 features.
        molecules: Names of columns of molecules, written as SMILES. Their features are the descriptors of RDKit.
        validation_fraction: Share of the rows that are held out. The groups and the best epoch are chosen on them.
        kinds: Kind of all targets, or name → kind for some targets: "binary", "multiclass" or "regression". By
            default, floats with a fraction and many different whole numbers are regressions, and all other values
            are classes.
        random_state: Seed of all random numbers.
        verbose: Print a line for each epoch.

    Attributes:
        groups_: The names of the targets of each group.
        kinds_: Name → kind of each target.
        classes_: The classes of each target that is no regression; an array if y has one axis.
        n_features_in_: Number of columns of X.
        feature_names_in_: Their names, if all of them are strings.
        n_outputs_: Number of targets.

    Example:
        >>> import numpy as np
        >>> from dmtg_core.sklearn import GroupedEstimator
        >>> x = np.random.default_rng(0).normal(size=(60, 2))
        >>> y = np.stack([x[:, 0] > 0, x[:, 1] > 0], axis=1)
        >>> model = GroupedEstimator(search="none", encoder="mlp", epochs=2, random_state=0).fit(x, y)
        >>> model.groups_, model.predict(x).shape
        ([['target_0', 'target_1']], (60, 2))
    """

    groups: int = 3
    search: str = "guided"
    encoder: str = "tabm"
    encoder_options: Mapping[str, Any] | None = None
    epochs: int | str = "auto"
    batch_size: int | str = "auto"
    learning_rate: float | str = "auto"
    weight_decay: float = 0.1
    scaling: str = "quantile"
    max_values: int | None = None
    molecules: Sequence[str] = ()
    validation_fraction: float = 0.15
    kinds: str | Mapping[Any, str] | None = None
    random_state: Any = None
    verbose: bool = False

    def fit(self, X: Any, y: Any) -> Self:
        """Find the groups and train their networks.

        Args:
            X: `(n, F)`, a DataFrame or an array. NaN, None and NaT are missing values.
            y: `(n,)` or `(n, N)`, a DataFrame, a Series or an array. NaN and None are missing labels.

        Raises:
            ValueError: For an unknown parameter, too few rows or labels, and columns that cannot be used.
            TypeError: If `molecules` is a single name.
        """
        self._check_parameters()
        if y is None:
            raise ValueError("GroupedEstimator requires y to be passed, but the target y is None")
        table = self._table(X, reset=True)
        labels = read_labels(y)
        check_consistent_length(table, *labels.values)
        if len(table) < 2:
            raise ValueError(f"a training and a validation row are needed, got n_samples={len(table)}")
        targets = targets_of(labels, self.kinds)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows, held = split_rows(labels.known, self.validation_fraction, seed)
        names = column_names(table)
        self.input_ = describe(table, names, rows, self.scaling, self.max_values, self.molecules)
        self.columns_ = names
        self._train(stored_rows(self.input_.preparation, table, names), labels, targets, rows, held, seed)
        self._describe(labels, targets)
        return self

    def _train(
        self,
        stored: np.ndarray,
        labels: Labels,
        targets: list[Target],
        rows: np.ndarray,
        held: np.ndarray,
        seed: int,
    ) -> None:
        coded, known = {}, {}
        for target, values, there in zip(targets, labels.values, labels.known, strict=True):
            coded[target.task.name], known[target.task.name] = target.encode(values, there), there
        splits = {"train": arrays_of(stored, coded, known, rows), "val": arrays_of(stored, coded, known, held)}
        tasks = [target.task for target in targets]
        encoder = EncoderSpec(self.encoder, options=self._encoder_options(len(rows)))
        spec = network_spec(self.search, self.input_.spec, tasks, encoder, self.groups, seed)
        on_record = _print_epoch if self.verbose else None
        grouping, self.models_ = train(self.search, spec, splits, self._settings(len(rows), seed), on_record)
        label_of = {target.task.name: target.label for target in targets}
        self.groups_ = [[label_of[name] for name in group] for group in grouping.groups]

    def _encoder_options(self, rows: int) -> dict[str, Any]:
        if self.encoder_options is None and self.encoder == "tabm":
            return tabm_options(rows, sum(bool(edges) for edges in self.input_.spec.quantiles))
        return dict(self.encoder_options or {})

    def _describe(self, labels: Labels, targets: list[Target]) -> None:
        self.targets_, self.vector_ = targets, labels.vector
        self.n_outputs_ = len(targets)
        self.kinds_: dict[Hashable, str] = {target.label: target.task.kind for target in targets}
        self.__dict__.pop("classes_", None)
        classes = [target.classes for target in targets if target.classes is not None]
        if classes:
            self.classes_ = classes[0] if labels.vector else classes

    def predict(self, X: Any) -> Any:
        """Predict all targets, with values as in y.

        Returns:
            `(n,)` or `(n, N)` like y; for a DataFrame X a Series or a DataFrame with the names of the targets.
        """
        table, found = self._outputs(X)
        columns = [target.predictions(found[target.task.name]) for target in self.targets_]
        if not is_frame(table):
            return columns[0] if self.vector_ else _side_by_side(columns)
        import pandas as pd

        labels = [target.label for target in self.targets_]
        if self.vector_:
            return pd.Series(columns[0], index=table.index, name=labels[0])
        frame = pd.DataFrame(dict(enumerate(columns)), index=table.index)
        return frame.set_axis(pd.Index(labels), axis=1)

    @available_if(_classifies)
    def predict_proba(self, X: Any) -> Any:
        """Predict probabilities of classes.

        Returns:
            For each target that is no regression, `(n, C)` in the order of `classes_`; one array for y `(n,)`.
        """
        _, found = self._outputs(X)
        several = [
            target.probabilities(found[target.task.name]) for target in self.targets_ if target.classes is not None
        ]
        return several[0] if self.vector_ else several

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The mean over the targets of their accuracy, or of R² for regressions; missing labels are left out.

        Raises:
            ValueError: If y has another number of targets, or no label.
        """
        _, found = self._outputs(X)
        labels = read_labels(y)
        if len(labels.values) != self.n_outputs_:
            raise ValueError(f"expected y with {self.n_outputs_} targets, got {len(labels.values)}")
        scores = []
        for target, values, known in zip(self.targets_, labels.values, labels.known, strict=True):
            check_consistent_length(values, found[target.task.name])
            predicted = target.predictions(found[target.task.name])
            weight = None if sample_weight is None else np.asarray(sample_weight)[known]
            measure = r2_score if target.classes is None else _accuracy
            if known.any():
                scores.append(measure(values[known], predicted[known], sample_weight=weight))
        if not scores:
            raise ValueError("y has no label")
        return float(np.mean(scores))

    def _outputs(self, X: Any) -> tuple[Any, dict[str, Any]]:
        check_is_fitted(self)
        table = self._table(X, reset=False)
        stored = stored_rows(self.input_.preparation, table, self.columns_)
        return table, outputs(self.models_, stored)

    def _table(self, X: Any, *, reset: bool) -> Any:
        """X, checked by scikit-learn: a DataFrame as it is, anything else as an array."""
        if not is_frame(X):
            return validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan")
        validate_data(self, X, reset=reset, skip_check_array=True)
        if 0 in X.shape:
            what = "sample" if len(X) == 0 else "feature"
            raise ValueError(f"Found array with 0 {what}(s) (shape={X.shape}) while a minimum of 1 is required.")
        return X

    def _check_parameters(self) -> None:
        check_choice("search", self.search, SEARCHES)
        check_choice("scaling", self.scaling, SCALINGS)
        check_counts({"groups": self.groups})
        if self.max_values is not None:
            check_counts({"max_values": self.max_values})
        if isinstance(self.molecules, str):
            raise TypeError(f"molecules must be a list of names, such as [{self.molecules!r}]")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in (0, 1), got {self.validation_fraction}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) != "auto":
                check_counts({name: getattr(self, name)})

    def _settings(self, rows: int, seed: int) -> TrainSettings:
        schedule = table_schedule(rows)
        own = self.epochs != "auto"
        return TrainSettings(
            epochs=int(self.epochs) if own else schedule["epochs"],
            batch_size=schedule["batch_size"] if self.batch_size == "auto" else int(self.batch_size),
            patience=0 if own else schedule["patience"],
            optimizer="adamw",
            learning_rate=schedule["learning_rate"] if self.learning_rate == "auto" else float(self.learning_rate),
            gate_learning_rate=GATE_RATE,
            weight_decay=self.weight_decay,
            seed=seed,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        return tags

    def _repr_html_inner(self) -> str:
        return super()._repr_html_inner() + self._groups_html()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        found = super()._repr_mimebundle_(**kwargs)
        if "text/html" in found:
            found["text/html"] += self._groups_html()
        return found

    def _groups_html(self) -> str:
        return groups_html(self.groups_, self.kinds_) if hasattr(self, "groups_") else ""


def _accuracy(known: np.ndarray, predicted: np.ndarray, sample_weight: Any) -> float:
    """The share of equal values. Labels can be of another type than the classes, such as 1.0 beside 1."""
    return float(np.average(known == predicted, weights=sample_weight))


def _side_by_side(columns: list[np.ndarray]) -> np.ndarray:
    """Columns as an array `(n, N)`: of objects if their values have no common type."""
    kinds = {column.dtype.kind for column in columns}
    if len(kinds) > 1 and not kinds <= set("iuf"):
        columns = [column.astype(object) for column in columns]
    return np.stack(columns, 1)


def _print_epoch(record: Mapping[str, Any]) -> None:
    print(f"{record.get('stage', 'train')}: epoch {record['epoch']}, validation score {record['val_score']:.4f}")
