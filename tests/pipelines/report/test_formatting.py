"""Numbers as people write them, over all magnitudes."""

import math
import re

import pytest

from pipelines.report.formatting import cost, figure, in_unit, percent, quantity, scaled, share


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "-∞"), (0, "0"), (-0.0, "0"), (0.6, "0.6"),
        (-0.25, "-0.25"), (1 / 3, "0.3333"),
        (0.00012, "0.00012"), (0.000012, "1.2·10⁻⁵"), (-3e-12, "-3·10⁻¹²"), (712, "712"),
        (999.99, "1000"), (1500, "1500"), (9999.7, "10,000"), (44026, "44,026"), (999_999.4, "999,999"),
        (999_999.6, "1 million"), (3_105_900, "3.106 million"), (-2e9, "-2 billion"), (999_999_999, "1 billion"),
        (5.25e14, "525 trillion"), (9.99996e-5, "1·10⁻⁴"),
    ],
)  # fmt: skip
def test_a_figure_is_written_as_people_write_it(value: float | None, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize("exponent", range(-12, 15))
@pytest.mark.parametrize("mantissa", [1.0, 1.2345678, 9.9996, -5.0])
def test_a_figure_keeps_four_digits_of_every_magnitude(mantissa: float, exponent: int) -> None:
    value = mantissa * 10.0**exponent
    text = figure(value)
    assert "e" not in text.replace("trillion", "")
    assert read(text) == pytest.approx(value, rel=6e-4)


def read(text: str) -> float:
    """The number in a text of `figure`."""
    words = {"million": 1e6, "billion": 1e9, "trillion": 1e12}
    digits, _, word = text.partition(" ")
    mantissa, _, power = digits.replace(",", "").partition("·10")
    raised = power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    return float(mantissa) * 10.0 ** int(raised or 0) * words.get(word, 1.0)


def test_counts_gains_and_shares() -> None:
    assert [cost(value) for value in (385, 3_105_900, 999_600_000)] == ["385", "3.11 million", "1 billion"]
    assert [percent(value) for value in (4.04, -28, -0.01, None)] == ["+4.0 %", "-28.0 %", "+0.0 %", "–"]
    found = [share(value) for value in (0, 0.0004, 0.333, 0.9999, 1, None)]
    assert found == ["0.0%", "< 0.1%", "33.3%", "> 99.9%", "100.0%", "–"]


def test_a_fraction_of_a_unit_becomes_the_unit() -> None:
    assert quantity(1024, "1/512 m") == "2 m"
    assert quantity(15, "cd") == "15 cd"
    assert quantity(0.5, "") == "0.5"
    assert in_unit(3, "m/s") == (3, "m/s")


@pytest.mark.parametrize(
    ("values", "word", "last"),
    [
        ([600, 712], "", 712),
        ([1, 9_999], "", 9_999),
        ([20_000], "thousand", 20),
        ([6e5, 3e6], "million", 3),
        ([], "", 0),
    ],
)
def test_an_axis_has_numbers_that_people_read(values: list[float], word: str, last: float) -> None:
    numbers, found = scaled(values)
    assert found == word
    assert [*numbers, 0][-1 if not numbers else -2] == last
    assert re.fullmatch(r"[a-z]*", found)
