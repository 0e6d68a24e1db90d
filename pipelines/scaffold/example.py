"""The table of the demo: nine faults of three machines, heard by sixteen microphones."""

from __future__ import annotations

import csv
import io

from dmtg_core.evaluation.planted import planted
from pipelines.storage import Location

# the tasks of the recipe `hall`; task n depends on machine n mod 3
FAULTS = (
    "pump_leak", "fan_dirt", "press_leak", "pump_wear", "fan_wear", "press_wear", "pump_heat", "fan_loose",
    "press_heat",
)  # fmt: skip
MICROPHONES = 16
ROWS = 8000


def write_hall(target: Location) -> None:
    """Write the table as CSV, unless the file exists.

    The problem is `dmtg_core.evaluation.planted.planted` with three groups: each microphone hears all machines,
    and each fault depends on two directions of sound, which are those of its machine.
    """
    if target.exists():
        return
    _, tasks, splits, _ = planted(0, tasks=len(FAULTS), groups=3, features=MICROPHONES, rows=ROWS)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*(f"microphone_{i + 1}" for i in range(MICROPHONES)), *FAULTS, "split"])
    for split, arrays in splits.items():
        labels = [arrays.labels[task.name] for task in tasks]
        for row, levels in enumerate(arrays.inputs):
            table.writerow([*(f"{level:.4f}" for level in levels), *(int(label[row]) for label in labels), split])
    target.write_text(text.getvalue())
