"""Grouping as an estimator of scikit-learn."""

from importlib.util import find_spec

if find_spec("sklearn") is None:
    raise ImportError("dmtg_core.sklearn needs scikit-learn: pip install 'dmtg[tables]'")

from dmtg_core.sklearn.estimator import GroupedEstimator

__all__ = ["GroupedEstimator"]
