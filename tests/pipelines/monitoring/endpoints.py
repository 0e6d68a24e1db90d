"""Reads endpoints in Prometheus' text format."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


def read(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """The samples of an endpoint of this machine: name → labels → value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return parsed(answer.read().decode())


def parsed(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """The samples of a text: name → labels → value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


@dataclass
class Reader:
    """What an endpoint has had while a block ran."""

    port: int
    last: dict[str, dict[tuple[tuple[str, str], ...], float]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def __call__(self) -> None:
        """Read it once; nothing if it is not open."""
        try:
            found = read(self.port)
        except OSError:
            return
        self.last = found or self.last
        self.names |= set(found)


@contextmanager
def reading(port: int) -> Iterator[Reader]:
    """Read an endpoint again and again in the block."""
    reader, stop = Reader(port), threading.Event()

    def loop() -> None:
        while not stop.wait(0.05):
            reader()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield reader
    finally:
        stop.set()
        thread.join()
