"""The names of slow imports, which are printed when an import begins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# packages whose import takes seconds on a busy machine
SLOW = {"torch": "PyTorch", "mlflow": "MLflow", "ray": "Ray", "torchvision": "torchvision"}


class _ImportNames:
    """A finder of modules that finds none: Python asks it before it imports a module for the first time."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.left = dict(SLOW)

    def find_spec(self, name: str, *_: object) -> None:
        """Log the name of a slow package, and leave the import to the next finder."""
        shown = self.left.pop(name, "")
        if shown:
            self.log(f"importing {shown}")


@contextmanager
def naming_imports(log: Callable[[str], None]) -> Iterator[None]:
    """Log the name of each slow package when its import begins, wherever it is imported."""
    finder = _ImportNames(log)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
