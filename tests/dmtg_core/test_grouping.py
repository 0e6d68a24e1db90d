"""A partition of tasks into groups."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from dmtg_core import Grouping


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),  # (0 − 4/6) / (2 − 4/6)
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),  # (1 − 2/6) / (1.5 − 2/6)
        ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 8 / 33),  # (2 − 18/15) / (4.5 − 18/15)
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 0], [0, 0, 0], 1.0),
        ([0, 1, 2], [0, 1, 2], 1.0),
        ([0], [0], 1.0),
    ],
)
def test_adjusted_rand_index_at_known_values(first, second, expected):
    names = [f"t{n}" for n in range(len(first))]
    mine, theirs = (Grouping.from_assignment(names, groups) for groups in (first, second))
    assert mine.adjusted_rand_index(theirs) == pytest.approx(expected)


assignments = st.integers(1, 8).flatmap(lambda n: st.lists(st.integers(0, 3), min_size=n, max_size=n))


@given(assignment=assignments, data=st.data())
def test_adjusted_rand_index_is_symmetric_bounded_and_independent_of_order(assignment, data):
    names = [f"t{n}" for n in range(len(assignment))]
    other = data.draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    order = data.draw(st.permutations(range(len(names))))
    mine, theirs = Grouping.from_assignment(names, assignment), Grouping.from_assignment(names, other)
    shuffled = Grouping.from_assignment([names[i] for i in order], [other[i] for i in order])
    value = mine.adjusted_rand_index(theirs)
    assert value == theirs.adjusted_rand_index(mine) == mine.adjusted_rand_index(shuffled)
    assert -1 <= value <= 1
    assert mine.adjusted_rand_index(mine) == 1.0


@given(assignment=assignments, data=st.data())
def test_adjusted_rand_index_equals_that_of_scikit_learn(assignment, data):
    other = data.draw(st.lists(st.integers(0, 3), min_size=len(assignment), max_size=len(assignment)))
    names = [f"t{n}" for n in range(len(assignment))]
    mine, theirs = Grouping.from_assignment(names, assignment), Grouping.from_assignment(names, other)
    assert mine.adjusted_rand_index(theirs) == pytest.approx(adjusted_rand_score(assignment, other))


def test_random_partitions_agree_by_chance_only():
    generator = torch.Generator().manual_seed(0)
    names = [f"t{n}" for n in range(12)]
    drawn = [
        Grouping.from_assignment(names, torch.randint(3, (12,), generator=generator).tolist()) for _ in range(200)
    ]
    found = [a.adjusted_rand_index(b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    assert sum(found) / len(found) == pytest.approx(0.0, abs=0.05)


@given(assignment=assignments)
def test_json_round_trip_gives_an_equal_grouping(assignment):
    grouping = Grouping.from_assignment([f"t{n}" for n in range(len(assignment))], assignment)
    assert Grouping.from_json(grouping.to_json()) == grouping
    assert Grouping.from_dict(grouping.to_dict(), grouping.tasks) == grouping
    assert json.loads(grouping.to_json())["name"] == grouping.name


@given(assignment=assignments, data=st.data())
def test_equal_partitions_are_equal_whatever_the_numbers_of_their_groups(assignment, data):
    names = [f"t{n}" for n in range(len(assignment))]
    numbers = data.draw(st.permutations(range(4)))
    one = Grouping.from_assignment(names, assignment)
    other = Grouping.from_assignment(names, [numbers[g] + 10 for g in assignment])
    assert one == other
    assert hash(one) == hash(other)
    assert [g[0] for g in one.groups] == sorted(g[0] for g in one.groups)
    assert one.assignment == other.assignment
    assert Grouping.from_assignment(names, one.assignment) == one


def test_the_name_depends_on_the_partition_and_not_on_any_order():
    one = Grouping.of([["a", "b"], ["c"]])
    assert Grouping.of([["c"], ["b", "a"]]).name == one.name
    assert Grouping.of([["a", "b"], ["c"]], ["c", "b", "a"]).name == one.name
    assert Grouping.of([["a"], ["b", "c"]]).name != one.name
    assert one.name.startswith("g2-")


def test_empty_groups_are_dropped():
    assert Grouping.of([[], ["b"], [], ["a"]]) == Grouping.of([["b"], ["a"]])
    assert Grouping.of([[], ["b"], ["a"]]).to_dict() == {"group_0": ["b"], "group_1": ["a"]}


def test_published_grouping_of_celeba_reads_as_published():
    grouping = Grouping.of([["Wearing_Hat"], ["5_o_Clock_Shadow", "Blond_Hair", "Mustache"], ["Brown_Hair"], []])
    assert str(grouping) == "Wearing_Hat | 5_o_Clock_Shadow, Blond_Hair, Mustache | Brown_Hair"
    assert grouping.assignment == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("groups", "tasks", "message"),
    [
        ([["a", "b"], ["b"]], None, "got b in several"),
        ([["a", "a"]], None, "got a in several"),
        ([["a"]], ["a", "b"], r"without a group \['b'\]"),
        ([["a", "z"]], ["a"], r"unknown \['z'\]"),
        ([["a"]], ["a", "a"], "a"),
    ],
)
def test_invalid_partitions_are_refused(groups, tasks, message):
    with pytest.raises(ValueError, match=message):
        Grouping.of(groups, tasks)


def test_an_assignment_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="assignment of 2 tasks, got 3"):
        Grouping.from_assignment(["a", "b"], [0, 1, 2])


def test_groupings_of_different_tasks_cannot_be_compared():
    with pytest.raises(ValueError, match="different tasks"):
        Grouping.of([["a"]]).adjusted_rand_index(Grouping.of([["b"]]))


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        ("ab|cd", "ab|cd", ""),
        ("ab|cd", "cd|ab", ""),
        ("abc|de", "ab|cde", "c"),
        ("abcd", "ab|cd", "cd"),
        ("ab|cd", "abcd", "cd"),
        ("a|b|c", "abc", "bc"),
        ("abc|de", "dea|bc", "a"),
        ("abx|cd", "ab|cdy", ""),
    ],
)
def test_tasks_that_moved_are_those_outside_the_largest_overlaps(before, after, moved):
    first, second = (Grouping.of(map(list, text.split("|"))) for text in (before, after))
    assert first.moved(second) == list(moved)


def test_a_restricted_partition_keeps_its_pairs():
    found = Grouping.of([["a", "b"], ["c"], ["d", "e"]]).among(["e", "b", "a", "x"])
    assert found == Grouping.of([["a", "b"], ["e"]])
