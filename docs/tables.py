"""The reference of commands and of the configuration, as Markdown made from the code itself."""

from __future__ import annotations

import html
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from typer import Context
from typer.main import get_command

from dmtg_core.network.encoders import ENCODERS
from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.config.validation import Section
from pipelines.data.sources import SOURCES, options_model
from pipelines.data.sources.labels import LabelTask
from pipelines.recipes import recipes

TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
}


def each_command() -> Iterator[tuple[str, Any, Context]]:
    """Words that call it, command and context of every command; a group comes before its own."""

    def below(words: str, command: Any, parent: Context | None) -> Iterator[tuple[str, Any, Context]]:
        context = Context(command, info_name=words.rpartition(" ")[2], parent=parent)
        yield words, command, context
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            inner = command.get_command(context, name)
            if not inner.hidden:
                yield from below(f"{words} {name}", inner, context)

    yield from below("dmtg", get_command(app), None)


def commands() -> str:
    """Every command with its arguments and options."""
    parts = []
    for words, command, context in each_command():
        if words == "dmtg":
            continue
        level = "#" * len(words.split())
        usage = " ".join([words, *command.collect_usage_pieces(context)])
        parts.append(f"{level} {words}\n\n{_prose(command.help or '')}\n\n```text\n{usage}\n```\n")
        rows = [
            (f"`{record[0]}`", _prose(record[1]))
            for parameter in command.get_params(context)
            if parameter.name != "help" and (record := _record(parameter, context))
        ]
        parts.append(_table(("argument or option", "what it is"), rows))
    return "\n".join(parts)


def _record(parameter: Any, context: Context) -> tuple[str, str] | None:
    """How it is written, and what it is for; None for a parameter that is hidden."""
    found: tuple[str, str] | None = parameter.get_help_record(context)
    return found


def configuration() -> str:
    """Every key of every section, the options of every source, and those of every encoder."""
    schema = Config.model_json_schema()
    parts = ["## Top level\n", _keys({**schema, "properties": _simple(schema)}, schema)]
    for name, held in schema["properties"].items():
        section = _section(held, schema)
        if section is not None:
            parts += [f"## {name}\n", f"{section.get('description', '')}\n", _keys(section, schema, f"{name}.")]
    parts.append("## source.options\n\nThey depend on `source.kind`.\n")
    parts += [_options(kind) for kind in SOURCES]
    parts += ["### Tasks of a table\n", _of_model(LabelTask, "tasks[].")]
    parts.append("## network.options\n\nThey depend on `network.encoder`.\n")
    parts += [_encoder(name) for name in ENCODERS]
    parts.append("## Recipes\n\nA name that `-c` and `base:` take.\n")
    parts.append("\n".join(f"- `{name}`" for name in recipes()) + "\n")
    return "\n".join(parts)


def _section(held: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema that a key refers to, where it is a section."""
    named = [one["$ref"] for one in (held, *held.get("anyOf", ()), *held.get("allOf", ())) if "$ref" in one]
    return schema["$defs"][named[0].rpartition("/")[2]] if named else None


def _simple(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {name: held for name, held in schema["properties"].items() if _section(held, schema) is None}


def _keys(section: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = "") -> str:
    rows: list[tuple[str, ...]] = []
    for name, held in section["properties"].items():
        inner = _section(held, schema)
        if inner is not None:
            rows += _rows(inner, f"{prefix}{name}.", schema)
        else:
            rows.append(_row(name, held, prefix, schema, name in section.get("required", ())))
    return _table(("key", "value", "default", "what it is"), rows)


def _rows(section: Mapping[str, Any], prefix: str, schema: Mapping[str, Any]) -> list[tuple[str, ...]]:
    needed = section.get("required", ())
    return [_row(name, held, prefix, schema, name in needed) for name, held in section["properties"].items()]


def _row(
    name: str, held: Mapping[str, Any], prefix: str, schema: Mapping[str, Any], required: bool
) -> tuple[str, ...]:
    default = "required" if required else f"`{json.dumps(held.get('default'), ensure_ascii=False)}`"
    if not required and "default" not in held:
        default = "empty"
    return f"`{prefix}{name}`", _type(held, schema), default, _prose(held.get("description", ""))


def _type(held: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What values a key takes, in words."""
    if "anyOf" in held:
        return ", or ".join(dict.fromkeys(_type(one, schema) for one in held["anyOf"]))
    if "$ref" in held:
        names = schema["$defs"][held["$ref"].rpartition("/")[2]]["properties"]
        return f"keys {', '.join(f'`{name}`' for name in names)}"
    if "enum" in held or "const" in held:
        return ", ".join(f"`{value}`" for value in held.get("enum", [held.get("const")]))
    if held.get("type") == "array":
        return _list_type(held, schema)
    if held.get("type") == "object":
        inner = held.get("additionalProperties")
        return f"name → {_type(inner, schema)}" if isinstance(inner, dict) and inner else "keys and values"
    return f"{TYPES.get(held.get('type', ''), 'any')}{_range(held)}"


def _list_type(held: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The same for a list; one whose places differ names each."""
    if "prefixItems" in held:
        return " and ".join(_type(one, schema) for one in held["prefixItems"])
    return f"list of: {_type(held['items'], schema)}" if held.get("items") else "list"


def _range(held: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {held[key]:g}" for key, sign in signs.items() if key in held]
    return f", {', '.join(bounds)}" if bounds else ""


def _options(kind: str) -> str:
    return f"### {kind}\n\n{_of_model(options_model(kind), 'source.options.')}"


def _of_model(model: type[Section], prefix: str) -> str:
    schema = model.model_json_schema()
    text = "" if model.__doc__ == Section.__doc__ else inspect.getdoc(model)
    return f"{_prose(text or '', cell=False)}\n\n{_keys(schema, schema, prefix)}"


def _encoder(name: str) -> str:
    build, kind = ENCODERS[name]
    options = [one for one in inspect.signature(build).parameters.values() if one.kind is one.KEYWORD_ONLY]
    rows = [
        (f"`network.options.{one.name}`", "required" if one.default is one.empty else f"`{_plain(one.default)}`")
        for one in options
    ]
    text = f"### {name}\n\nReads {kind}. {_encoder_text(build)}\n\n"
    return text + (_table(("key", "default"), rows) if rows else "It has no options.\n")


def _encoder_text(build: Any) -> str:
    """A docstring of an encoder, with its arguments as a list."""
    text, _, rest = (inspect.getdoc(build) or "").partition("\n\nArgs:\n")
    arguments = rest.partition("\n\nRaises:")[0]
    listed = re.sub(r"^ {4}(\w+): ", r"- `\1`: ", arguments, flags=re.MULTILINE)
    kept = [one for one in re.split(r"^(?=- )", listed, flags=re.MULTILINE) if not one.startswith("- `spec`")]
    return f"{_prose(text, cell=False)}\n\n{''.join(kept)}"


def _plain(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _prose(text: str, *, cell: bool = True) -> str:
    """Text of a docstring in a page: nothing in it is HTML; in a table it is one line."""
    parts = text.split("`")
    safe = "`".join(part if i % 2 else html.escape(part, quote=False) for i, part in enumerate(parts))
    return re.sub(r"\s*\n\s*", " ", safe).replace("|", "\\|") if cell else safe


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table, without columns that are empty."""
    used = [any(row[i] for row in rows) for i in range(len(head))]
    lines = [tuple(cell for cell, wanted in zip(row, used, strict=True) if wanted)
             for row in (head, ("---",) * len(head), *rows)]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"
