"""Gains of groups that were not trained, predicted from those of a few that were: ETAP (Ayman et al. 2026).

The predictor has three parts. The linear score of task j in group G is the mean over the other members i of the
affinity `[i, j]`, and 0 for a task alone. A cubic B-spline with a ridge penalty turns the score into a gain. A
ridge regression corrects what is left, from the members of the group. Spline and regression are fitted to the
gains of trained groups, and are those of scikit-learn. The paper has these parts. Their sizes, features and
penalties are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

KNOTS = 4  # of the spline
PENALTY = 1.0  # of both regressions, on standardised scores


@dataclass(frozen=True)
class TrainedGroup:
    """A group that was trained.

    Args:
        gains: Task → relative decrease of its validation loss, for each member.
    """

    gains: Mapping[int, float]


class GroupGains:
    """The predictor of the gains of any group.

    Args:
        affinity: Linear affinities `(N, N)`: the effect of task i on task j.
        trained: The trained groups.

    Raises:
        ValueError: If there is no trained group, or a number is not finite.
        ImportError: If scikit-learn is missing.
    """

    def __init__(self, affinity: Tensor, trained: Sequence[TrainedGroup]) -> None:
        try:
            from sklearn.linear_model import Ridge
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import SplineTransformer, StandardScaler
        except ImportError as error:
            raise ImportError("gains of groups need scikit-learn: pip install 'dmtg[tables]'") from error

        self.affinity = affinity.double().cpu().numpy()
        rows = [(tuple(one.gains), task, gain) for one in trained for task, gain in one.gains.items()]
        gains = np.array([gain for *_, gain in rows])
        if not rows or not np.isfinite(gains).all() or not np.isfinite(self.affinity).all():
            raise ValueError("gains are predicted from finite affinities and the finite gains of trained groups")
        scores = np.array([[self.score(members, task)] for members, task, _ in rows])
        spline = SplineTransformer(KNOTS, degree=3, extrapolation="linear", include_bias=False)
        self.curve: Any = make_pipeline(StandardScaler(), spline, Ridge(PENALTY)).fit(scores, gains)
        left = gains - self.curve.predict(scores)
        features = np.array([self._members(members, task) for members, task, _ in rows])
        self.correction: Any = Ridge(PENALTY).fit(features, left)

    def score(self, members: Sequence[int], task: int) -> float:
        """Return the linear score of a task in a group."""
        others = [self.affinity[i, task] for i in members if i != task]
        return math.fsum(others) / len(others) if others else 0.0

    def _members(self, members: Sequence[int], task: int) -> np.ndarray:
        """One indicator for each task, and one for each other member of its group, `(N + N²,)`."""
        count = len(self.affinity)
        found = np.zeros(count + count * count)
        found[task] = 1.0
        found[[count + count * task + i for i in members if i != task]] = 1.0
        return found

    def predict(self, members: Sequence[int]) -> list[float]:
        """Return the gain of each member of a group."""
        linear = self.curve.predict(np.array([[self.score(members, task)] for task in members]))
        more = self.correction.predict(np.array([self._members(members, task) for task in members]))
        found: list[float] = (linear + more).tolist()
        return found

    def worth(self, members: Sequence[int]) -> float:
        """Return the sum of the gains of a group."""
        return math.fsum(self.predict(members))
