"""The difference of two validation scores: its standard error against formulas and against scipy's bootstrap."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from dmtg_core import LocalContext, Task
from dmtg_core.evaluation.jackknife import Difference, difference_of, score_parts
from dmtg_core.training.data import Batch
from dmtg_core.training.loop import SMOOTH
from tests.dmtg_core.parallel import in_threads
from tests.soak import others_in_soak

VALUE, FLAG = Task("value", "regression", loss="l1", metric="mae"), Task("flag", "binary", metric="auroc")
CLASSES = Task("class", "multiclass", channels=3, metric="accuracy")


class Column(nn.Module):
    """A network whose outputs are stored: those of the tasks, or others of the same shape, for each sample."""

    def __init__(self, outputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: values[rows] for name, values in self.outputs.items()}


class Rows:
    """Data whose inputs are the numbers of their samples, in consecutive parts for the workers."""

    def __init__(self, targets: dict[str, Tensor], rank: int = 0, workers: int = 1) -> None:
        self.targets = targets
        self.mine = torch.arange(len(next(iter(targets.values())))).tensor_split(workers)[rank]

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        assert split == "val"
        for rows in self.mine.split(batch_size):
            yield Batch(rows, {name: target[rows] for name, target in self.targets.items()})


def context() -> LocalContext:
    return LocalContext(None, device="cpu")


def difference(tasks: list[Task], networks: Sequence[Column], data: Rows, worker: object, **options) -> Difference:
    return difference_of(*(score_parts(tasks, network, data, worker, **options) for network in networks))


def absolute_errors(rows: int, seed: int) -> tuple[Column, Column, Rows, np.ndarray]:
    """Two networks with the given absolute errors, all of them positive."""
    errors = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed)) + 0.2
    errors[1] = 0.8 * errors[0] + 0.3 * errors[1]
    networks = [Column({"value": off}) for off in errors]
    return networks[0], networks[1], Rows({"value": torch.zeros(rows)}), errors.numpy().astype(float)


@pytest.mark.parametrize(("rows", "seed"), [(60, 1), (60, 2), (60, 3), (300, 1), (300, 2), (300, 3), (1000, 1)])
def test_the_error_of_a_logarithm_of_a_mean_is_that_of_the_delta_method(rows: int, seed: int) -> None:
    first, second, data, errors = absolute_errors(rows, seed)
    found = difference([VALUE], (first, second), data, context(), parts=rows)
    means = errors.mean(1)
    assert found.value == pytest.approx(math.log(means[1] + SMOOTH) - math.log(means[0] + SMOOTH), abs=1e-6)
    linear = errors[1] / (means[1] + SMOOTH) - errors[0] / (means[0] + SMOOTH)
    assert found.error == pytest.approx(linear.std(ddof=1) / math.sqrt(rows), rel=0.02)


@pytest.mark.parametrize("seed", others_in_soak([1, 2, 3, 4, 5], 1, 2))
def test_the_error_for_flags_is_that_of_a_bootstrap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(400) < 0.3
    shared, scores = labels * 1.0 + rng.normal(size=400), rng.normal(size=(2, 400))
    logits = shared + np.array([[1.0], [0.3]]) * scores
    networks = [Column({"flag": torch.tensor(row)}) for row in logits]
    data = Rows({"flag": torch.tensor(labels.astype(float))})
    found = difference([FLAG], networks, data, context(), parts=100)

    def of_rows(rows: np.ndarray) -> float:
        one = [
            (math.log(log_loss(labels[rows], 1 / (1 + np.exp(-row[rows]))) + SMOOTH)
             + math.log(1 - roc_auc_score(labels[rows], row[rows]) + SMOOTH)) / 2
            for row in logits
        ]  # fmt: skip
        return one[1] - one[0]

    assert found.value == pytest.approx(of_rows(np.arange(400)), abs=1e-6)
    again = stats.bootstrap(
        (np.arange(400),), lambda rows: of_rows(rows.astype(int)), n_resamples=400, vectorized=False,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    assert found.error == pytest.approx(again.standard_error, rel=0.25)


def test_twenty_parts_estimate_the_same_error() -> None:
    ratios = []
    for seed in range(30):
        *networks, data, _ = absolute_errors(200, seed)
        few, all_of_them = (
            difference([VALUE], networks, data, context(), parts=parts).error for parts in (20, 200)
        )
        ratios.append(few / all_of_them)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)
    assert np.std(ratios) < 0.3  # 0.16 for 19 degrees of freedom


def test_the_difference_to_itself_is_exactly_zero() -> None:
    network, _, data, _ = absolute_errors(50, 1)
    found = difference([VALUE], (network, network), data, context())
    assert (found.value, found.error) == (0.0, 0.0)


def test_the_error_of_a_single_sample_is_infinite() -> None:
    first, second, data, _ = absolute_errors(1, 1)
    assert difference([VALUE], (first, second), data, context()).error == math.inf


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("rows", [7, 45, 260, 5500])
def test_several_workers_have_the_result_of_one(rows: int, workers: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    tasks = [VALUE, FLAG, CLASSES]
    outputs = [
        {
            "value": torch.randn(rows, generator=generator),
            "flag": torch.randn(rows, generator=generator),
            "class": torch.randn(rows, 3, generator=generator),
        }
        for _ in range(2)
    ]
    targets = {
        "value": torch.randn(rows, generator=generator).where(torch.arange(rows) % 5 > 0, torch.nan),
        "flag": torch.randint(2, (rows,), generator=generator).float(),
        "class": torch.randint(-1, 3, (rows,), generator=generator),
    }
    networks = [Column(out) for out in outputs]
    expected = difference(tasks, networks, Rows(targets), context(), batch_size=16)

    def work(worker: object) -> object:
        data = Rows(targets, worker.rank, worker.world_size)
        return difference(tasks, networks, data, worker, batch_size=8)

    for found in in_threads(workers, work):
        assert found.value == pytest.approx(expected.value, abs=1e-9)
        assert found.error == pytest.approx(expected.error, rel=1e-6)
