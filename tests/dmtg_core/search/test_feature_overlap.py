"""Feature overlap of tasks, and clusters of tasks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score

from dmtg_core import (
    ArrayData,
    EncoderSpec,
    Grouping,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    Task,
    TrainSettings,
    fit,
)
from dmtg_core.search.feature_overlap import are_stable, cluster, feature_overlap, measured_after
from tests.dmtg_core.network.test_encoders import LENGTH, SHAPES, VOCABULARY
from tests.dmtg_core.network.test_encoders import encoder as small
from tests.dmtg_core.planted import planted_data
from tests.dmtg_core.samples import (
    DENSE,
    FEATURES,
    IMAGE,
    ONE_OF_EACH,
    SAMPLEWISE,
    arrays,
    data,
    image_spec,
    mlp_spec,
)

READERS = (Task("a", "regression"), Task("b", "regression"), Task("c", "regression", 2))


@pytest.mark.parametrize(
    ("tasks", "groups", "seed"),
    [(9, 3, 0), (9, 3, 1), (30, 5, 0), pytest.param(100, 5, 1, marks=pytest.mark.soak)],
)
def test_a_short_run_of_one_wide_branch_shows_the_planted_groups(tasks: int, groups: int, seed: int) -> None:
    given_input, names, samples, truth = planted_data(seed, tasks=tasks, groups=groups)
    encoder = EncoderSpec("mlp", options={"widths": [64, 32]})
    spec = NetworkSpec(given_input, names, encoder, groups=1, sampling="fixed", seed=seed)
    settings = TrainSettings(epochs=5, learning_rate=0.01, seed=seed, lr_schedule="constant", search_share=1)
    overlap = feature_overlap(fit(GroupingNetwork(spec), samples, settings).network, samples)
    assert torch.allclose(overlap.diagonal(), torch.ones(tasks, dtype=overlap.dtype))
    assert torch.allclose(overlap, overlap.T)
    assert float(overlap.min()) >= 0
    found = Grouping.from_assignment([task.name for task in names], cluster(overlap, groups))
    assert found.adjusted_rand_index(truth) > 0.95


def test_linear_tasks_of_equal_features_overlap_whatever_the_sign() -> None:
    features = InputSpec("features", (2,))
    network = GroupingNetwork(
        NetworkSpec(features, READERS, EncoderSpec("mlp", options={"widths": [2]}), groups=1)
    )
    with torch.no_grad():
        for parameter in network.branches.parameters():  # the identity, in the positive range of ReLU
            parameter.copy_(torch.eye(2) if parameter.dim() == 2 else torch.full((2,), 1e3))
        for task, rows in zip(READERS, ([[1.0, 0.0]], [[-2.0, 0.0]], [[3.0, 0.0], [0.0, 3.0]]), strict=True):
            network.bank.weights[0][network.bank.rows(0, task)] = torch.tensor(rows)
    overlap = feature_overlap(network, data(features, READERS, rows=1000))
    assert overlap[0, 1] == pytest.approx(1)
    assert overlap[0, 2] == overlap[1, 2] == pytest.approx(0.5**0.5, rel=0.05)  # it also reads another feature


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (mlp_spec(groups=1), FEATURES),
        (mlp_spec(groups=1, stem=1), FEATURES),
        (image_spec(groups=1, stem=0), IMAGE),
        (image_spec((*ONE_OF_EACH, DENSE[3]), groups=1), IMAGE),
        (image_spec(SAMPLEWISE, groups=1, encoder="celeba_resnet"), IMAGE),
    ],
)
def test_every_kind_of_task_and_stem_has_an_overlap_and_the_network_does_not_change(
    spec: NetworkSpec, kind: InputSpec
) -> None:
    network = GroupingNetwork(spec).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    samples = data(kind, spec.tasks, rows=40)
    overlap = feature_overlap(network, samples, samples=30)
    assert overlap.shape == (len(spec.tasks), len(spec.tasks))
    assert torch.isfinite(overlap).all()
    assert torch.allclose(overlap.diagonal(), torch.ones(len(spec.tasks), dtype=overlap.dtype))
    assert torch.equal(overlap, feature_overlap(network, samples, samples=30))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["embedding_bag", "text_transformer"])
@pytest.mark.parametrize("stem", [0, 1])
def test_the_overlap_of_a_text_is_over_channels(name: str, stem: int) -> None:
    tokens, tasks = SHAPES["tokens"], SAMPLEWISE[:4]
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (30, LENGTH)).astype(np.int32)
    samples = ArrayData({"val": replace(arrays(FEATURES, tasks, 30), inputs=ids)}, tasks)
    overlap = feature_overlap(GroupingNetwork(NetworkSpec(tokens, tasks, small(name, stem), 1)), samples)
    assert torch.isfinite(overlap).all()
    assert torch.allclose(overlap.diagonal(), torch.ones(4, dtype=overlap.dtype))


def test_a_network_of_several_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="one branch, got 3"):
        feature_overlap(GroupingNetwork(mlp_spec()), data(FEATURES, SAMPLEWISE))


@given(st.integers(2, 12), st.integers(0, 10_000))
def test_clusters_are_those_of_average_linkage(count: int, seed: int) -> None:
    affinity = torch.from_numpy(np.random.default_rng(seed).random((count, count)))
    distance = 1 - ((affinity + affinity.T) / 2).numpy()
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    names = [str(n) for n in range(count)]
    for groups in range(1, count + 1):
        expected = Grouping.from_assignment(names, fcluster(tree, groups, "maxclust") - 1)
        found = cluster(affinity, groups)
        assert found[0] == 0
        assert max(found) == groups - 1
        assert Grouping.from_assignment(names, found).adjusted_rand_index(expected) == pytest.approx(1)


@pytest.mark.parametrize(
    ("affinity", "groups", "what"),
    [
        (torch.zeros(2, 3), 1, "square matrix"),
        (torch.full((2, 2), torch.nan), 1, "finite"),
        (torch.eye(3), 4, "3 tasks can form 1 to 3 groups, got 4"),
        (torch.eye(3), 0, "got 0"),
    ],
)
def test_invalid_affinities_are_refused(affinity: torch.Tensor, groups: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        cluster(affinity, groups)


@pytest.mark.parametrize(
    ("least", "most", "epochs"),
    [
        (1, 1, [1]), (1, 3, [1, 2, 3]), (2, 5, [1, 2, 3, 4, 5]), (3, 9, [1, 3, 5, 7, 9]), (5, 12, [2, 5, 8, 11]),
        (12, 12, [12]), (12, 36, [6, 12, 18, 24, 30, 36]),
    ],
)  # fmt: skip
def test_groups_are_proposed_after_each_half_of_a_rung(least: int, most: int, epochs: list[int]) -> None:
    assert list(measured_after(least, most)) == epochs


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=300), st.integers(0, 30), st.randoms(use_true_random=False)
)
def test_groups_are_stable_if_the_index_of_the_last_two_is_high(before, moved, random) -> None:
    last = list(before)
    for place in random.sample(range(len(last)), min(moved, len(last))):
        last[place] = random.randrange(4)
    assert are_stable([[0] * len(last), before, last]) is bool(adjusted_rand_score(before, last) >= 0.9)
    assert not are_stable([last])
