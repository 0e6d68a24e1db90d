"""Every page in Chromium: desktop, phone and print, light and dark, mouse and keyboard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines.compare.page import write_page as write_comparison
from pipelines.config.loading import Config
from pipelines.nightly import page as regroup
from pipelines.report.figures import THICK
from pipelines.report.run import page, plotted_gate
from pipelines.runs.files import DETAILS, GROUPING, RESULT
from pipelines.storage import locate
from pipelines.sweep.page import write_page as write_sweep
from pipelines.training.diagnostics import details_of
from tests.pipelines.browser import DESKTOP, PHONE, chromium, opened
from tests.pipelines.training.test_diagnostics import searched
from tests.soak import others_in_soak

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from pipelines.training.driver import Trained

PAGES = ("run", "dense", "wide", "naive", "groups", "old", "comparison", "budgets", "sweep", "night")
MOST = [
    name for name in PAGES if name not in ("naive", "groups", "old")
]  # those are like "run", with less or more text
TASKS = ["a_task_with_a_long_name", "b", "c", 'd"><script>alert(1)</script>']
DOLLARS = "$$level_US$$"  # a formula for some libraries
GROUPS = {"group_0": TASKS[:2], "group_1": TASKS[2:]}


@pytest.fixture(scope="module")
def pages(run: tuple[Config, Trained, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each kind of page: a real run, and changed copies of it."""
    config, done, _ = run
    root = tmp_path_factory.mktemp("pages")
    files = {name: root / f"{name}.html" for name in PAGES}
    files["run"].write_text(page(done.run))
    files["dense"].write_text(page(locate(str(dense(Path(done.run.local), root / "dense")))))
    files["wide"].write_text(page(locate(str(wide(Path(done.run.local), root / "wide")))))
    files["naive"].write_text(page(locate(str(naive(Path(done.run.local), root / "naive")))))
    files["groups"].write_text(page(locate(str(other_weights(Path(done.run.local), root / "groups")))))
    files["old"].write_text(page(locate(str(old(Path(done.run.local), root / "old")))))
    write_comparison(locate(str(files["comparison"])), comparison(4), config)
    write_comparison(locate(str(files["budgets"])), comparison(4, 8, 16), config)
    write_sweep(locate(str(files["sweep"])), sweep(), config)
    files["night"].write_text(regroup.page(night()))
    return files


def dense(run: Path, copy: Path) -> Path:
    """The run with samples of dense tasks in place of its own samples."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "models"))
    result, reader, spec = searched(copy)
    found = details_of(result, reader, spec, samples=1, batch_size=8, seed=1)
    (copy / DETAILS).write_text(
        json.dumps(json.loads((copy / DETAILS).read_text()) | {"samples": found["samples"]})
    )
    return copy


def wide(run: Path, copy: Path) -> Path:
    """The run as if one wide encoder had been best; with a feature overlap, and a task with dollar signs."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "models"))
    result = json.loads((copy / RESULT).read_text())
    tasks = list(result["metrics"])
    other = {"stage": "wide", "grouping": {"group_0": tasks}, "score": -9.0, "final": -9.0,
             "probabilities": [[1.0]] * len(tasks)}  # fmt: skip
    result |= {"chosen": "wide", "grouping": {"group_0": tasks}, "candidates": [*result["candidates"], other]}
    result["affinity"] = [[1.0 if a == b else 0.25 for b in tasks] for a in tasks]
    for file, text in ((RESULT, json.dumps(result)), (DETAILS, (copy / DETAILS).read_text())):
        (copy / file).write_text(text.replace('"level"', f'"{DOLLARS}"'))
    return copy


