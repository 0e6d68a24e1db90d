"""The base class of configuration sections, and the validation of values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pipelines.errors import UserError

S = TypeVar("S", bound=BaseModel)
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # in a field "seed" or "seeds"
# YAML reads `on` and `off` as booleans
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value),
]
LARGEST_INT, LARGEST_FLOAT = 10**12, 1e30  # of any other number


class Section(BaseModel):
    """A part of the configuration. It refuses unknown keys and numbers that are not finite or too large."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _finite(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name not in ("seed", "seeds"):
            _check_numbers(value)
        return value


def _check_numbers(value: object) -> None:
    """Check the numbers of a value, also of one that has no type.

    Raises:
        ValueError: For NaN, infinity, or a number that is too large.
    """
    if isinstance(value, Mapping):
        for inner in value.values():
            _check_numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_numbers(inner)
    elif isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        raise ValueError(f"expected a finite number of at most {LARGEST_FLOAT:g}")
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"expected a whole number of at most {LARGEST_INT}")


def checked(model: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Validate `values` as a `model`; one error names every wrong key.

    Args:
        where: Prefix of the keys in the message, as the user writes it (`source.options`).

    Raises:
        UserError: For a wrong key or value; the remedy names the nearest valid keys.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [_problem(model, dict(found), where) for found in error.errors()]
        raise UserError(
            "; ".join(problem for problem, _ in problems),
            where=where or "configuration",
            remedy="; ".join(dict.fromkeys(remedy for _, remedy in problems)),
            wrong_use=True,
        ) from error


def _problem(model: type[BaseModel], found: dict[str, Any], where: str) -> tuple[str, str]:
    path = [str(part) for part in found["loc"]]
    name = ".".join([where, *path] if where else path)
    if found["type"] == "missing":
        return f"{name} is missing", f"add {name}: {_meaning(model, path)}"
    if found["input"] is None and found["type"].startswith(("model", "dict")):
        return f"{name} is empty", f"give {name} a key, or remove its line"
    if found["type"] != "extra_forbidden":
        return f"{name}: {found['msg']}, got {clip(repr(found['input']))}", "correct the value"
    valid = list(_keys_at(model, path[:-1]))
    nearest = difflib.get_close_matches(path[-1], valid, n=3) or valid
    return f"unknown key {name}", f"did you mean {', '.join(nearest)}?"


def clip(text: str, most: int = 100) -> str:
    """The beginning of a text."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _meaning(model: type[BaseModel], path: list[str]) -> str:
    """The description of a key."""
    field = _section_at(model, path[:-1]).model_fields.get(path[-1])
    return (field.description if field is not None else None) or path[-1]


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section that `path` leads to from `model`."""
    return list(_section_at(model, path).model_fields)


def _section_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        field = model.model_fields.get(part)
        inner = [] if field is None else [field.annotation, *get_args(field.annotation)]
        sections = [t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)]
        if not sections:
            break
        model = sections[0]
    return model
