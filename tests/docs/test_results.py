"""The results page is what the comparisons beside it say."""

import json
import re

import pytest

from bench.results import FOLDER, PAGE, TABLES, page, rounded
from dmtg_core import Grouping
from pipelines.compare.results import adjusted_p_values, agreements, stability, verdicts

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def test_the_page_is_made_from_the_files() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_each_file_names_its_command_and_is_small(file) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["command"].splitlines()[-1].startswith("dmtg compare -c ")
    assert len(found["seeds"]) >= 3
    assert {"naive_mtl", "wide", "guided"} <= {row["method"] for row in found["rows"]}
    assert file.stat().st_size < 200_000


def test_the_best_method_on_a_table_has_the_smallest_error() -> None:
    for name, seeds in json.loads(TABLES.read_text(encoding="utf-8")).items():
        methods = set.intersection(*(set(seed["errors"]) for seed in seeds.values()))
        means = {m: sum(seed["errors"][m] for seed in seeds.values()) / len(seeds) for m in methods}
        (line,) = (line for line in page().splitlines() if line.startswith(f"| {name} |"))
        assert f"**{min(means.values()):.3g}**" in line


def test_figures_are_rounded_and_nothing_else_is_changed() -> None:
    assert rounded({"a": [1.23456789, "x", None], "b": 3}) == {"a": [1.2346, "x", None], "b": 3}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_the_verdicts_of_each_file_follow_from_its_figures(file) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    groupings = [
        Grouping.of(groups, found["tasks"])
        for seed in found["per_seed"][found["reference"]].values()
        for groups in seed["groupings"]
    ]
    now, published = (
        "\n".join(sentences)
        for sentences in (
            verdicts(found["rows"], found["reference"], {found["reference"]: groupings}),
            found["verdicts"],
        )
    )
    assert NUMBER.sub("#", now) == NUMBER.sub("#", published)
    # the figures of the file are rounded to five digits before they are rounded again
    assert [float(n) for n in NUMBER.findall(now)] == pytest.approx(
        [float(n) for n in NUMBER.findall(published)], abs=0.101
    )


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_agreements_and_p_values_of_each_file_follow_from_its_groupings_and_differences(file) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    by_seed = {
        method: [[Grouping.of(one, found["tasks"]) for one in seed["groupings"]] for seed in seeds.values()]
        for method, seeds in found["per_seed"].items()
    }
    assert rounded(agreements(by_seed)) == found["agreement"]
    adjusted = adjusted_p_values(found["rows"])
    for row in found["rows"]:
        held = rounded(stability([of_seed[0] for of_seed in by_seed[row["method"]]]))
        assert {key: row[key] for key in held} == held
        if row["method"] in adjusted:
            assert row["p_adjusted"] == pytest.approx(adjusted[row["method"]], rel=0.01)
        else:
            assert row["p_adjusted"] is None
