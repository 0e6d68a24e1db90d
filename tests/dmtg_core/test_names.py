"""The keys of names of any script and length, and names with numbers in the order of the numbers."""

import unicodedata
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core.names import LONGEST_KEY, by_number, display_form, key_of, listed, quoted, unquoted


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


def test_a_name_with_a_comma_is_one_name_in_a_list():
    assert listed(["height, in cm", "weight"]) == '"height, in cm", weight'
    assert unquoted("an older list, of names") == ["an older list", "of names"]


@given(st.lists(st.text(st.sampled_from('ab", \n'), min_size=1).map(str.strip).filter(bool)))
def test_names_in_a_list_are_read_again(names):
    assert unquoted(", ".join(map(quoted, names))) == names


@given(st.text("abcXYZ0129_.-", min_size=1, max_size=LONGEST_KEY).filter(lambda name: name not in (".", "..")))
def test_a_name_of_ascii_letters_is_its_own_key(name):
    assert key_of(name) == name


@pytest.mark.parametrize(
    "name", ["5_o_Clock_Shadow", "价格", "Kündigung in 3 Monaten", "Цена в рублях", "نوع ۲", "a.b"]
)
def test_letters_of_every_script_are_kept(name):
    assert key_of(name) == name


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "a ", "a  b", "x\n", "..", "50 %", "q" * 201, "很" * 67, "हिन्दी", "\u202ea"]
)
def test_other_names_have_a_short_key_that_is_no_name_of_its_own(name):
    key = key_of(name)
    assert key != name
    assert len(key.encode()) <= 111
    assert key_of(key) != key


@given(st.lists(st.text(max_size=300) | st.text("a/ .", max_size=4), unique=True, max_size=50))
def test_distinct_names_have_distinct_keys(names):
    assert len({key_of(name) for name in names + [key_of(name) for name in names]}) == len(
        {*names, *(key_of(name) for name in names)}
    )


def test_keys_of_ten_thousand_names_of_one_beginning_are_distinct():
    names = {"Wie zufrieden sind Sie " * 8 + "".join(end) for end in product("/ .-_aä价\u0301\n%", repeat=4)}
    assert len(names) == 11**4
    assert len({key_of(name) for name in names}) == len(names)


@given(st.text(max_size=30))
def test_names_of_one_look_are_one_name_in_other_forms(name):
    assert display_form(f"  {unicodedata.normalize('NFD', name)}\t") == display_form(
        unicodedata.normalize("NFC", name)
    )
