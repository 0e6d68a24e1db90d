"""Names with numbers of any length in the order of the numbers."""

from hypothesis import given
from hypothesis import strategies as st

from dmtg_core.names import by_number, listed


@given(st.lists(st.integers(0, 10**30), unique=True))
def test_names_that_end_with_a_number_are_in_its_order(numbers):
    assert sorted((f"group_{n}" for n in numbers), key=by_number) == [f"group_{n}" for n in sorted(numbers)]


@given(st.lists(st.tuples(st.integers(0, 10**9), st.text("0123456789abcdef", min_size=6, max_size=6))))
def test_names_with_padded_numbers_are_in_order(marked):
    names = [f"checkpoint_{n:08d}_{mark}" for n, mark in marked]
    found = [int(name.split("_")[1]) for name in sorted(names, key=by_number)]
    assert found == sorted(n for n, _ in marked)


ORDERED = ("", "07", "7", "10", "9" * 5000, "1" + "0" * 5000, "a", "a7", "a10", "a10b2", "a10b10", "b1")


@given(st.permutations(ORDERED))
def test_any_names_have_one_order(names):
    assert tuple(sorted(names, key=by_number)) == ORDERED


def test_many_names_are_shortened():
    assert listed(["a", "b"]) == "a, b"
    assert listed([]) == ""
    assert listed(str(i) for i in range(70_000)) == "0, 1, 2, 3, 4 and 69995 more"
