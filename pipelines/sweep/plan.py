"""The trials of a sweep in the order in which they start: naive MTL, then setting by setting with every seed.

The settings of a grid and of a random search with a number of settings are known from the start. The others are
proposed while trials run. They are recorded in the folder of the sweep before their trials start, so that the same
command has them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.runs.files import METRICS, RESULT, read_jsonl
from pipelines.storage import Location
from pipelines.sweep.costs import Costs
from pipelines.sweep.results import BROKEN, DONE, ENDED_EARLY, OPEN, status
from pipelines.sweep.space import Space, random_settings, space_of
from pipelines.sweep.trials import STOPPED, Setting, Trial, label, naive_trials, seeds_of, setting_trials

SETTINGS = "settings.json"
REFUSALS = 20  # proposed settings that are no configuration, before the search ends


@dataclass(frozen=True)
class Outcome:
    """How a setting has ended.

    Args:
        score: Mean validation score; None if it failed.
        epoch: Epoch after which it was stopped; None if it finished.
    """

    score: float | None
    epoch: int | None = None


class Search(Protocol):
    """Proposes settings."""

    def propose(self) -> Setting | None:
        """A setting that has not been tried; None if there is none."""
        ...

    def tell(self, name: str, outcome: Outcome) -> None:
        """Report how the setting with this label ended."""
        ...


class RandomSearch:
    """Draws settings with a fixed seed.

    Args:
        space: The space of the sweep.
        settings: The settings that it has so far.
    """

    def __init__(self, space: Space, settings: Sequence[Setting]) -> None:
        self.drawn = random_settings(space, [label(setting) for setting in settings])

    def propose(self) -> Setting | None:
        """See `Search`."""
        return next(self.drawn, None)

    def tell(self, name: str, outcome: Outcome) -> None:
        """Do nothing: a draw does not depend on results."""


class Plan:
    """The trials of a sweep.

    Args:
        config: Configuration of the sweep.
        folder: Its folder.

    Raises:
        UserError: For a key that cannot be swept, a setting that is no configuration, or nothing to compare.
    """

    def __init__(self, config: Config, folder: Location) -> None:
        self.config, self.folder, self.space = config, folder, space_of(config)
        self.settings = list(self._known())
        self.trials: dict[str, Trial] = {}
        self._add(naive_trials(config, folder.name))
        for setting in self.settings:
            self._add(setting_trials(config, setting, folder.name))
        corners = self.space.corners() if self.is_open else []
        self.corners = [setting_trials(config, corner, folder.name)[0] for corner in corners]
        self.todo: deque[str] = deque()
        self.running: set[str] = set()
        self.refused: dict[str, str] = {}  # label of a proposed setting that is no configuration → the reason
        self.search: Search | None = None
        self.costs: Costs | None = None
        self.spent: dict[str, float] = {}

    @property
    def is_open(self) -> bool:
        """Whether settings are proposed while trials run."""
        section = self.config.sweep
        return section.search == "tpe" or section.budget is not None

    @property
    def most_settings(self) -> int | None:
        """Largest number of settings; None if only the budget limits it."""
        limits = [limit for limit in (self.config.sweep.trials, self.space.size) if limit is not None]
        return min(limits, default=None) if self.is_open else len(self.settings)

    @property
    def has_room(self) -> bool:
        """Whether `sweep.trials`, `sweep.budget` and the space allow a further setting."""
        most = self.most_settings
        if not self.is_open or (most is not None and len(self.settings) >= most):
            return False
        return self.costs is None or self._committed() + self._most_of_setting() <= (self.config.sweep.budget or 0)

    @property
    def checked(self) -> list[Trial]:
        """Trials whose configurations are checked before the first one starts: one for each setting or corner."""
        trials = [*self.trials.values(), *self.corners]
        return list({trial.label: trial for trial in trials}.values())

    @property
    def progress(self) -> str:
        """The trials that have ended, as text."""
        ended = len(self.trials) - len(self.todo) - len(self.running)
        if self.costs is not None:
            spent = sum(self.spent.values())
            return f"{ended} trials, {spent:.1f} of {self.config.sweep.budget:g} runs of naive MTL"
        return f"{ended} of {self.total} trials"

    @property
    def total(self) -> int:
        """Largest number of trials, or without a limit the number so far."""
        most = self.most_settings
        return len(self.trials) if most is None else (most + 1) * len(seeds_of(self.config))

    def next(self) -> Trial | None:
        """The next trial to start; None if there is none at present."""
        if not self.todo:
            self._propose()
        if not self.todo:
            return None
        name = self.todo.popleft()
        self.running.add(name)
        return self.trials[name]

    def end(self, name: str) -> None:
        """Note that a trial has ended. Its run folder says how."""
        self.running.discard(name)
        if self.costs is not None:
            self.spent[name] = self.costs.spent(self.trials[name])
        self._tell(self.trials[name].label)

    def seeds(self, name: str) -> list[Trial]:
        """The trials of a setting, given its label."""
        return [trial for trial in self.trials.values() if trial.label == name]

    def has_finished(self, trial: Trial) -> bool:
        """Whether a seed of the setting of a trial has finished. Its other seeds are not stopped then."""
        return any((one.run / RESULT).exists() for one in self.seeds(trial.label))

    def is_stopped(self, trial: Trial) -> bool:
        """Whether the setting of a trial was stopped."""
        stopped = any((one.run / STOPPED).exists() for one in self.seeds(trial.label))
        return stopped and not trial.naive and not self.has_finished(trial)

    def ended_records(self) -> dict[str, list[dict[str, Any]]]:
        """The records of the epochs of all trials that have ended, by name."""
        left = self._left()
        return {name: read_jsonl(one.run / METRICS) for name, one in self.trials.items() if name not in left}

    def start_alone(self) -> None:
        """Let naive MTL start from no model: it cannot start from several."""
        self._add(naive_trials(self.config, self.folder.name, shared_start=False))

    def resume(self, costs: Costs | None = None) -> None:
        """Find the trials that are left, from the run folders.

        Args:
            costs: The costs of trials, for a sweep with a budget.

        Raises:
            UserError: If the budget does not allow one setting.
        """
        self.todo = deque(name for name, trial in self.trials.items() if status(trial) in (OPEN, BROKEN))
        if costs is None:
            return
        self.costs = costs
        self.spent = {name: costs.spent(one) for name, one in self.trials.items() if name not in self.todo}
        if self.settings or self.has_room:
            return
        seeds, needed = len(seeds_of(self.config)), self._committed() + self._most_of_setting()
        raise UserError(
            f"sweep.budget={self.config.sweep.budget:g} does not allow one setting: naive MTL and a setting can "
            f"cost {needed:.1f} runs of naive MTL with {seeds} seed{'s' * (seeds > 1)}",
            where="sweep.budget",
            remedy="increase sweep.budget, or lower search.budget or the number of seeds",
            wrong_use=True,
        )

    def begin(self, search: Search) -> None:
        """Set the search that proposes further settings, and report those that have ended."""
        self.search = search
        for setting in self.settings:
            self._tell(label(setting))

    def _known(self) -> Iterable[Setting]:
        """The settings that do not depend on results, or those of earlier sessions."""
        if self.is_open:
            file = self.folder / SETTINGS
            return file.read_json() if file.exists() else []
        section, size = self.config.sweep, self.space.size
        if section.search == "random" and (size is None or (section.trials or 0) < size):
            return islice(random_settings(self.space), section.trials)
        if size is None:
            raise UserError(
                "a grid has no combinations of a range without steps",
                where="sweep.space",
                remedy="give a list or a range with steps, or set sweep.search=random or tpe, and sweep.trials",
                wrong_use=True,
            )
        return self.space.all()

    def _add(self, trials: Sequence[Trial]) -> None:
        self.trials |= {trial.name: trial for trial in trials}

    def _propose(self) -> None:
        """Add the trials of a further setting, if there is one."""
        for _ in range(REFUSALS):
            if self.search is None or not self.has_room:
                return
            setting = self.search.propose()
            if setting is None:
                self.search = None
                return
            try:
                trials = setting_trials(self.config, setting, self.folder.name)
                trials[0].config.check_options()
            except UserError as error:  # between the corners, which were checked
                self.refused[label(setting)] = error.what
                continue
            self.settings.append(setting)
            (self.folder / SETTINGS).write_json(self.settings)
            self._add(trials)
            self.todo.extend(trial.name for trial in trials)
            return

    def _left(self) -> set[str]:
        return {*self.running, *self.todo}

    def _committed(self) -> float:
        """The training so far, with the most that unfinished trials can cost."""
        assert self.costs is not None
        return sum(self.spent.values()) + sum(self.costs.most(self.trials[name]) for name in self._left())

    def _most_of_setting(self) -> float:
        assert self.costs is not None
        return len(seeds_of(self.config)) * max(map(self.costs.most, self.corners))

    def _tell(self, name: str) -> None:
        """Report a setting to the search if all its trials have ended."""
        trials, left = self.seeds(name), self._left()
        if self.search is not None and not trials[0].naive and all(trial.name not in left for trial in trials):
            self.search.tell(name, outcome_of(trials))


def outcome_of(trials: Sequence[Trial]) -> Outcome:
    """How a setting has ended, from the run folders of its trials."""
    states = [status(trial) for trial in trials]
    if all(state == DONE for state in states):
        scores = [(trial.run / RESULT).read_json()["score"] for trial in trials]
        return Outcome(None if None in scores else sum(scores) / len(scores))
    if ENDED_EARLY in states:
        stopped = (trials[states.index(ENDED_EARLY)].run / STOPPED).read_json()
        return Outcome(stopped["val_score"], stopped["epoch"])
    return Outcome(None)
