"""The page of a data set."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

from pipelines.report.dataset import frequent_reasons
from pipelines.storage import locate


def test_a_large_quarantine_file_is_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "_quarantine.jsonl").open("w") as file:
        for i in range(20_000):
            reason = f"{i}.jpg: {'cut off' if i % 4 else 'no label'} {'x' * 500}"
            file.write(json.dumps({"id": f"{i}.jpg", "split": "train", "reason": reason}) + "\n")
    tracemalloc.start()
    reasons = frequent_reasons(locate(str(tmp_path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(one["count"], one["id"]) for one in reasons] == [(15_000, "1.jpg"), (5_000, "0.jpg")]
    assert (tmp_path / "_quarantine.jsonl").stat().st_size > 10 * 2**20
    assert peak < 2 * 2**20
