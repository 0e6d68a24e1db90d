"""The JSON schema of a configuration file, for completion and checks in an editor."""

from __future__ import annotations

from typing import Any

from dmtg_core.addresses import PATTERN, short_names
from dmtg_core.network.encoders import ENCODERS
from dmtg_core.training.aggregation import AGGREGATORS
from pipelines.config.loading import Config
from pipelines.config.ray_section import RaySection
from pipelines.data.sources import SOURCES, options_model

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BASE = {
    "type": "string",
    "description": "Base that this file is merged into: a recipe, or a file relative to this one.",
}


def config_schema() -> dict[str, Any]:
    """The schema of a configuration file. A file with a `base` needs no other key.

    The options of `source` are those of the reader that `source.kind` names.
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
    for section, key, kind, names in (
        ("SourceSection", "kind", "source", SOURCES),
        ("NetworkSection", "encoder", "encoder", ENCODERS),
        ("TrainSection", "aggregator", "aggregator", ["sum", *AGGREGATORS]),
    ):
        known = [*names, *short_names(kind)]
        sections[section]["properties"][key]["anyOf"] = [{"enum": known}, {"pattern": PATTERN}]
    sections["SourceSection"]["allOf"] = [_options(kind, sections) for kind in SOURCES]
    plain: dict[str, Any] = _plain(schema)
    return plain


def ray_schema() -> dict[str, Any]:
    """The schema of `ray_config.yaml`."""
    plain: dict[str, Any] = _plain({"$schema": DIALECT, **RaySection.model_json_schema()})
    return plain


def _options(kind: str, sections: dict[str, Any]) -> dict[str, Any]:
    """The rule for the options of one reader; definitions of its schema are added to the sections."""
    options = options_model(kind).model_json_schema()
    sections |= options.pop("$defs", {})
    options.pop("required", None)  # a base or an override can hold them
    sections[options["title"]] = options
    return {
        "if": {"required": ["kind"], "properties": {"kind": {"const": kind}}},
        "then": {"properties": {"options": {"$ref": f"#/$defs/{options['title']}"}}},
    }


def _plain(value: Any) -> Any:
    """The schema with keywords that editors know in every dialect: `items` in place of `prefixItems`."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    plain = {key: _plain(inner) for key, inner in value.items()}
    if isinstance(prefix := plain.get("prefixItems"), list):
        assert all(item == prefix[0] for item in prefix), "items of one type"
        plain["items"] = prefix[0]
        del plain["prefixItems"]
    return plain
