"""Comparisons over planted problems."""

import json

from bench.planted_problems import compare_problems

TINY = [
    "source.options.tasks=4", "source.options.groups=2", "source.options.features=4", "source.options.rows=400",
    "network.groups=2", "train.epochs=2", "compare.methods=[wide]", "compare.budgets=[1]",
]  # fmt: skip


def test_each_seed_has_the_gains_of_its_own_problem(tmp_path):
    found = compare_problems(tmp_path, 2, TINY).found
    assert found["seeds"] == [1, 2]
    (file,) = (tmp_path / "2" / "runs").glob("*/compare.json")
    other = json.loads(file.read_text())
    assert other["seeds"] == [2]
    gains = [one["per_seed"]["wide"]["2"]["gain"] for one in (found, other)]
    assert gains[0] == gains[1] != found["per_seed"]["wide"]["1"]["gain"]