def naive(run: Path, copy: Path) -> Path:
    """The run as if naive MTL had been best."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "models"))
    result = json.loads((copy / RESULT).read_text())
    result |= {"chosen": "naive_mtl", "grouping": {"group_0": list(result["metrics"])}}
    result |= {"metrics": result["baseline"], "normalized_gain": 0.0, "inference": {"flops": 10, "parameters": 1}}
    result["groups_inference"] = {"flops": 25, "parameters": 2}
    (copy / RESULT).write_text(json.dumps(result))
    (copy / DETAILS).write_text(json.dumps(json.loads((copy / DETAILS).read_text()) | {"intervals": None}))
    return copy


def other_weights(run: Path, copy: Path) -> Path:
    """The run as if a further network with its groups had been best."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "models"))
    result = json.loads((copy / RESULT).read_text())
    (first,) = (one for one in result["candidates"] if one["stage"] == "start_0")
    result |= {"chosen": "groups_1", "candidates": [first | {"final": -8.0}, first | {"stage": "groups_1"}]}
    if len(first["grouping"]) > 1:
        result["grouping"] = first["grouping"]
    (copy / RESULT).write_text(json.dumps(result))
    return copy


def old(run: Path, copy: Path) -> Path:
    """The run as an old version wrote it, without candidates and details."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "models", DETAILS))
    result = json.loads((copy / RESULT).read_text())
    kept = ("grouping", "grouping_name", "split", "metrics", "baseline", "normalized_gain", "headline", "notes")
    (copy / RESULT).write_text(json.dumps({key: result[key] for key in kept}))
    return copy


def mean(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 2, "high": value + 2}


def comparison(*budgets: float) -> dict[str, Any]:
    fixed = {("naive_mtl", None): 0.0, ("single_task", None): -4.0, ("extra_trees", None): 2.0}
    spending = {(name, b): gain + b / 4 for name, gain in (("wide", 2.0), ("guided", 6.0)) for b in budgets}
    mark = "@{:g}" if len(budgets) > 1 else ""
    rows = [
        {"method": name + mark.format(b) if b else name, "base": name, "budget": b, "gain": mean(gain),
         "errors": {task: mean(20 - gain) for task in TASKS}, "gain_loss": mean(gain), "behind": mean(6 - gain),
         "stability": 1.0, "p_adjusted": 0.03, "cost": 0.9 * b if b else float(name != "extra_trees"),
         "flops": 10**6, "parameters": 10**4}
        for (name, b), gain in {**fixed, **spending}.items()
    ]  # fmt: skip
    names = [row["method"] for row in rows]
    same = [[float(any({a, b} <= set(held) for held in GROUPS.values())) for b in TASKS] for a in TASKS]
    return {
        "name": "c", "split": "test", "seeds": [1, 2], "tasks": TASKS, "reference": names[-1], "rows": rows,
        "headline": dict.fromkeys(TASKS, "accuracy"), "agreement": {a: dict.fromkeys(names, 1.0) for a in names},
        "budgets": budgets, "fronts": [{"budget": b, "methods": ["guided", "wide"]} for b in budgets],
        "together": same, "verdicts": ["It gains."], "confidence": {}, "notes": [], "signal": "",
    }  # fmt: skip


def sweep() -> dict[str, Any]:
    rows = [
        {"label": label, "naive": k == 1, "setting": {"network.groups": k}, "flops": 10**6 * k,
         "parameters": 10**4, "gain_validation": gain, "gain": gain, "val_score": -1.0, "finished": 2,
         "seeds": 2, "seconds": 9.0, "groups": [k]}
        for k, (label, gain) in enumerate([("naive_mtl", 0.0), ("groups2", 8.0), ("groups3", 9.0)], 1)
    ]  # fmt: skip
    trial = {"trial": "groups2_seed1", "status": "stopped", "reason": "not among the best", "epochs": 3,
             "val_score": -1.0, "gain_validation": None, "gain": None, "grouping_name": "g2"}  # fmt: skip
    return {"name": "s", "rule": "the rule", "rows": [trial], "settings": rows, "best": rows[2], "split": "test",
            "pareto": rows, "knee": "groups2", "notes": ["a note"], "keys": ["network.groups"]}  # fmt: skip


def night() -> dict[str, Any]:
    scores = {task: {"accuracy": 0.8} for task in TASKS}
    compared = {"gain": mean(5.0), "by_task": {task: mean(4.0) for task in TASKS}, "champion": scores,
                "challenger": scores, "headline": dict.fromkeys(TASKS, "accuracy"), "samples": 90,
                "likely": 0.99}  # fmt: skip
    drift = {"before": {"group_0": TASKS}, "adjusted_rand_index": 0.0, "moved": TASKS[2:], "new_tasks": []}
    return {"name": "n", "night": "2026-01-02", "champion": "models:/n/1", "challenger": "models:/n/2",
            "verdict": "promoted", "reason": "it is better", "comparison": compared, "grouping": GROUPS,
            "grouping_drift": drift, "split": "test", "evaluation": "shards", "shards": "shards", "run_dir": "run",
            "data_drift": [], "notes": []}  # fmt: skip


@pytest.fixture(scope="module")
def browser(pages: dict[str, Path]) -> Iterator[Browser]:
    """A browser, started last: its driver keeps an event loop in this thread."""
    with chromium() as found:
        yield found


@pytest.mark.parametrize("name", others_in_soak(PAGES, *MOST))
def test_page_has_its_plots_and_no_errors_or_requests(pages: dict[str, Path], browser: Browser, name: str) -> None:
    with opened(browser, pages[name]) as found:
        drawn = found.page.locator("svg[role=img]")
        assert drawn.count() >= 2
        assert all(shown["height"] > 40 for shown in [one.bounding_box() or {} for one in drawn.all()])
        assert all((one.get_attribute("aria-label") or "").strip() for one in drawn.all())
        assert all((one.get_attribute("alt") or "").strip() for one in found.page.locator("img").all())
        assert found.page.locator("th:not([scope])").count() == 0
        assert steps(found.page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => +h.tagName[1])"))
        assert found.complaints == []
        assert found.requests == []


def test_the_groups_of_a_further_network_are_plotted_with_the_gate_that_found_them(pages: dict[str, Path]) -> None:
    text = pages["groups"].read_text()
    assert "The groups were then trained with other initial weights." in text
    assert "the groups of the best candidate, with other initial weights" in text
    assert 'id="moving-figure"' in text
    assert "with other initial weights" not in pages["run"].read_text()


def test_naive_mtl_as_the_result_is_said_first_and_has_no_gain_over_itself(pages: dict[str, Path]) -> None:
    text = pages["naive"].read_text()
    assert '<p class="verdict">No grouping helps here: one encoder, 2.5 times cheaper at inference.</p>' in text
    assert "All tasks share one wide encoder" not in text
    assert "Gain on" not in text
    assert "The best candidate with a gate" in text


def steps(levels: list[int]) -> bool:
    """Whether the first heading has level 1 and no heading skips a level."""
    return levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("name", others_in_soak(PAGES, *MOST))
def test_only_scrolling_parts_are_wider_than_a_phone(pages: dict[str, Path], browser: Browser, name: str) -> None:
    with opened(browser, pages[name], width=PHONE) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= PHONE
        outside = """[...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, figure, pre")
            && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 99))"""
        assert found.page.evaluate(outside) == []


def widths(page: Any) -> list[float]:
    found: list[float] = page.evaluate("Bokeh.documents[0].get_model_by_name('lines').data.width")
    return found


def test_the_slider_moves_the_gate_through_its_epochs(
    pages: dict[str, Path], browser: Browser, run: tuple[Config, Trained, list[str]]
) -> None:
    done = run[1].run
    records = [json.loads(line) for line in (done / "gate.jsonl").read_text().splitlines()]
    stage = plotted_gate((done / RESULT).read_json())
    epochs = [record["probabilities"] for record in records if record["stage"] == stage]
    with opened(browser, pages["run"]) as found:
        figure, slider = found.page.locator("#moving-figure"), found.page.locator("#moving-epoch")
        last = figure.screenshot()
        slider.focus()
        found.page.keyboard.press("Home")
        assert found.page.locator("#moving-text").inner_text().startswith(f"Epoch 1 of {len(epochs)}")
        assert sorted(widths(found.page)) == pytest.approx(
            sorted(THICK * p for row in epochs[0] for p in row), abs=0.01
        )
        assert figure.screenshot() != last
        for _ in epochs[1:]:
            found.page.keyboard.press("ArrowRight")
        assert slider.input_value() == str(len(epochs))
        assert slider.get_attribute("aria-valuetext") == found.page.locator("#moving-text").inner_text()
        assert sorted(widths(found.page)) == pytest.approx(
            sorted(THICK * p for row in epochs[-1] for p in row), abs=0.01
        )
        assert figure.screenshot() == last


def test_the_name_of_a_task_is_not_a_formula(pages: dict[str, Path], browser: Browser) -> None:
    marks = "Bokeh.documents[0].get_model_by_name('tasks').major_label_overrides.values()"
    with opened(browser, pages["wide"]) as found:
        assert DOLLARS in found.page.evaluate(f"[...{marks}].map(mark => mark.text)")
        assert found.page.locator("svg text").get_by_text(DOLLARS, exact=True).count() >= 3


def test_the_animation_plays_from_the_first_epoch_to_the_last(pages: dict[str, Path], browser: Browser) -> None:
    with opened(browser, pages["run"]) as found:
        found.page.clock.install(time=0)
        found.page.clock.pause_at(1000)
        found.page.locator("#moving-play").click()
        assert found.page.locator("#moving-play").inner_text() == "Stop"
        assert found.page.locator("#moving-epoch").input_value() == "1"
        found.page.clock.run_for(60_000)
        slider = found.page.locator("#moving-epoch")
        assert slider.input_value() == slider.get_attribute("max")
        assert found.page.locator("#moving-play").inner_text() == "Play"


def test_dark_and_light_are_readable_and_follow_the_preference(pages: dict[str, Path], browser: Browser) -> None:
    label = "Bokeh.documents[0].get_model_by_name('tasks').major_label_text_color"
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, pages["run"], color_scheme="light") as found:
        light = found.page.evaluate(label), found.page.evaluate(ground)
        found.page.emulate_media(color_scheme="dark")
        found.page.wait_for_function(f"{label} !== '{light[0]}'")
        dark = found.page.evaluate(label), found.page.evaluate(ground)
        fill = found.page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
    assert brightness(light[0]) < brightness(light[1]) - 150
    assert brightness(dark[0]) > brightness(dark[1]) + 150
    assert fill == dark[0]


def brightness(colour: str) -> float:
    return sum(int(part) for part in colour.strip("rgb()").split(",")) / 3


def test_the_static_plot_is_shown_without_scripts_and_in_print(pages: dict[str, Path], browser: Browser) -> None:
    still = "section[aria-labelledby=gate] figure svg"
    with opened(browser, pages["run"], java_script_enabled=False) as found:
        assert not found.page.locator("#moving").is_visible()
        assert found.page.locator(still).is_visible()
    with opened(browser, pages["run"], width=DESKTOP) as found:
        found.page.emulate_media(media="print", color_scheme="dark")
        assert not found.page.locator("#moving").is_visible()
        assert found.page.locator(still).is_visible()
        assert brightness(found.page.evaluate("getComputedStyle(document.body).backgroundColor")) == 255
        assert brightness(found.page.locator(".verdict").evaluate("e => getComputedStyle(e).color")) == 0


def test_sections_without_results_of_an_older_run_are_left_out(pages: dict[str, Path]) -> None:
    now, then = pages["run"].read_text(), pages["old"].read_text()
    for section in ("cost", "samples", "data"):
        assert f'<h2 id="{section}">' in now
        assert f'<h2 id="{section}">' not in then
    for section in ("grouping", "tasks", "gate", "learning", "run"):
        assert f'<h2 id="{section}">' in then
    assert GROUPING in {file.name for file in pages["old"].with_suffix("").iterdir()}
