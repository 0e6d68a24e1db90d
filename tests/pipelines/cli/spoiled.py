"""Configurations and tables that are spoiled at random places, each the same for the same number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import yaml

Random = np.random.Generator

ROWS = 80
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 0.5, 2**31, 2**64, 10**30, -(10**30), 1e308, float("inf"), float("nan"), "", " ", "x",
    "../../x", "/", "s3://", "s3://me:hush@b/x", "http://[::1/x", "a\nb", "\x1b[2J", "\u202e", "x" * 5000, [],
    [None], [-3], [0], ["x"], {}, {"x": 1}, {1: 2}, [[[]]],
)  # fmt: skip
TEXTS = (
    b"\t", b"{", b"}", b"[", b"&a ", b"*a", b"!!python/object:os.system ", b"\xff\xfe", b"\0", b": ", b"- ", b'"',
)  # fmt: skip
CELLS = (
    b"", b"inf", b"-inf", b"nan", b"1e400", b"1e38", b"x", b'"', b'"a', b"a\0b", b"\xff", b"1,2", b"1;2",
    b"\x1b[2J", "\u202e".encode(), b"=1+1", b"0x1F", b"1_000", b"2026-02-31", b"True", b" 1 ", b"9" * 400,
    b"x" * 200_000,
)  # fmt: skip


def table() -> bytes:
    """A table of two features, a binary, a multiclass and a regression target."""
    rows = [f"{i % 7}.{i % 3},{i * i % 11},{i % 2},{'abc'[i % 3]},{i / 10}" for i in range(ROWS)]
    return ("x,y,yes,kind,size\n" + "\n".join(rows) + "\n").encode()


def config(root: str, work: str) -> dict[str, Any]:
    """A configuration that trains on the table."""
    tasks = [
        {"column": "yes", "kind": "binary"},
        {"column": "kind", "kind": "multiclass"},
        {"column": "size", "kind": "regression"},
    ]
    return {
        "name": "spoiled",
        "source": {"kind": "table", "root": root, "options": {"tasks": tasks}},
        "data": {"shards": f"{work}/shards", "rows_per_shard": 30, "min_support": 2},
        "network": {"encoder": "mlp", "groups": 2, "stem": 0, "options": {"widths": [8, 4]}},
        "gate": {"sampling": "gumbel", "temperature": {"family": "constant", "start": 2.5}},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "seed": 1},
        "search": {"method": "dmtg", "starts": 1},
        "track": {"uri": "none"},
        "run": {"root": f"{work}/runs", "name": ""},
        "ray": {"executor": "embedded", "workers": 1},
    }


def _one(values: Sequence[Any], rng: Random) -> Any:
    return values[rng.integers(len(values))]


def _places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in [(*above, key), *_places(value[key], (*above, key))]]


def _replaced(values: dict[str, Any], rng: Random) -> dict[str, Any]:
    *path, last = _one(_places(values), rng)
    holder: Any = values
    for key in path:
        holder = holder[key]
    change = rng.integers(4)
    if change == 0 and isinstance(holder, dict):
        holder[f"{last}s"] = holder.pop(last)  # an unknown key
    elif change == 1:
        del holder[last]
    else:
        holder[last] = copy.deepcopy(_one(VALUES, rng))
    return values


def spoiled_config(number: int, root: str, work: str) -> bytes:
    """The text of a configuration with one or two changes, of values or of bytes."""
    rng = np.random.default_rng(number)
    values = config(root, work)
    if number % 4:
        for _ in range(rng.integers(1, 3)):
            values = _replaced(values, rng)
        return yaml.safe_dump(values, sort_keys=False).encode()
    text = yaml.safe_dump(values, sort_keys=False).encode()
    at = rng.integers(len(text))
    return text[:at] + (_one(TEXTS, rng) + text[at:] if rng.random() < 0.8 else b"")


def _cell(data: bytes, rng: Random) -> bytes:
    lines = data.split(b"\n")
    row = rng.integers(len(lines) - 1)
    cells = lines[row].split(b",")
    cells[rng.integers(len(cells))] = _one(CELLS, rng)
    lines[row] = b",".join(cells)
    return b"\n".join(lines)


def _column(data: bytes, rng: Random) -> bytes:
    lines = [line.split(b",") for line in data.split(b"\n") if line]
    at, value = rng.integers(5), _one(CELLS, rng)
    return b"\n".join(b",".join([*line[:at], value, *line[at + 1 :]]) for line in lines)


def _bytes(data: bytes, rng: Random) -> bytes:
    at = rng.integers(len(data))
    return data[:at] + _one(CELLS, rng) + data[at:]


CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _cell, _column, _bytes,
    lambda data, rng: data[: rng.integers(len(data))],
    lambda data, rng: data.replace(b",", _one([b";", b"\t", b",,", b" "], rng)),
    lambda data, rng: data.replace(b"\n", _one([b"\r", b"\r\n\r\n", b"", b"\n\n"], rng)),
    lambda data, rng: data.decode().encode(_one(["utf-16", "utf-32"], rng)),
    lambda data, rng: rng.bytes(500),
    lambda data, rng: data.replace(b"x,y", _one([b"x,x", b",", b"yes,y", b"id,split", b"\xefx,y"], rng), 1),
)  # fmt: skip


def spoiled_table(number: int) -> bytes:
    """The bytes of a table with one change."""
    rng = np.random.default_rng(number)
    return CHANGES[number % len(CHANGES)](table(), rng)
