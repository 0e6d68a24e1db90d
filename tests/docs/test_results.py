"""The results page is what the comparisons beside it say."""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from xml.parsers import expat

import pytest

from bench.results import FOLDER, OTHERS, PAGE, TABLES, TEXTS, budgets, chart, page, rounded, section
from dmtg_core import Grouping
from pipelines.compare.budgets import rows_within
from pipelines.compare.results import adjusted_p_values, agreements, stability, verdicts
from tests.paths import ROOT

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
FILES = sorted(FOLDER.glob("*.json"))
COMMANDS = ("dmtg compare -c ", "python -m bench.planted_problems ")
ABLATIONS = {"parts": "undistilled", "gate": "no_gate"}  # variants of the search alone: name after "_" → a variant


def test_the_page_is_made_from_the_files() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_introduction_names_the_version_of_the_search_of_each_comparison() -> None:
    lines = (TEXTS / "introduction.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])) == sorted(
        file.stem for file in FILES
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_file_names_its_command_and_is_small(file) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["command"].splitlines()[-1].startswith(COMMANDS)
    assert len(found["seeds"]) >= 3
    compared = {"naive_mtl", "guided", ABLATIONS.get(file.stem.rpartition("_")[2], "wide")}
    assert compared <= {row["base"] for row in found["rows"]}
    assert file.stat().st_size < 200_000


def test_the_best_method_on_a_table_has_the_smallest_error() -> None:
    for name, seeds in json.loads(TABLES.read_text(encoding="utf-8")).items():
        methods = set.intersection(*(set(seed["errors"]) for seed in seeds.values()))
        means = {m: sum(seed["errors"][m] for seed in seeds.values()) / len(seeds) for m in methods}
        (line,) = (line for line in page().splitlines() if line.startswith(f"| {name} |"))
        assert f"**{min(means.values()):.3g}**" in line


def test_the_lines_of_the_budgets_follow_from_the_gains_of_the_seeds() -> None:
    lines = [line.strip("| ").split(" | ") for line in budgets().splitlines() if line.startswith("| ")]
    expected, to_each = [], defaultdict(list)
    for file in FILES:
        found = json.loads(file.read_text(encoding="utf-8"))
        if file.stem.rpartition("_")[2] in ABLATIONS:
            continue
        for budget in found["budgets"]:
            rows = [row for row in found["rows"] if (row["budget"] or row["cost"]) <= budget]
            gains = {
                row["base"]: mean(seed["gain"] for seed in found["per_seed"][row["method"]].values())
                for row in rows if row["budget"] in (None, budget)
            }  # fmt: skip
            best = max(OTHERS & set(gains), key=gains.__getitem__)
            expected.append([f"[{file.stem}](#{file.stem})", best, gains["guided"], gains[best]])
            for name in OTHERS & set(gains):
                to_each[name].append(gains["guided"] - gains[name])
    shown = sorted((line for line in lines if line[0].startswith("[")), key=lambda line: line[0])
    for line, (name, best, ours, theirs) in zip(shown, sorted(expected, key=lambda line: line[0]), strict=True):
        assert [line[0], line[5]] == [name, best]
        assert [float(line[4].split()[0]), float(line[6].split()[0])] == pytest.approx([ours, theirs], abs=0.06)
    methods = {line[0]: line[1:] for line in lines if line[0] in OTHERS}
    assert methods.keys() == to_each.keys()
    for name, differences in to_each.items():
        assert methods[name][0] == str(len(differences))
        means = [mean(differences), min(differences), max(differences)]
        assert list(map(float, methods[name][1:])) == pytest.approx(means, abs=0.06)


def test_figures_are_rounded_and_nothing_else_is_changed() -> None:
    assert rounded({"a": [1.23456789, "x", None], "b": 3}) == {"a": [1.2346, "x", None], "b": 3}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_verdicts_of_each_file_follow_from_its_figures(file) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    groupings = [
        Grouping.of(groups, found["tasks"])
        for seed in found["per_seed"][found["reference"]].values()
        for groups in seed["groupings"]
    ]
    rows = rows_within(found["rows"], max(found["budgets"]), at_most=False)
    sentences = verdicts(rows, found["reference"], {found["reference"]: groupings})
    of_budgets = [text for text in found["verdicts"] if text.startswith("With ")]
    now = "\n".join(sentences)
    published = "\n".join(text for text in found["verdicts"] if text not in of_budgets)
    assert NUMBER.sub("#", now) == NUMBER.sub("#", published)
    # the figures of the file are rounded to five digits before they are rounded again
    assert [float(n) for n in NUMBER.findall(now)] == pytest.approx(
        [float(n) for n in NUMBER.findall(published)], abs=0.101
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_agreements_of_each_file_follow_from_its_groupings(file) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    by_seed = {
        method: [[Grouping.of(one, found["tasks"]) for one in seed["groupings"]] for seed in seeds.values()]
        for method, seeds in found["per_seed"].items()
    }
    assert rounded(agreements(by_seed)) == found["agreement"]
    for row in found["rows"]:
        held = rounded(stability([of_seed[0] for of_seed in by_seed[row["method"]]]))
        assert {key: row[key] for key in held} == held


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_p_values_of_each_file_follow_from_its_differences(file) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    for budget in found["budgets"]:
        rows = [row for row in found["rows"] if (row["budget"] or max(found["budgets"])) == budget]
        adjusted = adjusted_p_values(rows)
        for row in rows:
            expected = adjusted.get(row["method"])
            assert row["p_adjusted"] == (None if expected is None else pytest.approx(expected, rel=0.01))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_comparisons_with_several_budgets_have_a_picture(file) -> None:
    drawn = chart(json.loads(file.read_text(encoding="utf-8")))
    picture = file.with_suffix(".svg")
    assert (picture.read_text(encoding="utf-8") if picture.exists() else "") == drawn


def comparison(folder: Path, *budgets: float) -> Path:
    """The file of a comparison with some budgets."""

    def mean(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 1, "high": value + 1}

    marks = {f"@{b:g}" if len(budgets) > 1 else "": b for b in budgets}
    names: dict[str, tuple[str, float | None]] = {"naive_mtl": ("naive_mtl", None)}
    names |= {f"{base}{mark}": (base, b) for base in ("wide", "guided", "truth") for mark, b in marks.items()}
    rows = [
        {"method": name, "gain": mean(n), "gain_loss": mean(n), "behind": mean(-n), "cost": 1.0 + n,
         "stability": 1.0, "base": base, "budget": b}
        for n, (name, (base, b)) in enumerate(names.items())
    ]  # fmt: skip
    seed = {"groupings": [[["a"], ["b"]]], "chosen": ["guided"]}
    found = {"command": "dmtg compare -c x", "tasks": ["a", "b"], "groups": 2, "seeds": [1, 2, 3], "rows": rows,
             "reference": next(name for name in reversed(names) if name.startswith("guided")), "verdicts": ["V."],
             "per_seed": {name: {"1": seed} for name in names},
             "agreement": {name: dict.fromkeys(names, 0.5) for name in names}, "budgets": budgets}  # fmt: skip
    file = folder / "some.json"
    file.write_text(json.dumps(found))
    return file


@pytest.mark.parametrize(("budgets", "suffix"), [((4,), ""), ((4, 8), "@8")])
def test_a_section_has_the_rows_of_every_budget(tmp_path: Path, budgets: tuple[float, ...], suffix: str) -> None:
    file = comparison(tmp_path, *budgets)
    text, drawn = section(file), chart(json.loads(file.read_text()))
    assert f"| wide{suffix} |" in text
    assert "- Candidate with the best validation score, number of seeds: guided 1." in text
    assert "- Agreement with the true groups: 0.500 (guided)." in text
    assert ("![Gain against training cost](results/some.svg)" in text) == (len(budgets) > 1) == bool(drawn)
    if drawn:
        expat.ParserCreate().Parse(drawn, True)  # a file of its own is XML
        assert drawn.startswith('<svg style="background: white')
        assert "wide +1.0 ± 1.0 % at 2.0, +2.0 ± 1.0 % at 3.0" in drawn


def test_the_figures_of_the_demo_in_the_readme_are_those_of_its_seeds() -> None:
    found = json.loads((FOLDER / "hall.json").read_text(encoding="utf-8"))
    seeds = found["per_seed"]["guided"]
    gains = [seed["gain"] for seed in seeds.values()]
    (true,) = {str(seed["groupings"]) for seed in found["per_seed"]["truth"].values()}
    exact = sum(str(seed["groupings"]) == true for seed in seeds.values())
    wide = next(row for row in found["rows"] if row["method"] == "wide")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"with {len(gains)} other seeds of this demo it is {min(gains):+.0f} % to {max(gains):+.0f} %" in text
    assert f"the groups are those of the machines with {exact} of them" in text
    assert f"it is {wide['behind']['value']:.0f} points more than that of one wide encoder" in text
