"""The picture of a grouping has no boxes in place of letters."""

from __future__ import annotations

import warnings

import pytest

from pipelines.report import figures

TALLY = chr(0x2A603)  # a letter that no font of Matplotlib has


def drawn(names: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """The names in the picture of a grouping, and the warnings about missing letters."""
    shown: list[str] = []
    plot = figures._gate_picture
    monkeypatch.setattr(figures, "_gate_picture", lambda tasks, *rest: shown.extend(tasks) or plot(tasks, *rest))
    monkeypatch.setattr(figures, "_any_script", warnings.catch_warnings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figures.grouping_png({"group_0": names[:1], "group_1": names[1:]})
    return shown, [str(one.message) for one in caught]


def test_a_letter_of_no_font_is_drawn_as_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn([f"{TALLY} size", "Größe, Цена"], monkeypatch) == (["\\u2a603 size", "Größe, Цена"], [])


def test_a_letter_of_another_font_is_drawn_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    others = figures._letters("STIXGeneral") - figures._letters("sans-serif")
    letter = min(letter for letter in others if letter.isalpha())
    families, lacking = figures.fonts_for([f"a {letter}", TALLY])
    assert lacking == {TALLY}
    assert letter in figures._letters(families[1])
    assert drawn([f"a {letter}", "b"], monkeypatch) == ([f"a {letter}", "b"], [])


def test_usual_letters_need_no_other_font() -> None:
    assert figures.fonts_for(["Größe", "Цена $x$", "السعر"]) == (["sans-serif"], set())
