"""The text of a configuration file: a comment explains each value, and further options are commented out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.config.yaml_text import in_line
from pipelines.data.sources import options_model
from pipelines.scaffold.inference import Use

WIDTH = 110
Written = dict[str, Any]
WHY = {
    "name": "name of runs and registered models",
    "source.options.tasks": "kind: binary, multiclass or regression; to change what was assumed, change this "
    "word alone. metric: the figure that is compared; auto is auroc for binary, balanced_accuracy for multiclass "
    "and rmse for regression",
    "network.groups": "largest number of groups, K",
    "network.stem": "stages of the encoder that all groups share",
    "gate.learning_rate": "higher than that of the network, because the gate has few steps to converge",
    "train.epochs": "epochs of a run of naive MTL, the unit of search.budget",
    "train.patience": "early stopping: a training ends after so many epochs without a better validation score",
    "data.shards": "created by dmtg shard",
    "run.root": "holds a folder for each run",
}


@dataclass
class Draft:
    """The content of a configuration file before it is written.

    Args:
        kind: The reader.
        about: Text at the top of the file.
        values: Section → its keys and values in the file.
        why: Key, such as `network.groups` → reason for its value.
        uses: Use of each column.
        base: Name and configuration of the base of the file; None for a file without a base.
    """

    kind: str
    about: str
    values: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)
    uses: Sequence[Use] = ()
    base: tuple[str, Config] | None = None


NOT_OPTIONS = (("source", "kind"), ("source", "options"), ("run", "folder"))  # the last one is set by dmtg itself


def text_of(draft: Draft) -> str:
    """The text of the file. A line that begins with `#key:` is an option at its default value."""
    page = _Page(WHY | draft.why)
    page.note(
        f"{draft.about}. Every value can be changed. A line like #key: value is a further option with its default "
        "value: to change it, remove the #. The addresses of Ray and MLflow are in ray_config.yaml."
    )
    page.note("For completion in an editor, run dmtg config schema > dmtg.schema.json and add this first line:")
    page.note("(# yaml-language-server: $schema=dmtg.schema.json)")
    page.key("", "name", draft.values["name"])
    defaults = _defaults(draft)
    if draft.base is not None:
        page.key("", "base", draft.base[0])
    written = [key for key in Config.model_fields if isinstance(draft.values.get(key), dict)]
    for section in written:
        page.lines.append("")
        page.section(section, draft.values[section], getattr(defaults, section), draft)
    page.lines.append("")
    page.note("Sections with default values only. To change one, remove the # of its name as well.")
    for section in Config.model_fields:
        if section not in (*written, "name", "ray"):
            page.lines.append("")
            page.section(section, None, getattr(defaults, section), draft)
    return "\n".join(page.lines) + "\n"


def _defaults(draft: Draft) -> Config:
    """The configuration that holds the values of all keys that the file does not set."""
    if draft.base is not None:
        return draft.base[1]
    return checked(Config, {"name": draft.values["name"], **_sections(draft)})


def _sections(draft: Draft) -> dict[str, Any]:
    return {key: value for key, value in draft.values.items() if isinstance(value, dict)}


class _Page:
    """The lines of the file."""

    def __init__(self, why: Mapping[str, str]) -> None:
        self.lines: list[str] = []
        self.why = why

    def note(self, text: str, indent: str = "") -> None:
        """Add a comment, wrapped to lines."""
        self.lines += [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent) - 2)]

    def key(self, path: str, key: str, value: Any, indent: str = "") -> None:
        """Add a key with its value, and the reason for it as a comment."""
        why = self.why.get(f"{path}{key}", "")
        line = f"{indent}{_pair(key, value)}"
        if len(line) + len(why) + 4 <= WIDTH and "\n" not in line:
            self.lines.append(f"{line}  # {why}" if why else line)
            return
        if why:
            self.note(why, indent)
        self.lines += line.replace("\n", f"\n{indent}").split("\n")

    def option(self, key: str, value: Any, description: str, indent: str) -> None:
        """Add a key at its default value, commented out."""
        line = f"{indent}#{_pair(key, value, 10_000)}"
        if description and len(line) + len(description) + 4 <= WIDTH:
            self.lines.append(f"{line}  # {description}")
            return
        if description:
            self.note(description, indent)
        self.lines.append(line)

    def section(self, name: str, written: Written | None, default: Any, draft: Draft) -> None:
        """Add a section: its written keys, if any, then its other options, commented out."""
        model = type(default)
        self.note(_first_line(model))
        self.lines.append(f"{'#' if written is None else ''}{name}:")
        for key, value in (written or {}).items():
            if name == "source" and key == "options":
                self._reader(draft, value, default)
            else:
                self.key(f"{name}.", key, value, "  ")
        for key, info in model.model_fields.items():
            if key in (written or {}) or (name, key) in NOT_OPTIONS:
                continue
            value = default.model_dump(mode="json")[key]
            self.option(key, value, info.description or _first_line(type(getattr(default, key))), "  ")
        if name == "source" and "options" not in (written or {}):
            self._reader(draft, None, default)

    def _reader(self, draft: Draft, written: Written | None, default: Any) -> None:
        """Add the options of the reader, with the description of its options."""
        model = options_model(draft.kind)
        resolved = checked(model, default.options, "source.options").model_dump(mode="json")
        self.lines.append("  #options:" if written is None else "  options:")
        for key, value in (written or {}).items():
            if key != "tasks":
                self.key("source.options.", key, value, "    ")
                continue
            self.note(self.why["source.options.tasks"], "    ")
            self.lines.append("    tasks:")
            for task, use in zip(value, draft.uses, strict=False):
                line = f"      - {in_line(task)}"
                fits = len(line) + len(use.why) + 4 <= WIDTH
                self.lines += [f"{line}  # {use.why}"] if fits else [f"      # {use.why}", line]
        for paragraph in (model.__doc__ or "").split("\n\n"):
            self.note(" ".join(paragraph.replace("`", "").split()), "    ")
        for key, value in resolved.items():
            if key not in (written or {}) and _fits(model, {**default.options, key: value}):
                self.option(key, value, "", "    ")


def _pair(key: str, value: Any, width: int = WIDTH - 10) -> str:
    """A key and its value as YAML, wrapped if the line is long."""
    return f"{in_line(key)}: {in_line(value, width)}".replace("\n", "\n  ")


def _fits(model: type[BaseModel], options: Written) -> bool:
    """Whether the reader accepts these options together: some of them exclude others."""
    try:
        model.model_validate(options)
    except ValidationError:
        return False
    return True


def _first_line(model: type[BaseModel]) -> str:
    text = (model.__doc__ or "").strip().split("\n\n")[0] if issubclass(model, BaseModel) else ""
    return " ".join(text.split())
