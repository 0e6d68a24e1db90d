"""A comparison over planted problems: `python -m bench.planted_problems FOLDER PROBLEMS [OVERRIDES]`.

The seeds of `dmtg compare` are those of the networks: intervals hold for one data set. Here seed s is that of a
problem, too (`source.options.seed`), and intervals hold for problems of this kind. `compare.json` is written into
the folder of the first problem, after the cells of the others have been copied there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.compare.driver import ComparisonResult, compare
from pipelines.compare.job import CELLS
from pipelines.config.loading import load_config


def compare_problems(folder: Path, count: int, overrides: Sequence[str]) -> ComparisonResult:
    """Compare methods on planted problems 1 to `count`, and then on all of them as one comparison.

    Args:
        folder: The output folder.
        count: Number of problems.
        overrides: Changes to the recipe `planted`.
    """

    def compared(problem: int, seeds: Sequence[int]) -> ComparisonResult:
        own = folder / str(problem)
        given = [f"name=problem{problem}", f"data.shards={own / 'shards'}", f"run.root={own / 'runs'}"]
        given += ["track.uri=none", f"compare.seeds={[*seeds]}", *overrides, f"source.options.seed={problem}"]
        return compare(load_config("planted", given), print)

    first, *others = [compared(problem, [problem]) for problem in range(1, count + 1)]
    for other in others:
        for name in (other.folder / CELLS).files():
            (first.folder / CELLS / name).write_bytes((other.folder / CELLS / name).read_bytes())
    return compared(1, range(1, count + 1))


if __name__ == "__main__":
    target, problems, *changes = sys.argv[1:]
    print(compare_problems(Path(target).resolve(), int(problems), changes).page)
