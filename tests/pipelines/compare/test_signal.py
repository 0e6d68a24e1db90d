"""`dmtg signal`: sizes of effects, conclusions, and how many runs are enough for one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats
from typer.testing import CliRunner

from dmtg_core import Task
from pipelines.cli.app import app
from pipelines.compare.effects import Layout, conclude, enough_runs, spread_interval
from pipelines.compare.signal import analyse, count_partitions, distinct_partitions, signal
from pipelines.compare.significance import Mean, mean_of
from pipelines.compare.verdicts import MATTERS, NOT, UNCLEAR
from pipelines.config.sections import SignalSection
from pipelines.data.manifest import read_manifest, thin_losses
from pipelines.data.statistics import thin_loss
from pipelines.errors import UserError
from pipelines.runs.identity import data_of, earlier_conclusion, earlier_verdict
from pipelines.storage import locate
from tests.pipelines.compare.test_driver import config_of

TASKS = [Task("a", "binary"), Task("b", "binary")]


def result(score: float, of_b: float | None = None) -> dict[str, Any]:
    """A network with these logarithms of the losses of its two tasks."""
    losses = {"a": score, "b": score if of_b is None else of_b}
    return {
        "grouping": {"group_0": ["a"], "group_1": ["b"]},
        "metrics": {"val": {name: {"loss": math.exp(loss)} for name, loss in losses.items()}},
    }


def found(
    grouped: Sequence[Sequence[float]],
    proposed: Sequence[float],
    wide: Sequence[float] = (),
    *,
    worth: float = 1.0,
    left_out: dict[str, str] | None = None,
    of_b: float | None = None,
) -> dict[str, Any]:
    """The analysis of scores (mean logarithms of the losses), with naive MTL at 0."""
    seeds = tuple(range(3, 3 + len(proposed)))
    rows, naive, ours, whole = (
        [[result(score, of_b) for score in row] for row in table]
        for table in (grouped, [[0.0] * len(proposed)], [proposed], [wide])
    )
    section = SignalSection(worth=worth, seeds=seeds)
    return analyse(TASKS, rows, naive[0], ours[0], whole[0], section, left_out=left_out or {}, most=100)


APART = [[-1.0, -1.01, -1.02], [-0.5, -0.51, -0.52], [0.0, 0.01, 0.0]]
SAME = [[-0.5, -0.5001, -0.4999], [-0.4999, -0.5, -0.5001], [-0.5001, -0.4999, -0.5], [-0.5, -0.5, -0.5]]


def test_an_effect_above_what_is_worth_having_matters() -> None:
    gained = [-0.7, -0.71, -0.73]  # random groups: -0.5, -0.5033, -0.5133
    seen = found(APART, gained, [-1.5, -1.51, -1.52])
    random = [np.mean([row[i] for row in APART]) for i in range(3)]
    expected = mean_of([100 * (1 - math.exp(a - b)) for a, b in zip(gained, random, strict=True)])
    assert seen["conclusion"] == MATTERS
    assert seen["proposed_over_random"]["value"] == pytest.approx(expected.value)
    assert seen["proposed_over_random"]["low"] == pytest.approx(expected.low)
    assert seen["enough"] is None
    assert seen["verdict"].startswith(
        "Groups of tasks with a high feature overlap gain +18.8 % (95 % interval +17.1 to +20.5) over random "
        "groups. The standard deviation between random groupings is"
    )
    assert "Grouping matters here: the interval of this gain is above 1 %." in seen["verdict"]
    assert "One wide encoder of the same cost is better than naive MTL (gain +77.9 %)" in seen["verdict"]
    assert "feature overlap are worse than it (gain -1" in seen["verdict"]


def test_groupings_that_differ_matter_also_if_the_proposed_ones_are_not_better() -> None:
    seen = found(APART, [-0.5, -0.52, -0.5])
    assert seen["conclusion"] == MATTERS
    assert "Grouping matters here: the interval of this standard deviation is above 1 %." in seen["verdict"]
    assert seen["between"]["value"] == pytest.approx(100 * (1 - math.exp(-math.sqrt(Layout.of(APART).variance))))
    assert seen["wide"] is seen["proposed_over_wide"] is None


def test_intervals_that_exclude_what_is_worth_having_show_that_grouping_does_not_matter() -> None:
    seen = found(SAME, [-0.5, -0.501, -0.5005])
    assert seen["conclusion"] == NOT
    assert seen["between"]["high"] < 1
    assert "Grouping does not matter here: both intervals exclude an effect of 1 %." in seen["verdict"]
    assert found(SAME, [-0.5, -0.501, -0.5005], worth=0.001)["conclusion"] == UNCLEAR


def test_a_correlation_alone_does_not_matter() -> None:
    # groupings explain nearly all of the variation, and differ by 0.3 % of the loss
    rng = np.random.default_rng(0)
    small = 0.003 * rng.normal(size=(12, 1)) + 0.0003 * rng.normal(size=(12, 3))
    seen = found(small.tolist(), small.mean(0).tolist())
    assert seen["correlation"]["low"] > 0.9
    assert seen["conclusion"] == NOT
    assert 0.2 < seen["between"]["value"] < seen["between"]["high"] < 1


def test_runs_that_cannot_tell_say_how_many_would_be_enough() -> None:
    rng = np.random.default_rng(5)
    noisy = 0.01 * rng.normal(size=(6, 3))
    seen = found(noisy.tolist(), (noisy.mean(0) + 0.02 * rng.normal(size=3)).tolist())
    assert seen["conclusion"] == UNCLEAR
    assert seen["correlation"]["value"] < 0.3
    enough = seen["enough"]
    assert len(enough["seeds"]) > 5
    assert enough["seeds"] == [3, 4, 5, 1, 2, *range(6, len(enough["seeds"]) + 1)]
    assert (
        f"about {len(enough['seeds'])} seeds and {enough['partitions']} partitions would be enough (3 and 6 were "
        "trained)"
    ) in seen["verdict"]
    assert "hardly" not in seen["verdict"]


def test_an_effect_as_large_as_what_is_worth_having_needs_too_many_runs() -> None:
    rows = [[-0.01] * 3, [0.0] * 3, [0.01] * 3]  # a standard deviation of 0.01, thus a gain of 0.995 %
    seen = found(rows, [0.0, 0.001, -0.001], worth=0.995)
    assert (seen["conclusion"], seen["enough"]) == (UNCLEAR, None)
    assert "10 times as many runs would not be enough either." in seen["verdict"]


def test_tasks_with_too_few_labels_are_left_out_and_named() -> None:
    reason = {"b": "3 labelled samples"}
    seen = found(APART, [-0.7, -0.71, -0.73], left_out=reason, of_b=5.0)
    assert seen["conclusion"] == MATTERS
    assert seen["between"] == found(APART, [-0.7, -0.71, -0.73])["between"]
    assert seen["verdict"].endswith("Tasks with too few validation labels are left out: b (3 labelled samples).")
    assert set(seen["by_task"]) == {"a", "b"}
    none = found(APART, [-0.7, -0.71, -0.73], left_out={"a": "no labels", **reason})
    assert (none["conclusion"], none["enough"]) == (UNCLEAR, None)
    assert none["verdict"] == (
        "These runs cannot tell whether grouping matters: the validation labels are too few. a (no labels), "
        "b (3 labelled samples)."
    )


@pytest.mark.parametrize(
    ("kind", "sums", "reason"),
    [
        ("binary", {"classes": [30, 20]}, ""),
        ("binary", {"classes": [31, 19]}, "19 labels outside of its most frequent class"),
        ("multiclass", {"classes": [30, 10, 10]}, ""),  # a rare class does not make the loss meaningless
        ("regression", {"values": 50}, ""),
        ("regression", {"values": 19, "missing": 31}, "19 labelled samples"),
        ("dense_classification", {"classes": [5, 0]}, ""),
    ],
)
def test_a_loss_has_meaning_with_enough_labels_of_more_than_one_class(
    kind: str, sums: dict[str, Any], reason: str
) -> None:
    channels = {"multiclass": 3, "dense_classification": 2}.get(kind, 1)
    assert thin_loss(Task("a", kind, channels), {"rows": 50, "missing": 0, **sums}, 20) == reason


@pytest.mark.parametrize(
    ("spread", "proposed", "conclusion"),
    [
        ((1.1, 5), (-3, 0.5), MATTERS),
        ((0, 5), (1.1, 2), MATTERS),
        ((0, 5), (-0.97, 0.82), UNCLEAR),
        ((0, 0.9), (-0.97, 0.82), NOT),
        ((0, 0.9), (-3, 1.2), UNCLEAR),
        ((0, 0.9), (-30, -20), NOT),
        ((0, math.nan), (0, 0.1), UNCLEAR),
    ],
)
def test_the_conclusion_needs_whole_intervals(
    spread: tuple[float, float], proposed: tuple[float, float], conclusion: str
) -> None:
    one, other = (Mean(sum(ends) / 2, *map(float, ends), 3) for ends in (spread, proposed))
    assert conclude(one, other, 1.0) == conclusion


def test_a_layout_is_that_of_a_two_way_analysis_of_variance() -> None:
    scores = [
        [1.0, 2.0, 6.0],
        [2.0, 3.0, 7.0],
        [6.0, 7.0, 11.0],
    ]  # a row's effect and a seed's effect, and no rest
    exact = Layout.of(scores)
    assert exact.within == pytest.approx(0, abs=1e-12)
    assert exact.variance == pytest.approx(np.var([3, 4, 8], ddof=1))
    mixed = Layout.of([[1.0, 2.0], [2.0, 1.0], [4.0, 6.0]])
    # by hand: grand mean 8/3, rows 1.5, 1.5, 5, seeds 7/3 and 3, residuals ∓1/6, ±5/6, ∓4/6
    assert mixed.among == pytest.approx(2 * ((7 / 6) ** 2 * 2 + (7 / 3) ** 2) / 2)
    assert mixed.within == pytest.approx(2 * (1 + 25 + 16) / 36 / 2)


def test_the_interval_of_a_spread_has_the_limits_of_chi_square_without_residuals() -> None:
    low, high = spread_interval(5, 4, 8.0, 0.0)
    assert low == pytest.approx(math.sqrt(4 * 8 / 4 / stats.chi2.ppf(0.975, 4)))
    assert high == pytest.approx(math.sqrt(4 * 8 / 4 / stats.chi2.ppf(0.025, 4)))
    assert spread_interval(5, 4, 1.0, 1.0)[0] == 0


def test_partitions_that_differ_less_than_seeds_exclude_no_effect() -> None:
    low, high = spread_interval(3, 2, 0.01, 1.0)
    assert (low, high) == spread_interval(3, 2, 1.0, 1.0)
    # by hand: F(2, 2) at 0.025 is 1 / 39, and χ² with 2 degrees of freedom is -2 ln 0.975
    assert high == pytest.approx(math.sqrt(2 * (1 - 1 / 39) / (2 * -2 * math.log(0.975))))


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.03])
def test_the_interval_of_a_spread_contains_the_true_one(spread: float) -> None:
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(400):
        scores = spread * rng.normal(size=(6, 1)) + 0.01 * rng.normal(size=(6, 3)) + 0.05 * rng.normal(size=3)
        found = Layout.of(scores.tolist()).spread()
        inside.append(found.low <= 100 * (1 - math.exp(-spread)) <= found.high)
    assert 0.92 < np.mean(inside) <= 1


@pytest.mark.parametrize(("gain", "spread"), [(4.0, 0.0), (0.0, 0.0), (0.0, 0.04)])
def test_the_runs_that_are_proposed_are_mostly_enough(gain: float, spread: float) -> None:
    rng = np.random.default_rng(7)

    def measured(partitions: int, seeds: int) -> tuple[Layout, list[float]]:
        rows = spread * rng.normal(size=(partitions, 1)) + 0.01 * rng.normal(size=(partitions, seeds))
        return Layout.of(rows.tolist()), (gain + 1.5 * rng.normal(size=seeds)).tolist()

    layout = Layout(6, 3, 0.01**2 + 3 * spread**2, 0.01**2)  # the expected mean squares
    found = enough_runs(layout, [gain - 1.5, gain, gain + 1.5], 1.0, others=3, most=1000)
    assert found is not None
    right = []
    for _ in range(100):
        more, gains = measured(*found)
        right.append(conclude(more.spread(), mean_of(gains), 1.0) == (NOT if not gain and not spread else MATTERS))
    assert np.mean(right) >= 0.4  # by the definition about half


def test_no_more_partitions_are_proposed_than_there_are() -> None:
    layout = Layout(6, 3, 1e-4, 1e-4)
    free = enough_runs(layout, [-0.1, 0.0, 0.1], 1.0, others=3, most=1000)
    bound = enough_runs(layout, [-0.1, 0.0, 0.1], 1.0, others=3, most=6)
    assert free is not None
    assert bound is not None
    assert free[0] > 6 == bound[0]
    assert bound[1] > free[1]
    assert enough_runs(layout, [-100.0, 0.0, 100.0], 1.0, others=3, most=1000) is None


@pytest.mark.parametrize(("tasks", "groups", "count"), [(3, 2, 3), (4, 2, 3), (5, 2, 10), (6, 3, 15), (9, 3, 280)])
def test_partitions_differ_and_are_counted(tasks: int, groups: int, count: int) -> None:
    assert count_partitions(tasks, groups) == count
    names = [str(n) for n in range(tasks)]
    assert len(distinct_partitions(names, groups, min(count, 20) + 1)) == min(count, 21)


def test_a_grouping_signal_resumes_and_is_found_by_a_comparison(tmp_path: Path) -> None:
    config, logged = config_of(tmp_path, train={"epochs": 4}), []
    first = signal(config, logged.append)
    assert first.found["epochs"] == 2
    assert len(first.found["partitions"]) == 3
    assert set(first.found["by_task"]) == {"task_0", "task_1", "task_2", "task_3"}
    assert first.found["conclusion"] in (MATTERS, NOT, UNCLEAR)
    again: list[str] = []
    second = signal(config, again.append)
    assert not [line for line in again if "to train" in line]
    assert second.found["verdict"] == first.found["verdict"]
    data = data_of(first.folder)
    assert earlier_verdict(config, data) == first.found["verdict"]
    assert earlier_conclusion(config, data) == first.found["conclusion"]
    assert earlier_verdict(config_of(tmp_path, train={"epochs": 5}), "") == ""
    assert earlier_conclusion(config_of(tmp_path, train={"epochs": 5}), "") == ""
    # a further seed and another limit train only what is new
    wider = config_of(tmp_path, train={"epochs": 4}, signal={"partitions": 3, "seeds": [1, 2, 3], "worth": 50})
    more: list[str] = []
    assert signal(wider, more.append).found["worth"] == 50
    assert all("_seed3" in line for line in more if "validation score" in line)
    assert earlier_conclusion(config, data) == signal(wider, more.append).found["conclusion"]
    # a file of an earlier version
    (first.folder / "signal.json").write_json({"verdict": "Grouping hardly matters here."})
    assert earlier_verdict(config, data) == "Grouping hardly matters here."
    assert earlier_conclusion(config, data) == UNCLEAR


def test_the_command_shows_effects_first_and_the_next_step(tmp_path: Path) -> None:
    config = config_of(tmp_path, signal={"partitions": 3, "seeds": [1, 2], "worth": 99})
    file = tmp_path / "planted.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", include={*config.model_fields_set})))
    shown = CliRunner().invoke(app, ["signal", "-c", str(file)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.stderr
    first, second = (shown.stdout.index(text) for text in ("Effects on the losses", "Intraclass correlation"))
    assert first < shown.stdout.index("groups by feature overlap over random groups") < second
    assert "worth having from 99 %: 3 random groupings × 2 seeds, 2 epochs" in shown.stdout
    shown = CliRunner().invoke(app, ["signal", "-c", str(file), "--json"])
    values = json.loads(shown.stdout.splitlines()[-1])
    assert values["verdict"] in shown.stdout
    command = {NOT: "dmtg train", MATTERS: "dmtg compare", UNCLEAR: "dmtg signal"}[values["conclusion"]]
    assert command in shown.stderr
    manifest = read_manifest(locate(config.data.shards))
    tasks = manifest.description.tasks
    assert thin_losses(manifest, tasks, 51) == dict.fromkeys(values["by_task"], "50 labelled samples")
    assert thin_losses(manifest, tasks, 1) == {}
    assert set(thin_losses(manifest, tasks, config.data.min_support)) == set(values["left_out"])


def test_a_single_partition_is_refused_before_training(tmp_path: Path) -> None:
    config = config_of(tmp_path, network={"groups": 4})
    with pytest.raises(UserError, match="only one partition of 4 tasks into 4 groups"):
        signal(config, lambda _: None)
