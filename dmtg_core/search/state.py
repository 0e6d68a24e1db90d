"""`SearchState`: the checkpoint of a search, from which an interrupted search resumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training import checkpoint
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState


@dataclass
class SearchState:
    """State of a search: the contents of a checkpoint.

    `results` has an entry for each finished stage and each decision, in order. `held` are candidates that may be
    trained on. `trained` are the networks that were trained to the end, including naive MTL. `plan`
    has the arguments of the search. A checkpoint with another plan is refused.
    """

    plan: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    current: TrainState | None = None
    held: dict[str, TrainState] = field(default_factory=dict)
    trained: dict[str, GroupingNetwork] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the state into `folder`."""
        if self.current is not None:
            self.current.save(folder / "current")
        for name, state in self.held.items():
            state.save(folder / "held" / name)
        for name, network in self.trained.items():
            checkpoint.save_network(folder / "trained" / name, network)
        described = {
            "results": self.results, "current": self.current is not None, "held": [*self.held],
            "trained": [*self.trained],
        }  # fmt: skip
        parts = {key: checkpoint.encoded(value) for key, value in described.items()}
        checkpoint.write_encoded(folder / "search.json", {"plan": self._plan_text, **parts})

    @cached_property
    def _plan_text(self) -> str:
        return checkpoint.encoded(self.plan)

    @classmethod
    def load(
        cls, folder: Path, plan: dict[str, Any], settings: TrainSettings, device: torch.device
    ) -> SearchState:
        """Read the state that `save` wrote.

        Raises:
            ValueError: If a file is missing or damaged, or if the checkpoint has another plan.
        """
        keys = ("plan", "results", "current", "held", "trained")
        described = checkpoint.read_json(folder / "search.json", *keys)
        if described["plan"] != plan:
            other = described["plan"]
            changed = sorted(key for key in {*plan, *other} if plan.get(key) != other.get(key))
            raise ValueError(f"{folder}: checkpoint of another search, differing in {', '.join(changed)}")
        current = TrainState.load(folder / "current", settings, device) if described["current"] else None
        held = {name: TrainState.load(folder / "held" / name, settings, device) for name in described["held"]}
        trained = {
            name: checkpoint.load_network(folder / "trained" / name, device) for name in described["trained"]
        }
        return cls(plan, described["results"], current, held, trained)
