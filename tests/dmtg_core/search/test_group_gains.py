"""ETAP's predictor: its parts one by one, and groups that it finds and the linear score alone does not."""

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import SplineTransformer

from dmtg_core.search.group_gains import KNOTS, PENALTY, GroupGains, TrainedGroup
from dmtg_core.search.selection import best_partition, group_worth, partition_of

AFFINITY = torch.tensor([[0.0, 1.0, 4.0], [2.0, 0.0, 5.0], [3.0, 6.0, 0.0]])


def test_the_score_of_a_task_is_the_mean_effect_of_the_others_on_it() -> None:
    gains = GroupGains(AFFINITY, [TrainedGroup({0: 0.1, 1: 0.2, 2: 0.3})])
    assert gains.score((0, 1, 2), 0) == 2.5  # of task 1, 2 and of task 2, 3
    assert gains.score((1, 2), 1) == 6.0
    assert gains.score((2,), 2) == 0.0


def test_predictions_are_those_of_the_two_regressions_by_hand() -> None:
    trained = [
        TrainedGroup({0: 0.1, 1: 0.4}),
        TrainedGroup({1: -0.2, 2: 0.3}),
        TrainedGroup({0: 0.0, 1: 0.1, 2: 0.2}),
    ]
    scores = np.array([[2.0], [1.0], [6.0], [5.0], [2.5], [3.5], [4.5]])
    values = np.array([0.1, 0.4, -0.2, 0.3, 0.0, 0.1, 0.2])
    scaled = (scores - scores.mean()) / scores.std()
    spline = SplineTransformer(KNOTS, degree=3, extrapolation="linear", include_bias=False)
    basis = spline.fit_transform(scaled)
    curve = Ridge(PENALTY).fit(basis, values)
    # indicators: the three tasks, then for each task the three other members
    rows = {(0, 1): 0, (1, 0): 1, (1, 2): 2, (2, 1): 3}
    features = np.zeros((7, 12))
    for (task, other), row in rows.items():
        features[row, [task, 3 + 3 * task + other]] = 1
    for task, row in ((0, 4), (1, 5), (2, 6)):
        features[row, [task, *(3 + 3 * task + other for other in range(3) if other != task)]] = 1
    correction = Ridge(PENALTY).fit(features, values - curve.predict(basis))
    found = GroupGains(AFFINITY, trained)
    new = np.zeros((2, 12))
    new[0, [0, 3 + 2]], new[1, [2, 3 + 6 + 0]] = 1, 1
    at = spline.transform((np.array([[3.0], [4.0]]) - scores.mean()) / scores.std())
    expected = curve.predict(at) + correction.predict(new)
    assert found.predict((0, 2)) == pytest.approx(expected.tolist())
    assert found.worth((0, 2)) == pytest.approx(expected.sum())


def planted(members: tuple[int, ...], task: int) -> float:
    """Gains of six tasks in pairs (0, 1), (2, 3), (4, 5): a partner helps, any other member harms."""
    return sum(0.3 if i // 2 == task // 2 else -0.2 for i in members if i != task)


def test_trained_groups_correct_a_score_that_is_wrong() -> None:
    rng = np.random.default_rng(0)
    wrong = torch.tensor(rng.normal(size=(6, 6)))
    groups = [g for size in (2, 3) for g in combinations(range(6), size)][::2]
    trained = [TrainedGroup({task: planted(g, task) for task in g}) for g in groups]
    gains = GroupGains(wrong, trained)
    expected = [0, 0, 1, 1, 2, 2]
    assert partition_of(gains.worth, wrong.tolist(), 3) == expected
    assert best_partition(wrong, 3) != expected
    assert partition_of(gains.worth, wrong.tolist(), 3, exact=False) == expected


def test_a_nonlinear_gain_follows_the_spline() -> None:
    """The gain rises with the score and falls again, which no linear score can say."""
    rng = np.random.default_rng(1)
    affinity = torch.tensor(rng.uniform(0, 4, (12, 12)))
    trained = []
    for two in combinations(range(12), 2):
        found = {task: float(affinity[other, task]) for task, other in (two, two[::-1])}
        trained.append(TrainedGroup({task: -((score - 2) ** 2) for task, score in found.items()}))
    gains = GroupGains(affinity, trained[::2])
    held_out = trained[1::2]
    truth = [gain for one in held_out for gain in one.gains.values()]
    predicted = [value for one in held_out for value in gains.predict(tuple(one.gains))]
    linear = [gains.score(tuple(one.gains), task) for one in held_out for task in one.gains]
    assert np.corrcoef(truth, predicted)[0, 1] > 0.95 > 3 * abs(np.corrcoef(truth, linear)[0, 1])


@pytest.mark.parametrize("exact", [True, False])
def test_the_partition_of_pairwise_values_is_the_best_partition(exact: bool) -> None:
    affinity = torch.randn(7, 7, generator=torch.Generator().manual_seed(3)).double()
    worth = affinity.tolist()
    found = partition_of(lambda members: group_worth(worth, members), worth, 3, exact=exact)
    assert found == best_partition(affinity, 3, exact=exact)


def test_gains_need_trained_groups_and_finite_numbers() -> None:
    for trained in ([], [TrainedGroup({0: float("nan"), 1: 0.1})]):
        with pytest.raises(ValueError, match="finite gains of trained groups"):
            GroupGains(AFFINITY, trained)
