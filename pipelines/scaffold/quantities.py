"""Whether few different whole numbers are amounts, ratings and counts, or the codes of classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations, pairwise

LONGEST_SCALE = 10  # highest rating of a scale that begins with 0 or 1
SHORTEST_SCALE = 5  # fewest values of a scale, and of counts that fall off
ROWS_A_CLASS = 10  # rows below which a class cannot be learned
FEWEST_PAIRS = 10  # of values on the same side of the most frequent one

# whole words of a name, in common languages; a word of codes wins
CODES = """
class category code type kind group cluster segment label species cause status state region zone zip plz month
weekday klasse kategorie typ art gruppe ursache bezirk monat classe catégorie categorie groupe région mois
clase tipo grupo mes categoria класс категория код тип группа район месяц 类别 类型 分类 编码 代码 种类 组
"""
AMOUNTS = """
count counts number num nr no quantity qty amount total sum age rating ratings stars score points price cost
income salary size length width height weight rank days weeks months years hours minutes rooms bedrooms
bathrooms floors children visits visitors clicks orders items sales anzahl zahl menge alter preis kosten
bewertung punkte sterne note tage wochen monate jahre stunden zimmer kinder besuche nombre quantité prix âge
avis coût jours années heures número numero cantidad precio edad puntos días años horas quantità prezzo età
giorni anni количество число цена возраст оценка рейтинг баллы сумма дней лет
数量 个数 数目 价格 年龄 评分 分数 得分 金额 人数 次数
"""
_CODES, _AMOUNTS = frozenset(CODES.split()), frozenset(AMOUNTS.split())


def whole_numbers(name: str, counts: Mapping[int, int]) -> tuple[bool, str]:
    """Whether whole numbers are a quantity, with the reason.

    Args:
        name: Name of the column.
        counts: Value → number of rows; at least three values.
    """
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold()
    # names in Chinese have no spaces: the whole name, and each of its ends
    parts = {*re.split(r"[\W_\d]+", words), words, words[-2:], words[-1:] if not words.isascii() else ""}
    if found := _CODES & parts:
        return False, f"the name has the word {min(found)}"
    if found := _AMOUNTS & parts:
        return True, f"the name has the word {min(found)}"
    return _by_values(sorted(counts.items()))


def _by_values(pairs: list[tuple[int, int]]) -> tuple[bool, str]:
    values, rows = zip(*pairs, strict=True)
    first, last = values[0], values[-1]
    steps = {after - before for before, after in pairwise(values)}
    step = min(steps)
    rare = sum(number < ROWS_A_CLASS for number in rows)
    signs_of_amounts = (
        (first < 0, "codes are seldom negative"),
        (
            steps == {1} and first == 0 and len(values) >= SHORTEST_SCALE and _falls(rows),
            "counts from 0 that fall off",
        ),
        (
            steps == {1} and first == 1 and SHORTEST_SCALE <= last <= LONGEST_SCALE,
            f"a scale of ratings from 1 to {last}",
        ),
        (len(steps) == 1 and step >= SHORTEST_SCALE and first % step == 0, f"amounts in steps of {step}"),
        (
            _falls_on_both_sides(rows),
            f"values are the rarer, the farther they are from the most frequent, {values[_peak(rows)]}",
        ),
        (2 * rare >= len(values), f"{rare} of {len(values)} values have fewer than {ROWS_A_CLASS} rows"),
    )
    for found, why in signs_of_amounts:
        if found:
            return True, why
    return False, f"{len(values)} values from {first} to {last} in no order of amounts"


def _falls(rows: tuple[int, ...]) -> bool:
    """Whether the numbers of rows fall from their peak, in the first half, to less than half of it at the end."""
    peak = _peak(rows)
    tail = rows[peak:]
    rises = sum(max(after - before, 0) for before, after in pairwise(tail))
    return 2 * peak < len(rows) and 2 * rows[-1] < rows[peak] and 10 * rises <= rows[peak]


def _falls_on_both_sides(rows: tuple[int, ...]) -> bool:
    """Whether the numbers of rows fall from their peak to both ends, to a twentieth at one of them.

    Of two values on the same side, the farther has fewer rows in nine of ten pairs. Codes have no such order.
    """
    peak = _peak(rows)
    sides = rows[peak - 1 :: -1] if peak else (), rows[peak + 1 :]
    pairs = [near >= far for side in sides for near, far in combinations(side, 2)]
    rarest = min(rows[0], rows[-1])
    return len(pairs) >= FEWEST_PAIRS and 10 * sum(pairs) >= 9 * len(pairs) and 20 * rarest <= rows[peak]


def _peak(rows: tuple[int, ...]) -> int:
    return rows.index(max(rows))
