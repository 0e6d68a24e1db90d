"""Errors of work that ran elsewhere: their causes, and the error for the user among them."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.errors import UserError


class LostProcessError(RuntimeError):
    """The process of a task was lost, also after retries. The text says how, as far as it is known."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and every error that it wraps, by Python's chaining or in an attribute of Ray's errors."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += [current.__cause__, current.__context__]
        todo += [getattr(current, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
        todo += list((getattr(current, "worker_failures", None) or {}).values())


def user_error(error: BaseException) -> UserError | None:
    """The `UserError` that a task or worker raised, at any depth of wrapping."""
    return next((one for one in causes(error) if isinstance(one, UserError)), None)
