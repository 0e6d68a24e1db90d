"""The space of a sweep: the keys that it varies, with their values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.config.loading import Config
from pipelines.config.sections import TemperatureSection
from pipelines.config.validation import checked
from pipelines.config.value_ranges import Range, parse_range
from pipelines.errors import UserError
from pipelines.sweep.trials import GROUPS, RATE, STEM, TEMPERATURE, Setting, label

SWEPT = ("network", "gate", "train", "search")
REASONS = {
    "name": "it names the run",
    "source": "all trials share one data set",
    "data": "all trials share one data set, which is read once",
    "sweep": "it is the sweep itself",
    "compare": "it belongs to dmtg compare",
    "signal": "it belongs to dmtg signal",
    "regroup": "it belongs to dmtg regroup",
    "track": "all trials are tracked in one place",
    "run": "the sweep names the folders of its trials",
    "ray": "all trials share the processes or the cluster",
    "train.seed": "every setting has the seeds of sweep.seeds",
    "train.trees": "it does not change the trained network",
    "search.baseline": "naive MTL is trained once for each seed",
    "network.start_from": "the models are copied into the sweep once",
}
SHORT = {
    GROUPS: "groups",
    STEM: "stems",
    TEMPERATURE: "temperatures",
    RATE: "gate_learning_rates",
}  # key → its short form in the section
MOST_CORNERS = 256
ATTEMPTS = 1000  # draws of settings that have been tried, before a random search ends
Values = tuple[Any, ...] | Range


@dataclass(frozen=True)
class Space:
    """The keys of a sweep, network.groups first, and the values of each.

    Args:
        values: Key → a list of values, or a range.
    """

    values: Mapping[str, Values]

    @property
    def size(self) -> int | None:
        """Number of settings; None if a key has a range without steps."""
        sizes = [_size(values) for values in self.values.values()]
        known = [size for size in sizes if size is not None]
        return math.prod(known) if len(known) == len(sizes) else None

    def all(self) -> list[Setting]:
        """All settings of a finite space."""
        return self._product({key: _listed(values) for key, values in self.values.items()})

    def draw(self, rng: np.random.Generator) -> Setting:
        """A setting at random."""
        return {key: _draw(values, rng) for key, values in self.values.items()}

    def corners(self) -> list[Setting]:
        """Settings at the ends of the ranges, with every value of the lists.

        They are all combinations, or if these are too many, those that differ from the first in one key, and the
        last one.
        """
        ends = {key: _ends(values) for key, values in self.values.items()}
        if math.prod(map(len, ends.values())) <= MOST_CORNERS:
            return self._product(ends)
        first = {key: values[0] for key, values in ends.items()}
        varied = [first | {key: value} for key, values in ends.items() for value in values]
        return _distinct([*varied, {key: values[-1] for key, values in ends.items()}])

    def _product(self, values: Mapping[str, Collection[Any]]) -> list[Setting]:
        return _distinct([dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())])


def space_of(config: Config) -> Space:
    """The space of the section `sweep`: its short forms and `sweep.space`.

    One group is left out: it is naive MTL, which every sweep trains.

    Raises:
        UserError: For a key that cannot be swept, and if there is nothing to compare.
    """
    section = config.sweep
    values: dict[str, Values] = {GROUPS: section.groups or (config.network.groups,)}
    short = {
        STEM: section.stems,
        TEMPERATURE: tuple(value.model_dump() for value in section.temperatures),
        RATE: section.gate_learning_rates,
    }
    values |= {key: listed for key, listed in short.items() if listed}
    for key, given in sorted(section.space.items()):  # their order in a file must not change a search
        _check_key(key, config)
        values[key] = parse_range(given) if isinstance(given, str) else _choices(key, given)
    values[GROUPS] = _several(values[GROUPS])
    _check_nesting(values)
    found = Space(values)
    if found.size == 0 or (found.size == 1 and len(section.seeds) < 2):
        names = [f"sweep.{name}" for name in SHORT.values()]
        why = "" if found.size else ": one group is naive MTL, which every sweep trains"
        raise UserError(
            f"the sweep has nothing to compare{why}",
            where="sweep",
            remedy=f"give several values to a key in sweep.space, or to one of {', '.join(names)}, sweep.seeds",
            wrong_use=True,
        )
    return found


def random_settings(space: Space, known: Collection[str] = ()) -> Iterator[Setting]:
    """Settings drawn with a fixed seed, each once; the same in every session.

    Args:
        space: The space.
        known: Labels of settings that are left out.
    """
    rng, seen, misses = np.random.default_rng(0), set(known), 0
    while misses < ATTEMPTS:
        setting = space.draw(rng)
        misses += 1
        if label(setting) not in seen:
            seen.add(label(setting))
            misses = 0
            yield setting


def _check_key(key: str, config: Config) -> None:
    section = key.partition(".")[0]
    reason = REASONS.get(key) or REASONS.get(section)
    if reason is None and (section not in SWEPT or section == key):
        reason = "it is no key of one of these sections"
    if reason:
        raise UserError(
            f"{key} cannot be swept: {reason}",
            where="sweep.space",
            remedy=f"remove it; the keys of {', '.join(SWEPT)} can be swept",
            wrong_use=True,
        )
    if key in SHORT and getattr(config.sweep, SHORT[key]):
        raise UserError(
            f"{key} is swept twice, also by sweep.{SHORT[key]}",
            where="sweep.space",
            remedy="remove one of the two",
            wrong_use=True,
        )


def _check_nesting(values: Mapping[str, Values]) -> None:
    inside = next(((key, other) for key in values for other in values if key.startswith(f"{other}.")), None)
    if inside:
        raise UserError(
            f"{inside[0]} is a part of {inside[1]}, and both are swept",
            where="sweep",
            remedy="remove one of the two",
            wrong_use=True,
        )


def _choices(key: str, values: Collection[Any]) -> tuple[Any, ...]:
    """The values of a list; a temperature gets its default values."""
    if key != TEMPERATURE:
        return tuple(values)
    given = [value if isinstance(value, Mapping) else {"start": value} for value in values]
    return tuple(
        checked(TemperatureSection, value, "sweep.space.gate.temperature").model_dump() for value in given
    )


def _several(values: Values) -> Values:
    """The values of network.groups without one group."""
    if not isinstance(values, Range):
        return tuple(value for value in values if value != 1)
    if values.low >= 2 or not values.whole:
        return values
    if values.step in (None, 1) and values.high > 2:
        return Range(2, values.high, values.step, values.whole, values.log)
    return tuple(value for value in _listed(values) if value > 1)


def _size(values: Values) -> int | None:
    if not isinstance(values, Range):
        return len(values)
    if values.step is None and values.whole:
        return int(values.high - values.low) + 1
    return None if values.step is None else values.count


def _listed(values: Values) -> tuple[Any, ...]:
    """All values of a finite range, or those of a list."""
    if not isinstance(values, Range):
        return values
    if values.step is None:
        return tuple(range(int(values.low), int(values.high) + 1))
    return tuple(values.at(i) for i in range(values.count))


def _ends(values: Values) -> tuple[Any, ...]:
    return values.ends if isinstance(values, Range) else values


def _draw(values: Values, rng: np.random.Generator) -> Any:
    if not isinstance(values, Range):
        return values[int(rng.integers(len(values)))]
    if values.step is not None:
        return values.at(int(rng.integers(values.count)))
    if not values.log:
        return float(rng.uniform(values.low, values.high))
    top = values.high + 1 if values.whole else values.high
    drawn = math.exp(rng.uniform(math.log(values.low), math.log(top)))
    return min(int(drawn), int(values.high)) if values.whole else min(max(drawn, values.low), values.high)


def _distinct(settings: Collection[Setting]) -> list[Setting]:
    return list({label(setting): setting for setting in settings}.values())
