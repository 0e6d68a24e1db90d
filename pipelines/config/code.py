"""The code of other packages that a configuration names, which is what it allows to be imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from dmtg_core.addresses import Code, CodeError, allow_code, full_name, is_address, is_allowed, recorded
from pipelines.config.sections import KINDS
from pipelines.errors import UserError

if TYPE_CHECKING:  # a configuration is read without torch
    from dmtg_core.tasks import Task

Pair = tuple[str, str]  # kind and address


def code_named(values: Mapping[str, Any]) -> tuple[Pair, ...]:
    """Kind and address of all code that a configuration names, short names of entry points included.

    Args:
        values: The sections of a configuration.
    """
    from dmtg_core.network.encoders import ENCODERS  # imports torch
    from dmtg_core.tasks import LOSSES, METRICS

    source = values.get("source") or {}
    named = [("encoder", values["network"]["encoder"]), ("aggregator", values["train"]["aggregator"])]
    named += [("source", source.get("kind", "")), *_of_tasks(source.get("options", {}))]
    named += [("method", name) for name in values["compare"]["methods"]]
    known = {
        "encoder": ENCODERS,
        "source": KINDS,
        "loss": ["", *chain(*LOSSES.values())],
        "metric": ["", "auto", *chain(*METRICS.values())],
    }
    full = ((kind, full_name(kind, name, known.get(kind, ()))) for kind, name in named)
    return tuple(dict.fromkeys(pair for pair in full if is_address(pair[1])))


def _of_tasks(values: Any) -> Iterator[Pair]:
    """The losses and metrics anywhere in the options of a reader."""
    if isinstance(values, Mapping):
        yield from ((key, values[key]) for key in ("loss", "metric") if isinstance(values.get(key), str))
        values = list(values.values())
    for value in values if isinstance(values, list | tuple) else ():
        yield from _of_tasks(value)


def records_of(
    values: Mapping[str, Any], tasks: Iterable[Task] = (), *, methods: bool = False
) -> list[dict[str, str]]:
    """The records of the code of a configuration and of tasks; they have no version where the code is missing.

    Args:
        values: The sections of the configuration.
        tasks: The tasks.
        methods: Whether the methods of a comparison count.
    """
    from dmtg_core.own_code import code_of_tasks  # imports torch

    pairs = dict.fromkeys((*code_named(values), *code_of_tasks(tasks)))
    return [_record(*pair).to_dict() for pair in pairs if methods or pair[0] != "method"]


def _record(kind: str, address: str) -> Code:
    try:
        return recorded(kind, address)
    except CodeError:  # a reader is not needed where its shards are trained on
        return Code(kind, address)


def allow_named(values: Mapping[str, Any]) -> None:
    """Allow the import of `code_named` in this process; with `run.trust_code`, also if it has changed."""
    allow_code(*(address for _, address in code_named(values)), changed=values["run"]["trust_code"])


def check_allowed(pairs: Iterable[Pair], *, trust_code: bool) -> None:
    """Check that the code that shards name is allowed, or allow it.

    Raises:
        UserError: For the first code that is not.
    """
    for kind, address in pairs:
        if trust_code:
            allow_code(address, changed=True)
        elif not is_allowed(address):
            raise UserError(
                f"the shards name the {kind} {address}, and the configuration does not: it is not imported",
                where="data.shards",
                remedy="name it in source.options, or allow it with run.trust_code=true (--trust-code)",
                wrong_use=True,
            )
