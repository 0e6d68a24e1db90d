"""Words for yes and no, as people write them in tables."""

from __future__ import annotations

from collections.abc import Mapping

YES = (
    "true", "yes", "1", "1.0", "t", "y", "on",
    "ja", "j", "wahr", "oui", "o", "vrai", "sí", "si", "sì", "s", "verdadero", "vero", "sim", "verdadeiro",
    "jo", "tak", "prawda", "ano", "áno", "da", "igen", "kyllä", "jah", "jā", "taip", "evet",
    "да", "так", "истина", "ναι", "はい", "是", "真", "对", "예", "네", "نعم", "כן", "हाँ", "có", "ya",
)  # fmt: skip
NO = (
    "false", "no", "0", "0.0", "-1", "-1.0", "f", "n", "off",
    "nein", "falsch", "non", "faux", "falso", "não", "nao", "nej", "nei", "nee", "nie", "fałsz", "ne", "nu", "nem",
    "ei", "nē", "hayır",
    "нет", "не", "ні", "ложь", "όχι", "いいえ", "否", "假", "错", "아니오", "아니요",
    "لا", "לא", "नहीं", "không", "tidak",
)  # fmt: skip
FLAGS: Mapping[str, int] = {
    form: value
    for words, value in ((YES, 1), (NO, 0))
    for word in words
    for form in (word, word.capitalize(), word.upper())
}
