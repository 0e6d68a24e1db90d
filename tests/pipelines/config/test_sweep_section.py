"""The section `sweep`: ranges as text, lists, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config.loading import load_config
from pipelines.config.sweep_section import SweepSection
from pipelines.config.validation import checked
from pipelines.config.value_ranges import Range, parse_range
from pipelines.config.yaml_text import load_yaml
from pipelines.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform(0, 1)", Range(0.0, 1.0)),
        (" loguniform( 1e-4 ,1e-2 ) ", Range(1e-4, 1e-2, log=True)),
        ("quniform(0, 1, 0.3)", Range(0.0, 1.0, step=0.3)),
        ("randint(2, 4)", Range(2, 4, step=1, whole=True)),
        ("qrandint(8, 64, 8)", Range(8, 64, step=8, whole=True)),
        ("lograndint(1, 100)", Range(1, 100, whole=True, log=True)),
        ("uniform(-.5, +2.)", Range(-0.5, 2.0)),
    ],
)
def test_a_range_is_parsed(text: str, expected: Range) -> None:
    assert parse_range(text) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("normal(0, 1)", "one of uniform(low, high), quniform(low, high, step), loguniform"),
        ("0.1", "expected a list of values or one of"),
        ("uniform(0)", "expected uniform(low, high)"),
        ("uniform(0, 1, 2)", "expected uniform(low, high)"),
        ("quniform(0, 1)", "expected quniform(low, high, step)"),
        ("uniform(1, 0)", "expected low < high"),
        ("uniform(1, 1)", "expected low < high"),
        ("loguniform(0, 1)", "expected low > 0"),
        ("randint(1.5, 3)", "expected a whole number, got '1.5'"),
        ("uniform(a, b)", "expected a number, got 'a'"),
        ("uniform(0, inf)", "expected a finite number"),
        ("uniform(nan, 1)", "expected a finite number"),
        ("quniform(0, 1, 2)", "expected a step above 0 and at most high - low"),
        ("quniform(0, 1, 0)", "expected a step above 0"),
        ("uniform(0, 1); import os", "expected a list of values or one of"),
        ("uniform(__import__('os').getpid(), 1)", "expected a list of values or one of"),
    ],
)
def test_another_text_is_refused(text: str, what: str) -> None:
    with pytest.raises(UserError) as found:
        checked(SweepSection, {"space": {"train.learning_rate": text}, "search": "random", "trials": 2}, "sweep")
    assert what in found.value.what
    assert "train.learning_rate" in found.value.what


def test_values_of_a_range_with_steps() -> None:
    steps = parse_range("quniform(0, 1, 0.3)")
    assert [steps.at(i) for i in range(steps.count)] == [0.0, 0.3, 0.6, 0.9]
    assert steps.ends == (0.0, 0.9)
    whole = parse_range("qrandint(8, 20, 8)")
    assert [whole.at(i) for i in range(whole.count)] == [8, 16]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"space": {"network.groups": 3}}, "network.groups: expected a list of values, or a range"),
        ({"space": {"network.groups": []}}, "network.groups: expected a list of values, or a range"),
        ({"space": ["network.groups"]}, "expected key: values"),
        ({"trials": 3}, "trials and budget are for search: random and search: tpe"),
        ({"budget": 9}, "trials and budget are for search: random and search: tpe"),
        ({"search": "tpe"}, "search: tpe needs trials, the number of settings, or budget"),
        ({"search": "random"}, "search: random needs trials"),
        ({"search": "bayes"}, "'grid', 'random' or 'tpe'"),
        ({"samples": 3}, "samples is called trials"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as found:
        checked(SweepSection, values, "sweep")
    assert what in found.value.what


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    section = SweepSection(space={"train.learning_rate": ["1e-4", 0.1], "network.encoder": ["mlp"]})
    assert section.space == {"train.learning_rate": [1e-4, 0.1], "network.encoder": ["mlp"]}


def test_the_section_of_an_earlier_version_is_read() -> None:
    assert SweepSection.model_validate({"samples": None, "groups": [2]}) == SweepSection(groups=(2,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a: uniform(0, 1), b: uniform(2, 1)}", {"a": "uniform(0, 1)", "b": "uniform(2, 1)"}),
        ("{a: quniform(0, 1, 0.1), b: [2, 3]}", {"a": "quniform(0, 1, 0.1)", "b": [2, 3]}),
        ("{a: uniform(0,1)}", {"a": "uniform(0, 1)"}),
        ("{s: {a: randint(2, 4)}, c: 1}", {"s": {"a": "randint(2, 4)"}, "c": 1}),
        ("{a: 'f(', b}", {"a": "f(", "b": None}),
        ("{a: f(x), b}", {"a": "f(x)", "b": None}),
        ("a: uniform(0, 1)", {"a": "uniform(0, 1)"}),
    ],
)
def test_a_call_in_braces_is_one_text(text: str, expected: Any) -> None:
    assert load_yaml(text) == expected


def test_a_space_is_given_on_the_command_line(tmp_path: Path) -> None:
    both = [
        "sweep.space={train.learning_rate: loguniform(1e-4, 1e-2), network.groups: [2, 3, 4]}",
        "sweep.search=tpe", "sweep.trials=9",
    ]  # fmt: skip
    expected = {"train.learning_rate": "loguniform(1e-4, 1e-2)", "network.groups": [2, 3, 4]}
    assert load_config("planted", both).sweep.space == expected
    alone = ["sweep.space.train.learning_rate=loguniform(1e-4, 1e-2)", "sweep.space.network.groups=[2, 3, 4]"]
    assert load_config("planted", [*alone, *both[1:]]).sweep.space == expected
