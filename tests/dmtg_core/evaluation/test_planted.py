"""The planted problem: nine tasks in three true groups, which a search finds from the data alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmtg_core import (
    EncoderSpec,
    Grouping,
    GroupingNetwork,
    LocalContext,
    NetworkSpec,
    SearchOptions,
    TemperatureSchedule,
    TrainSettings,
    evaluate,
    fit,
    normalized_gain,
    search,
    training_flops,
)
from dmtg_core.evaluation.planted import planted
from tests.dmtg_core.planted import planted_data
from tests.soak import others_in_soak

ENCODER = EncoderSpec("mlp", options={"widths": [32, 4]})
NARROW = EncoderSpec("mlp", options={"widths": [16, 4]})


def context() -> LocalContext:
    """A context on the CPU."""
    return LocalContext(device="cpu")


def mean_accuracy(metrics) -> float:
    """Mean over the tasks."""
    return float(np.mean([found["accuracy"] for found in metrics.values()]))


def test_the_problem_is_a_function_of_its_seed_with_balanced_tasks_and_splits_apart():
    _, tasks, splits, truth = planted(5)
    _, _, again, _ = planted(5)
    _, _, other, _ = planted(6)
    assert truth.assignment == [0, 1, 2] * 3
    assert [len(splits[name]) for name in ("train", "val", "test")] == [2000, 1000, 1000]
    for split, arrays in splits.items():
        assert np.array_equal(arrays.inputs, again[split].inputs)
        assert not np.array_equal(arrays.inputs, other[split].inputs)
        for task in tasks:
            assert np.array_equal(arrays.labels[task.name], again[split].labels[task.name])
            assert 0.4 < arrays.labels[task.name].mean() < 0.6
    rows = np.concatenate([arrays.inputs for arrays in splits.values()])
    assert len(np.unique(rows, axis=0)) == 4000
    with pytest.raises(ValueError, match="9 groups need at least 9 tasks and 18 features, got 9 and 16"):
        planted(0, groups=9)


def test_the_true_groups_are_better_than_mixed_groups():
    spec, tasks, data, truth = planted_data(0)
    names = [task.name for task in tasks]
    across = Grouping.from_assignment(names, [n // 3 for n in range(9)])
    settings = TrainSettings(epochs=15, batch_size=128, learning_rate=1e-2)
    accuracy = {}
    for name, grouping in (("true", truth), ("across", across)):
        network = GroupingNetwork(NetworkSpec(spec, tasks, ENCODER, groups=3, seed=0))
        network.keep_grouping(grouping)
        state = fit(network, data, settings, context())
        assert state.network.grouping() == grouping
        accuracy[name] = mean_accuracy(evaluate(state.network, data, "test", context=context()))
    assert accuracy["true"] > accuracy["across"] + 0.03


@pytest.mark.soak
@pytest.mark.parametrize(("data_seed", "seed"), [(0, 0), (3, 100)])
def test_the_start_chosen_on_validation_has_the_true_groups_and_beats_naive_mtl(data_seed, seed):
    """Two runs in which the search finds the groups. In most runs it does not.

    Measured with data seeds 0 to 5, each with the seeds 0 and 100 of network and settings. The mean adjusted Rand
    index of the selected start was 0.52 with four starts (1.0 in these two runs, 0.07 to 0.64 in the others) and
    0.47 with eight (1.0 in one run). Test accuracy was 0.84 to 0.87 in all of them, and 0.68 to 0.75 with naive
    MTL. In four of the runs with eight starts one start had the true groups, but another had a better validation
    score at the end of its search.
    """
    spec, tasks, data, truth = planted_data(data_seed)
    settings = TrainSettings(
        epochs=60,
        search_share=0.5,
        batch_size=128,
        learning_rate=1e-2,
        temperature=TemperatureSchedule("cosine", 2.5, 0.5),
        seed=seed,
    )
    network = NetworkSpec(spec, tasks, ENCODER, groups=3, seed=seed)
    result = search(network, data, settings, SearchOptions("dmtg", starts=4), context=context())
    assert result.grouping.adjusted_rand_index(truth) >= 0.95
    chosen = min(result.candidates, key=lambda start: start["score"])
    assert Grouping.from_dict(chosen["grouping"], truth.tasks) == result.grouping
    assert mean_accuracy(result.metrics["test"]) >= mean_accuracy(result.baseline["test"]) + 0.05
    assert normalized_gain(tasks, result.metrics["test"], result.baseline["test"]) > 20
    assert normalized_gain(tasks, result.metrics["test"], result.baseline["test"], metric="loss") > 20
    models = result.network.specialise()
    inputs = torch.from_numpy(data.splits["test"].inputs)
    right = [
        (probability > 0.5).numpy() == data.splits["test"].labels[name]
        for model in models.values()
        for name, probability in model.predict(inputs).items()
    ]
    assert len(models) == 3
    assert np.mean(right) == pytest.approx(mean_accuracy(result.metrics["test"]))


@pytest.mark.parametrize("epochs", others_in_soak([30, 60], 30))
def test_the_guided_search_finds_the_true_groups_for_less_than_three_runs_of_naive_mtl(epochs):
    """With 60 epochs, one of the seeds of docs/results.md."""
    data_seed = 1
    spec, tasks, data, truth = planted_data(data_seed)
    settings = TrainSettings(epochs=epochs, search_share=0.25, batch_size=128, learning_rate=1e-2, seed=data_seed)
    network = NetworkSpec(spec, tasks, NARROW, groups=3, seed=data_seed)
    result = search(network, data, settings, context=context())
    plain = training_flops(GroupingNetwork(network)) / training_flops(GroupingNetwork(replace(network, groups=1)))
    assert result.grouping == truth
    assert result.chosen == "guided"
    assert result.cost < 3 * plain
    assert mean_accuracy(result.metrics["test"]) > mean_accuracy(result.baseline["test"]) + 0.1
