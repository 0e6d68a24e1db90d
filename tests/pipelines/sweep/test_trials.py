"""Settings, trials, early stops, results and report of a sweep, without a cluster."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dmtg_core import Task
from pipelines.config.loading import Config, load_config
from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError
from pipelines.execution.resources import sweep_cpus, trials_at_once
from pipelines.storage import locate
from pipelines.sweep.events import done_text
from pipelines.sweep.page import verdict, write_page
from pipelines.sweep.plan import Outcome, Plan, outcome_of
from pipelines.sweep.results import best_setting, by_setting, knee_of, notes_of, pareto_front, rows_of, status
from pipelines.sweep.trackers import Trackers
from pipelines.sweep.trials import Setting, Trial, best_config, sweep_name
from tests.pipelines.conftest import make_config

COSINE = {"family": "cosine", "start": 2.5, "end": 0.5}
SWEEP = {
    "groups": [1, 2, 3], "stems": [0, 1], "temperatures": [COSINE, {"family": "constant", "start": 2.5}],
    "gate_learning_rates": [0.01, 0.1], "seeds": [1, 2], "grace_epochs": 1, "reduction": 2,
}  # fmt: skip
TASKS = [Task("colour", "multiclass", 3), Task("bright", "binary")]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path / "raw", tmp_path, sweep=SWEEP)


def plan_of(config: Config) -> Plan:
    return Plan(config, locate(config.run.root) / sweep_name(config))


def trials(config: Config) -> list[Trial]:
    return list(plan_of(config).trials.values())


def settings(config: Config) -> list[Setting]:
    return plan_of(config).settings


def varied(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"sweep": config.sweep.model_copy(update=values)})


def test_all_combinations_are_tried_with_every_seed(config: Config) -> None:
    planned = trials(config)
    assert len(planned) == 2 + 2 * 2 * 2 * 2 * 2
    assert [trial.name for trial in planned[:3]] == [
        "naive_mtl_seed1", "naive_mtl_seed2", "groups2_stem0_cosine2.5-0.5_rate0.01_seed1"
    ]  # fmt: skip
    assert len({str(trial.run) for trial in planned}) == len(planned)
    last = planned[-1].config
    assert (last.network.groups, last.network.stem, last.gate.learning_rate, last.train.seed) == (3, 1, 0.1, 2)
    assert last.gate.temperature.family == "constant"
    assert not any(trial.config.search.baseline or trial.config.track.register_models for trial in planned)


def test_naive_mtl_is_one_branch_from_the_first_epoch_to_the_last(config: Config) -> None:
    search = config.search.model_copy(update={"starts": 3, "group_epochs": 2})
    first, *_, last = trials(config.model_copy(update={"search": search}))
    assert (first.naive, first.config.network.groups, first.config.gate.sampling) == (True, 1, "fixed")
    assert (first.config.search.starts, first.config.search.group_epochs) == (1, 0)
    assert (first.reports, last.reports) == (4, 4 + 2 * 2)


def test_a_trial_with_a_budget_reports_no_more_epochs_than_naive_mtl_would_train_for_it(config: Config) -> None:
    guided = config.search.model_copy(update={"method": "guided", "rung": 0.5})
    naive, *_, last = trials(config.model_copy(update={"search": guided}))
    assert (naive.reports, naive.prelude) == (4, 0)
    assert last.config.network.groups == 3
    assert (last.reports, last.prelude) == (5 * 4 + 1, 3 * 2)  # K + 2 runs; three candidates in the first rung
    given = guided.model_copy(update={"budget": 2.6, "starts": 2})
    last = trials(config.model_copy(update={"search": given}))[-1]
    assert (last.reports, last.prelude) == (12, 4 * 2)
    narrow = config.model_copy(update={"search": guided.model_copy(update={"wide": False})})
    network = config.network.model_copy(update={"branch": "lora", "stem": 1})
    adapters = config.model_copy(update={"search": guided, "network": network})
    for cheap in (narrow, adapters):  # one encoder has up to K = 3 times the epochs of a gate
        assert trials(cheap)[-1].prelude == (3 + 2) * 2


def test_the_same_command_has_the_same_folder_and_other_commands_have_others(config: Config) -> None:
    assert sweep_name(config) == sweep_name(varied(config))
    others = [varied(config, seeds=(1,)), config.model_copy(update={"name": "other"})]
    assert len({sweep_name(one) for one in (config, *others)}) == 3
    ray = config.model_copy(update={"ray": RaySection(workers=7)})
    assert sweep_name(ray) == sweep_name(config)


def test_a_random_search_draws_from_all_combinations_with_every_seed(config: Config) -> None:
    drawn = settings(varied(config, search="random", trials=5))
    assert drawn == settings(varied(config, search="random", trials=5))
    assert len(drawn) == 5
    assert all(setting in settings(config) for setting in drawn)
    assert len(trials(varied(config, search="random", trials=5))) == 2 + 5 * 2
    assert settings(varied(config, search="random", trials=1000)) == settings(config)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"groups": (1,)}, "one group is naive MTL"),
        ({"groups": (2,), "stems": (), "temperatures": (), "gate_learning_rates": (), "seeds": ()}, "nothing to"),
    ],
)
def test_a_sweep_with_nothing_to_compare_is_refused(config: Config, values: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as found:
        trials(varied(config, **values))
    assert found.value.wrong_use
    assert "a key in sweep.space, or to one of sweep.groups, sweep.stems" in found.value.remedy


def test_train_accepts_the_best_configuration(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regroup = config.regroup.model_copy(update={"margin": 3.0})
    config = config.model_copy(update={"regroup": regroup})
    setting = settings(config)[-1]
    file = tmp_path / "best.yaml"
    file.write_text(yaml.safe_dump(best_config(config, setting)))
    monkeypatch.chdir(tmp_path)
    loaded = load_config("best.yaml")
    assert (loaded.network.groups, loaded.network.stem, loaded.gate.learning_rate) == (3, 1, 0.1)
    kept = {"search", "track", "train", "data", "source", "ray", "regroup", "name"}
    assert loaded.model_dump(include=kept) == config.model_dump(include=kept)
    assert loaded.run.root == config.run.root
    assert not loaded.run.name


def test_a_cluster_holds_the_trials_that_its_resources_allow_beside_the_data_tasks() -> None:
    section = RaySection(workers=[2, 8], tune_cpus=0.5, data_cpus=2)
    assert trials_at_once(section, {"CPU": 12}) == 4
    assert trials_at_once(section, {"CPU": 11.9}) == 3
    assert trials_at_once(section.model_copy(update={"trials": 2}), {"CPU": 12}) == 2
    assert trials_at_once(section, {"CPU": 3.5}) == 1  # a single data task does
    gpus = section.model_copy(update={"gpus_per_worker": 1})
    assert trials_at_once(gpus, {"CPU": 96, "GPU": 8}) == 4
    growing = gpus.model_copy(update={"autoscaling": True})
    assert trials_at_once(growing, {"CPU": 96, "GPU": 8}) == 4
    assert trials_at_once(growing, {"CPU": 4}) == 1  # the first one's machines are still to come
    assert trials_at_once(growing.model_copy(update={"trials": 9}), {"CPU": 4}) == 9


@pytest.mark.parametrize("resources", [{"CPU": 3.4, "GPU": 8}, {"CPU": 96, "GPU": 1}])
def test_a_cluster_without_resources_for_a_trial_is_refused_with_the_numbers(resources: dict[str, float]) -> None:
    section = RaySection(workers=2, gpus_per_worker=1)
    with pytest.raises(UserError) as found:
        trials_at_once(section, resources)
    message = f"need 3.5 CPUs and 2 GPUs, it has {resources['CPU']:g} and {resources['GPU']:g}"
    assert message in found.value.what


@pytest.mark.parametrize(("workers", "trials_of_two_cores"), [(1, 2), (2, 1), (4, 1)])
def test_a_local_cluster_has_resources_for_the_trials_that_keep_its_cores_busy(
    monkeypatch: pytest.MonkeyPatch, workers: int, trials_of_two_cores: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    section = RaySection(workers=workers)
    assert trials_at_once(section, {"CPU": math.ceil(sweep_cpus(section))}) == trials_of_two_cores
    capped = section.model_copy(update={"trials": 3})
    assert trials_at_once(capped, {"CPU": math.ceil(sweep_cpus(capped))}) == 3


def tune_trial(name: str) -> Any:
    return SimpleNamespace(trial_id=f"id of {name}", config={"trial": name})


def stopped_after(rule: Any, name: str, scores: list[float]) -> int:
    """The epoch after which a trial is stopped; 0 when it is not."""
    trial = tune_trial(name)
    rule.on_trial_add(None, trial)
    for epoch, score in enumerate(scores, 1):
        if rule.on_trial_result(None, trial, {"epoch": epoch, "val_score": score}) == "STOP":
            return epoch
    rule.on_trial_complete(None, trial, {})
    return 0


def records(scores: list[float]) -> list[dict[str, Any]]:
    return [{"time": float(i), "val_score": score} for i, score in enumerate(scores)]


def test_poor_trials_are_stopped_with_the_reason_in_their_folders(config: Config) -> None:
    from pipelines.sweep.ray_tune import TuneHalving

    plan = plan_of(varied(config, stems=(), temperatures=(), seeds=(1,)))
    planned, rule = plan.trials, TuneHalving(config.sweep, plan)
    good, poor, late, *_ = [name for name, trial in planned.items() if not trial.naive]
    assert stopped_after(rule, "naive_mtl_seed1", [9.0] * 4) == 0
    assert stopped_after(rule, good, [0.0, -1.0, -2.0, -3.0]) == 0
    assert stopped_after(rule, poor, [1.0, 1.0, 1.0, 1.0]) == 1
    assert stopped_after(rule, late, [-1.0, 5.0, 5.0, 5.0]) == 2
    assert status(planned[poor]) == "stopped"
    noted = (planned[poor].run / "stopped.json").read_json()
    assert noted == {"epoch": 1, "val_score": 1.0, "reason": "not among the best 1/2 of the settings at epoch 1"}
    assert {status(planned[name]) for name in (good, "naive_mtl_seed1")} == {"unfinished"}


def test_ray_tune_can_pickle_the_callback(config: Config) -> None:
    from ray import cloudpickle

    from pipelines.sweep.events import TrialEvents
    from pipelines.sweep.ray_tune import TuneEvents

    plan = plan_of(config)
    events = TuneEvents(TrialEvents(plan, Trackers("parent", None, print), print))
    assert set(cloudpickle.loads(cloudpickle.dumps(events)).events.plan.trials) == set(plan.trials)


def test_no_trial_is_stopped_at_the_last_epoch(config: Config) -> None:
    from pipelines.sweep.ray_tune import TuneHalving

    plan = plan_of(varied(config, stems=(), temperatures=()))
    rule = TuneHalving(config.sweep.model_copy(update={"grace_epochs": 9}), plan)
    names = [name for name, trial in plan.trials.items() if not trial.naive]
    assert [stopped_after(rule, name, [float(i)] * 4) for i, name in enumerate(names)] == [0] * len(names)


def test_the_scheduler_counts_trials_of_an_earlier_session(config: Config) -> None:
    from pipelines.sweep.ray_tune import TuneHalving

    plan = plan_of(varied(config, stems=(), temperatures=(), seeds=(1,)))
    first, second, *_ = [name for name, trial in plan.trials.items() if not trial.naive]
    rule = TuneHalving(config.sweep, plan)
    rule.replay({first: records([0.0, -1.0, -2.0, -3.0]), "naive_mtl_seed1": records([-9.0] * 4)})
    assert stopped_after(rule, second, [0.5] * 4) == 1
    fresh = TuneHalving(config.sweep, plan)
    assert stopped_after(fresh, second, [0.5] * 4) == 0


def test_the_seeds_of_a_setting_are_stopped_together_on_both_executors(config: Config) -> None:
    from pipelines.sweep.halving import Halving
    from pipelines.sweep.ray_tune import TuneHalving

    for make in (TuneHalving, lambda section, plan: Halving(section, plan, {})):
        work = config.model_copy(update={"run": config.run.model_copy(update={"name": make.__name__.strip("<>")})})
        plan = plan_of(varied(work, groups=(2, 3, 4), stems=(), temperatures=(), gate_learning_rates=()))
        rule = make(plan.config.sweep, plan)

        def stops(name: str, epoch: int, score: float, rule: Any = rule) -> bool:
            if isinstance(rule, Halving):
                return rule.stops(name, epoch, {"val_score": score})
            return rule.on_trial_result(None, tune_trial(name), {"epoch": epoch, "val_score": score}) == "STOP"

        assert not stops("groups2_seed1", 1, 0.0)
        assert stops("groups3_seed1", 1, 1.0)
        assert stops("groups3_seed2", 1, -9.0)  # the first seed has decided
        assert not stops("groups2_seed2", 1, 9.0)
        reasons = [(plan.trials[f"groups3_seed{i}"].run / "stopped.json").read_json()["reason"] for i in (1, 2)]
        assert reasons[0] == "not among the best 1/2 of the settings at epoch 1"
        assert reasons[1] == f"with seed 1, {reasons[0]}"
        assert plan.is_stopped(plan.trials["groups3_seed2"])
        assert not plan.is_stopped(plan.trials["groups2_seed2"])
        finish(plan.trials["groups4_seed1"], 0.5, 0.8)  # in the last rung that it has reached
        assert not stops("groups4_seed2", 1, 9.0)


def finish(trial: Trial, loss: float, right: float, *, seconds: float = 2.0) -> None:
    """Write the run folder of a finished run. `right` is the accuracy on validation; on test it is lower."""

    def metrics(accuracy: float) -> dict[str, dict[str, float]]:
        return {task.name: {"loss": loss, "accuracy": accuracy} for task in TASKS}

    groups = (
        {"group_0": ["colour"], "group_1": ["bright"]} if not trial.naive else {"group_0": ["colour", "bright"]}
    )
    (trial.run / "metrics.jsonl").write_text(
        "".join(json.dumps({"seconds": seconds / 2, "val_score": 1.0}) + "\n" for _ in "ab")
    )
    (trial.run / "result.json").write_json(
        {"split": "test", "metrics": metrics(right - 0.1), "validation": metrics(right), "grouping": groups,
         "grouping_name": "some", "score": math.log(loss),
         "inference": {"flops": 10**6 * trial.config.network.groups, "parameters": 10**3}}
    )  # fmt: skip


@pytest.fixture
def ended(config: Config) -> list[Trial]:
    """A sweep of three settings and two seeds: one finished both seeds, one a single seed, one failed."""
    planned = trials(varied(config, groups=(2, 3, 4), stems=(), temperatures=(), gate_learning_rates=()))
    by_name = {trial.name: trial for trial in planned}
    for seed, harder in ((1, 1.0), (2, 2.0)):
        finish(by_name[f"naive_mtl_seed{seed}"], 1.0 * harder, 0.6)
        finish(by_name[f"groups2_seed{seed}"], 0.8 * harder, 0.7)
    finish(by_name["groups3_seed1"], 0.1, 0.9)
    (by_name["groups3_seed2"].run / "stopped.json").write_json({"reason": "poor", "epoch": 2, "val_score": 0.4})
    (by_name["groups4_seed1"].run / "failed.json").write_json({"reason": "memory ran out"})
    (by_name["groups4_seed2"].run / "failed.json").write_json({"reason": "memory ran out"})
    return planned


def test_the_gain_of_a_trial_is_over_naive_mtl_of_its_seed(ended: list[Trial]) -> None:
    rows = {row["trial"]: row for row in rows_of(ended, TASKS)}
    assert [row["status"] for row in rows.values()] == [
        "finished", "finished", "finished", "finished", "finished", "stopped", "failed", "failed"
    ]  # fmt: skip
    assert rows["groups2_seed2"]["gain_validation"] == pytest.approx(25)  # an error of .3 for one of .4
    assert rows["groups2_seed2"]["gain"] == pytest.approx(20)
    assert rows["groups2_seed1"]["score_to_naive"] == pytest.approx(math.log(0.8))
    assert rows["naive_mtl_seed1"]["gain"] == 0
    assert rows["groups3_seed2"]["reason"] == "poor"
    assert rows["groups3_seed2"]["gain"] is None
    assert (rows["groups2_seed1"]["epochs"], rows["groups2_seed1"]["seconds"]) == (2, 2.0)


def test_a_setting_that_finished_one_seed_does_not_beat_one_that_finished_all(ended: list[Trial]) -> None:
    rows = rows_of(ended, TASKS)
    found = by_setting(rows)
    best = best_setting(found)
    assert best is not None
    assert (best["label"], best["finished"], best["seeds"]) == ("groups2", 2, 2)
    assert best["score_to_naive"] == pytest.approx(math.log(0.8))
    assert [row["label"] for row in pareto_front(found)] == ["naive_mtl", "groups2", "groups3"]
    notes = notes_of(rows, best)
    assert "groups4_seed1 failed: memory ran out" in notes
    assert "1 of 8 trials were stopped early and have no gain" in notes


def test_a_search_is_told_means_of_finished_settings_and_last_scores_of_stopped_ones(ended: list[Trial]) -> None:
    def told(name: str) -> Outcome:
        return outcome_of([trial for trial in ended if trial.label == name])

    assert told("groups2").score == pytest.approx((math.log(0.8) + math.log(1.6)) / 2)
    assert told("groups2").epoch is None
    assert told("groups3") == Outcome(0.4, 2)
    assert told("groups4") == Outcome(None)


def test_progress_does_not_count_past_its_end(config: Config) -> None:
    fixed = trials(config)[-1]
    assert (fixed.budget, fixed.reports) == (None, 4)
    assert done_text(fixed, 3, {"spent": 2.0}) == "epoch 3 of at most 4"
    assert done_text(fixed, 5, {"spent": 2.0}) == "epoch 5 of at most 5"
    guided = config.search.model_copy(update={"method": "guided", "budget": 3.0})
    trial = trials(config.model_copy(update={"search": guided}))[-1]
    assert done_text(trial, 36, {"spent": 2.96}) == "epoch 36, 3.0 of at most 3 runs of naive MTL"
    assert done_text(trial, 1, {"spent": 3.4}) == "epoch 1, 3.0 of at most 3 runs of naive MTL"


def test_of_equal_settings_the_cheaper_one_is_best(ended: list[Trial]) -> None:
    for trial in ended:
        if not trial.naive:
            finish(trial, 0.5, 0.8)
    found = by_setting(rows_of(ended, TASKS))
    best = best_setting(found)
    assert best is not None
    assert best["label"] == "groups2"
    assert [row["label"] for row in pareto_front(found)] == ["naive_mtl", "groups2"]


def test_the_knee_is_where_further_cost_gains_little() -> None:
    def front(*points: tuple[int, float]) -> list[dict[str, Any]]:
        return [{"label": str(flops), "flops": flops, "gain_validation": gain} for flops, gain in points]

    found = knee_of(front((1, 0.0), (2, 8.0), (3, 9.0), (4, 10.0)))
    assert found is not None
    assert found["label"] == "2"
    assert knee_of(front((1, 0.0), (2, 1.0), (3, 9.0))) is None  # the last step gains most
    assert knee_of(front((1, 0.0), (2, 8.0))) is None


def test_without_naive_mtl_there_is_no_best_setting(ended: list[Trial]) -> None:
    for trial in ended:
        if trial.naive:
            (trial.run / "result.json").delete()
    assert best_setting(by_setting(rows_of(ended, TASKS))) is None


def test_page_needs_no_network_and_shows_front_best_setting_and_failures(
    ended: list[Trial], config: Config, tmp_path: Path
) -> None:
    rows = rows_of(ended, TASKS)
    found = by_setting(rows)
    best = best_setting(found)
    content = {
        "name": "s", "rule": "the rule", "rows": rows, "settings": found, "best": best, "split": "test",
        "pareto": pareto_front(found), "knee": "groups2", "notes": notes_of(rows, best),
        "keys": ["network.groups"],
    }  # fmt: skip
    write_page(locate(str(tmp_path / "sweep.html")), content, config)
    page = (tmp_path / "sweep.html").read_text()
    assert not re.findall(r"(?:src|href)=\"http", page)
    assert len(re.findall(r'<svg role="img" aria-label="[^"]+"', page)) == 2
    assert "The front, cheapest first: naive_mtl +0.0 % at 1 million; groups2 +25.0 % at 2 million" in page
    assert "groups2 (best, knee)" in page
    assert page.index("<figure>") < page.index("the rule")
    hovers = re.findall(r"<title>(groups2: [^<]+)</title>", page)
    assert hovers == ["groups2: gain +25.0 %, 2 million operations per sample"] * 2  # a point and a line
    assert "groups3 (front, only 1 of 2 seeds)" in page
    assert "failed: memory ran out" in page
    assert "Its gain over naive MTL on validation is +25.0 % (mean of 2 seeds)" in verdict(content)
    assert "prefers-color-scheme: dark" in page
