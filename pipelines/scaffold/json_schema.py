"""The JSON schema of a configuration file, for completion and checks in an editor."""

from __future__ import annotations

from typing import Any

from dmtg_core.network.encoders import ENCODERS
from dmtg_core.training.aggregation import AGGREGATORS
from pipelines.config.loading import Config
from pipelines.config.ray_section import RaySection
from pipelines.data.sources import SOURCES, options_model

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BASE = {
    "type": "string",
    "description": "recipe that ships, or file relative to this one, which this file is laid over",
}


def config_schema() -> dict[str, Any]:
    """What a configuration file can hold; a file with a `base` needs to name nothing else.

    Options of `source` are those of the reader that `source.kind` names.
    """
    schema = Config.model_json_schema()
    sections = schema["$defs"]
    needed = {"required": schema.pop("required")}
    needed["properties"] = {
        key: {"required": sections[section].pop("required")}
        for key, section in (("data", "DataSection"), ("source", "SourceSection"))
    }
    needed["properties"]["source"]["type"] = ["object", "null"]
    schema |= {"$schema": DIALECT, "title": "Configuration of dmtg", "if": {"required": ["base"]}, "else": needed}
    schema["properties"] = {"base": BASE, **schema["properties"]}
    sections["SourceSection"]["properties"]["kind"]["enum"] = list(SOURCES)
    sections["NetworkSection"]["properties"]["encoder"]["enum"] = list(ENCODERS)
    sections["TrainSection"]["properties"]["aggregator"]["enum"] = ["sum", *AGGREGATORS]
    sections["SourceSection"]["allOf"] = [_options(kind, sections) for kind in SOURCES]
    plain: dict[str, Any] = _plain(schema)
    return plain


def ray_schema() -> dict[str, Any]:
    """What `ray_config.yaml` can hold."""
    plain: dict[str, Any] = _plain({"$schema": DIALECT, **RaySection.model_json_schema()})
    return plain


def _options(kind: str, sections: dict[str, Any]) -> dict[str, Any]:
    """The rule for the options of one reader; what its schema refers to is put among the sections."""
    options = options_model(kind).model_json_schema()
    sections |= options.pop("$defs", {})
    options.pop("required", None)  # a base, or a word on the command line, may give them
    sections[options["title"]] = options
    return {
        "if": {"required": ["kind"], "properties": {"kind": {"const": kind}}},
        "then": {"properties": {"options": {"$ref": f"#/$defs/{options['title']}"}}},
    }


def _plain(value: Any) -> Any:
    """The same in words that editors know in any dialect: two numbers are an array of two, not a prefix."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    plain = {key: _plain(inner) for key, inner in value.items()}
    if isinstance(prefix := plain.get("prefixItems"), list):
        assert all(item == prefix[0] for item in prefix), "of one kind"
        plain["items"] = prefix[0]
        del plain["prefixItems"]
    return plain
