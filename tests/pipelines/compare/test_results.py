"""Sentences, p-values and agreements of a comparison, from rows and groupings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from dmtg_core import Grouping
from pipelines.compare.page import agreement as shown
from pipelines.compare.page import p_text
from pipelines.compare.results import adjusted_p_values, agreements, stability, verdicts
from pipelines.compare.significance import mean_of

ONE, OTHER = Grouping.of([["a", "b"], ["c", "d"]]), Grouping.of([["a", "c"], ["b", "d"]])
WHOLE = Grouping.of([["a", "b", "c", "d"]])


def row(method: str, *behind: float) -> dict[str, Any]:
    """A method with the gain of the reference minus its own gain, of each seed; the reference gains 9 %."""
    gain = asdict(mean_of([9 - value + wobble for value, wobble in zip(behind, (-1, 0, 1), strict=True)]))
    return {"method": method, "base": method, "gain": gain, "behind": asdict(mean_of(behind))}


ROWS = [row("guided", 0, 0, 0), row("random", 8, 8.1, 8.2), row("wide", 0, 1, -1), row("tag", -3, -3.1, -3.2)]


def test_verdicts_say_better_worse_or_not_significantly_different() -> None:
    logged = verdicts(ROWS, "guided", {"guided": [ONE] * 3})
    assert "gains +9.0 % over naive MTL (95 % interval +6.5 to +11.5, 3 seeds)." in logged[0]
    assert logged[1].startswith("It is better than random groups of the same size: +8.1 points of gain")
    assert logged[2].startswith(
        "It is not significantly different from one wide encoder of the same inference cost: +0.0"
    )
    assert logged[3].startswith("It is worse than the best affinity baseline (tag): -3.1 points of gain")
    assert len(logged) == 5  # and one about the grouping
    assert verdicts(ROWS, "naive_mtl", {}) == []


def test_a_verdict_is_corrected_for_the_number_of_methods_and_its_interval_is_not() -> None:
    # mean 4, standard deviation 1: t = 4 · √3 with 2 degrees of freedom, p = 0.0202
    single = row("wide", 3, 4, 5)
    assert adjusted_p_values([single])["wide"] == pytest.approx(0.02020, abs=1e-5)
    alone, both = (
        verdicts([row("guided", 0, 0, 0), *others], "guided", {"guided": [ONE]})
        for others in ([single], [single, row("random", 0, 1, -1), row("naive_longer", 0, 1, -1)])
    )
    text = "one wide encoder of the same inference cost: +4.0 points of gain, +1.5 to +6.5"
    assert alone[1] == f"It is better than {text}."
    assert both[2] == f"It is not significantly different from {text} (p = 0.061, adjusted for 3 methods)."


def test_methods_without_a_sentence_are_no_tests() -> None:
    rows = [row("wide", 3, 4, 5), row("dmtg", 3, 4, 5), row("truth", 3, 4, 5), row("naive_mtl", 3, 4, 5)]
    assert set(adjusted_p_values(rows)) == {"wide"}
    one_seed = {"method": "wide", "base": "wide", "behind": asdict(mean_of([4.0]))}
    assert adjusted_p_values([one_seed]) == {}
    reference = {"method": "guided", "base": "guided", "gain": asdict(mean_of([5.0]))}
    found = verdicts([reference | {"behind": asdict(mean_of([0.0]))}, one_seed], "guided", {"guided": [ONE]})
    assert found[1] == "One seed gives no comparison with one wide encoder of the same inference cost."


def test_trees_that_are_better_are_the_first_sentence() -> None:
    rows = [row("guided", 0, 0, 0), row("extra_trees", -4.9, -5, -5.1), row("gradient_boosting", 4, -5, 6)]
    found = verdicts(rows, "guided", {"guided": [ONE] * 3})
    assert found[0].startswith(
        "Decision trees are better here: extra trees, one forest for each task, by 5.0 points"
    )
    assert sum("trees are better" in sentence for sentence in found) == 1
    assert any("not significantly different from gradient boosting" in sentence for sentence in found)


INTERVAL = "mean adjusted Rand index 1.00, 95 % interval"
PARTLY = "The grouping is at least partly stable over seeds"
ENCODER = "One encoder for all tasks has the best validation score with"


@pytest.mark.parametrize(
    ("groupings", "sentence"),
    [
        ([ONE] * 10, f"The grouping is stable over seeds ({INTERVAL} 0.82 to 1.00, 10 groupings)."),
        ([ONE] * 5, f"{PARTLY} ({INTERVAL} 0.67 to 1.00, 5 groupings)."),
        (
            [ONE] * 3 + [WHOLE] * 2,
            f"{PARTLY} ({INTERVAL} 0.50 to 1.00, 3 groupings). {ENCODER} 2 of 5 seeds.",
        ),
        ([ONE] * 2, "Two groupings do not show how stable the grouping is (mean adjusted Rand index 1.00)."),
        ([ONE, WHOLE], f"One grouping does not show how stable the grouping is. {ENCODER} 1 of 2 seeds."),
        ([WHOLE] * 4, f"No grouping was kept: {ENCODER.replace('One', 'one', 1)} every seed."),
    ],
)
def test_words_about_stability_need_an_interval(groupings: list[Grouping], sentence: str) -> None:
    assert verdicts(ROWS, "guided", {"guided": groupings})[-1] == sentence


def test_groupings_that_change_with_the_seed_are_not_stable() -> None:
    assert "do not show how stable" in verdicts(ROWS, "guided", {"guided": [ONE, ONE, OTHER]})[-1]
    third = Grouping.of([["a", "d"], ["b", "c"]])
    text = verdicts(ROWS, "guided", {"guided": [ONE, OTHER, third] * 4})[-1]
    assert text.startswith("The grouping is not stable over seeds (mean adjusted Rand index -0.09")
    assert text.endswith("so it says little about which tasks belong together.")
    six = [f"t{n}" for n in range(6)]
    near, apart = (Grouping.from_assignment(six, groups) for groups in ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]))
    assert "is partly stable" in verdicts(ROWS, "guided", {"guided": [near, near, apart] * 12})[-1]


def test_one_encoder_is_a_share_and_no_agreement() -> None:
    found = stability([WHOLE, WHOLE, ONE, OTHER])
    assert found == {"stability": -0.5, "stability_low": None, "stability_high": None, "one_group": 0.5}
    assert shown(found) == "-0.50, one group 50%"
    assert shown(stability([WHOLE] * 3)) == "one group"
    assert shown(stability([ONE] * 5)) == "1.00 (0.67 to 1.00)"
    assert shown(stability([ONE] * 5), short=True) == shown({"stability": 1.0}) == "1.00"  # an earlier version
    assert [p_text(value) for value in (None, 0.00001, 0.04)] == ["–", "< 0.001", "0.040"]


def test_the_diagonal_of_the_matrix_compares_different_seeds() -> None:
    by_seed = {"random": [[ONE, OTHER], [ONE, WHOLE]], "truth": [[ONE], [ONE]], "wide": [[WHOLE], [WHOLE]]}
    found = agreements(by_seed)
    assert found["random"]["random"] == pytest.approx((1 - 0.5) / 2)  # not one with itself, nor two of one seed
    assert found["truth"]["truth"] == 1
    assert found["random"]["truth"] == found["truth"]["random"] == pytest.approx((1 - 0.5 + 1) / 3)
    assert found["wide"] == {"random": None, "truth": None, "wide": None}
    assert agreements({"guided": [[ONE]]}) == {"guided": {"guided": None}}  # one seed
