"""`dmtg config new`: a commented configuration file, inferred from the data, with every option."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from dmtg_core.network.encoders.tabular import tabm_options
from dmtg_core.tables.cells import MISSING
from dmtg_core.tables.molecules import descriptor_names
from pipelines.config.loading import recipe_config
from pipelines.config.paths import relative
from pipelines.config.yaml_text import in_line
from pipelines.data.sources import SOURCES, options_model
from pipelines.data.sources.rows import MOST_NAMES, SPLIT_COLUMN, SPLITS, read_head
from pipelines.data.sources.tables.folders import is_parquet, is_table_folder
from pipelines.data.sources.tables.images import image_columns
from pipelines.data.sources.tables.parquet import is_columnar
from pipelines.errors import UserError
from pipelines.scaffold.comments import Draft, text_of
from pipelines.scaffold.drafts import (
    DROPOUT,
    inferred_from,
    of_options,
    row_options,
    row_uses,
    tasks_and_rest,
    training_sections,
)
from pipelines.scaffold.image_sets import folder_draft, image_table_draft, webdataset_draft
from pipelines.scaffold.inference import (
    HEAD_ROWS,
    ColumnSummary,
    Use,
    chosen_targets,
    feature,
    summaries,
)
from pipelines.scaffold.inputs import longest_text, molecules
from pipelines.storage import Location, locate

RECIPE_OF = {
    "celeba": "paper/celeba9_k2", "image_table": "cifar100", "nuclei": "nuclei", "nyuv2": "nyuv2",
    "planted": "planted", "rooms": "rooms", "taskonomy": "paper/taskonomy5_k3", "text": "goemotions",
    "webdataset": "cifar100_webdataset",
}  # fmt: skip
TABLES = (".csv", ".tsv", ".parquet", ".pq")


@dataclass(frozen=True)
class NewConfig:
    """A configuration file before it is written: its name, its text and the use of each column."""

    name: str
    text: str
    uses: Sequence[Use]


def new_config(kind: str, data: str, targets: Sequence[str], name: str, folder: str = "") -> NewConfig:
    """Create a configuration file for a data set.

    Args:
        kind: A reader of `SOURCES`; empty to infer it from the data.
        data: A table or a folder; can be empty for a source that has a recipe as its base.
        targets: Columns to predict, for a table, an image folder or a table of texts.
        name: Name of runs and models; empty to use that of the data.
        folder: Folder of the file, to which its paths are relative; empty for the working directory.

    Raises:
        UserError: For data that do not exist or cannot be read, and for targets that cannot be used.
    """
    place = locate(data) if data else None
    if place is not None and not place.exists():
        place.check_bucket()
        raise UserError("no such file or folder", where=str(place), remedy="correct the path", wrong_use=True)
    inferred = not kind
    kind = kind or _kind_of(place)
    options_model(kind)  # refuses an unknown kind
    if kind not in SOURCES:
        raise UserError(
            "a configuration for a reader of another package cannot be created",
            where="--source",
            remedy="write it by hand: source.kind, source.root and the source.options of the reader",
            wrong_use=True,
        )
    if place is None and kind in ("table", "folder"):
        raise UserError(
            f"a configuration for a {kind} needs the data",
            where="command line",
            remedy=f"write dmtg config new {'mydata.csv' if kind == 'table' else 'FOLDER'} --targets first,second",
            wrong_use=True,
        )
    name = name or _name_of(data or kind)
    if kind == "table":
        assert place is not None
        draft = _texts_of_table(data, place, targets) if inferred else None
        draft = draft or _table(data, place, targets)
    elif kind == "folder":
        assert place is not None
        draft = folder_draft(data, place, targets)
    elif kind == "image_table" and place is not None and (inferred or targets):
        draft = image_table_draft(data, place, targets)
    elif kind == "webdataset" and place is not None and (inferred or targets):
        draft = webdataset_draft(data, place, targets)
    elif kind == "text" and place is not None and (not place.is_dir() or is_table_folder(place)):
        draft = _text(data, place, targets)
    else:
        draft = _on_recipe(kind, data, targets)
    draft.values = {"name": name, **draft.values}
    draft.values["data"] = {"shards": f"work/{name}/shards"} | draft.values.get("data", {})
    draft.values["run"] = {"root": f"work/{name}/runs"}
    source = draft.values["source"]
    if folder not in ("", ".") and relative(source.get("root", "")):
        source["root"] = os.path.relpath(source["root"], folder)
    return NewConfig(name, text_of(draft), draft.uses)


def _kind_of(place: Location | None) -> str:
    if place is None:
        raise UserError(
            "no data and no source are named",
            where="command line",
            remedy=f"name a table or a folder of images, or --source, one of {', '.join(SOURCES)}",
            wrong_use=True,
        )
    if is_columnar(place.name) or (place.is_dir() and is_table_folder(place)):
        return "image_table" if image_columns(place) else "table"
    if not place.is_dir():
        return "table"
    names = [*_files(place), *place.folders()]
    # folders of Parquet files that Spark, pandas and datasets write
    if any(is_parquet(name) or "=" in name for name in names):
        return "image_table" if image_columns(place) else "table"
    if (place / "train" / "image" / "0.npy").exists() or (place / "train.h5").exists():
        return "nyuv2"
    first = next(iter(place.files()), "") if set(names) & set(SPLITS) else next(iter(_files(place)), "")
    return "webdataset" if first.endswith(".tar") else "folder"


def _name_of(data: str) -> str:
    stem = PurePosixPath(data.rstrip("/")).name
    for ending in TABLES:
        stem = stem.removesuffix(ending)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_") or "mine"


def _files(folder: Location) -> list[str]:
    return folder.files(recursive=False)


def _texts_of_table(data: str, place: Location, given: Sequence[str]) -> Draft | None:
    """The configuration for a table with a column of texts; None for another table."""
    if place.is_dir():
        return None
    columns = summaries(read_head(place, HEAD_ROWS)[0])
    names = chosen_targets(given, list(columns), str(place))
    rest = {name: column for name, column in columns.items() if name not in names}
    if longest_text(rest) is None or molecules(rest) is not None:
        return None
    return _text(data, place, given)


def _table(data: str, place: Location, given: Sequence[str]) -> Draft:
    rows, more = read_head(place, HEAD_ROWS)
    columns = summaries(rows)
    tasks, rest = tasks_and_rest(columns, given, place, more)
    molecule = molecules(rest)
    if molecule and not importlib.util.find_spec("rdkit"):
        return _ngrams(data, place, molecule, rest, tasks, (len(rows), more))
    rest = {name: column for name, column in rest.items() if column is not molecule}
    rows_by = row_uses(rest)
    inputs = [feature(column) for name, column in rest.items() if name not in [use.column for use in rows_by]]
    used = [use.column for use in inputs if use.use in ("number", "category", "date")]
    if not used and molecule is None:
        raise UserError(
            "no column is left to predict from", where=str(place),
            remedy="; ".join(f"{use.column}: {use.why}" for use in (*inputs, *rows_by)) or "name fewer targets",
        )  # fmt: skip
    options, why = row_options(rows_by, place)
    options["tasks"] = [dict(use.options) for use in tasks]
    if molecule:
        options |= {"smiles": molecule.name, "molecule_features": "descriptors"}
        why["smiles"] = _molecules_such_as(molecule)
        why["molecule_features"] = "descriptors of rdkit, such as mass, polar surface and number of rings"
    if len(used) < len(inputs) or (options.get("split_column", "") is None and SPLIT_COLUMN in rest):
        options["features"] = used
        out = [f"{use.column} ({use.why})" for use in inputs if use.use == "left out"]
        why["features"] = f"left out: {'; '.join(out)}" if out else "all but the split"
    options["categorical"] = [use.column for use in inputs if use.use == "category"]
    why["categorical"] = "categories, with one feature for each value; the other features are numbers"
    extra = [gap for column in columns.values() for gap in column.gaps if gap not in MISSING]
    if extra:
        options["missing"] = [*MISSING, *dict.fromkeys(extra)]
        why["missing"] = f"markers of an empty cell; {', '.join(dict.fromkeys(extra))} in columns of numbers"
    about = f"{len(tasks)} tasks that are predicted from {len(used) + bool(molecule)} columns, in {data}"
    options["scaling"] = "quantile"
    why["scaling"] = "numbers are mapped to a normal distribution by their quantiles, for the encoder tabm"
    numbers = sum(use.use in ("number", "date") for use in inputs)
    numbers += len(descriptor_names()) if molecule else 0
    sizes = {**tabm_options(len(rows), numbers), "dropout": DROPOUT}
    values = {
        "source": {"kind": "table", "root": data, "options": options},
        **training_sections("tabm", 0, sizes, len(tasks), len(rows), None),
    }
    uses = [*tasks, *rows_by, *([Use(molecule.name, "molecules", "SMILES")] if molecule else []), *inputs]
    return Draft("table", inferred_from(about, len(rows), more), values, of_options(why), uses)


def _molecules_such_as(column: ColumnSummary) -> str:
    return f"molecules as SMILES, such as {next(iter(column.counts))[:40]}"


def _ngrams(
    data: str,
    place: Location,
    column: ColumnSummary,
    rest: dict[str, ColumnSummary],
    tasks: Sequence[Use],
    seen: tuple[int, bool],
) -> Draft:
    """The configuration for molecules without rdkit; `seen`: the number of rows, and whether there are more."""
    rest.pop(column.name)
    rows_by = row_uses(rest)
    options, why = row_options(rows_by, place)
    options["tasks"] = [dict(use.options) for use in tasks]
    options["smiles"] = column.name
    others = _others(rest, rows_by)
    why["smiles"] = _molecules_such_as(column) + (
        f"; they are the only input, because a sample has one; not read: {others}; to predict from these instead, "
        f"remove smiles and molecule_features and add features: [{others}]"
        if others
        else ""
    )
    options["molecule_features"] = "ngrams"
    why["molecule_features"] = (
        "neighbouring characters; the descriptors of rdkit have fewer errors: pip install 'dmtg[molecules]', and "
        "create this file again"
    )
    values = {
        "source": {"kind": "table", "root": data, "options": options},
        **training_sections("mlp", 0, {"widths": [256, 128], "dropout": DROPOUT}, len(tasks), seen[0], 1e-3),
    }
    uses = [*tasks, *rows_by, Use(column.name, "molecules", "SMILES")]
    about = f"{len(tasks)} tasks on the molecules of {data}"
    return Draft("table", inferred_from(about, *seen), values, of_options(why), uses)


def _others(rest: Mapping[str, ColumnSummary], rows_by: Sequence[Use]) -> str:
    """The columns that are neither target, id, split nor the input, as a list of YAML; empty if there are none."""
    taken = [use.column for use in rows_by]
    return in_line([name for name in rest if name not in taken][:MOST_NAMES])[1:-1]


def _text(data: str, place: Location, given: Sequence[str]) -> Draft:
    rows, more = read_head(place, HEAD_ROWS)
    columns = summaries(rows)
    tasks, rest = tasks_and_rest(columns, given, place, more)
    if not rest:
        raise UserError("no column is left for the texts", where=str(place), remedy="name fewer targets")
    text = longest_text(rest) or max(rest.values(), key=lambda column: sum(map(len, column.cells)))
    rest.pop(text.name)
    rows_by = row_uses(rest)
    options, why = row_options(rows_by, place)
    root, _, file = data.rpartition("/")
    options = {"file": file, "text_column": text.name, **options}
    others = _others(rest, rows_by)
    why["text_column"] = "the column with the longest texts" + (
        f"; it is the only input, because a sample has one; not read: {others}; to predict from these instead, "
        "dmtg config new --source table"
        if others
        else ""
    )
    options["tasks"] = [dict(use.options) for use in tasks]
    values = {
        "source": {"kind": "text", "root": root or ("/" if data.startswith("/") else "."), "options": options},
        **training_sections(
            "embedding_bag",
            0,
            {"embedding": 64, "widths": [128, 64], "dropout": DROPOUT},
            len(tasks),
            len(rows),
            5e-3,
        ),
    }
    about = f"{len(tasks)} tasks on the texts of {data}"
    uses = [*tasks, *rows_by, Use(text.name, "text", why["text_column"])]
    return Draft("text", inferred_from(about, len(rows), more), values, of_options(why), uses)


def _on_recipe(kind: str, data: str, targets: Sequence[str]) -> Draft:
    if targets:
        raise UserError(
            f"--targets has no meaning for {kind}: its reader knows its tasks",
            where="command line",
            remedy="remove it, and choose tasks with data.tasks",
            wrong_use=True,
        )
    recipe = RECIPE_OF[kind]
    base = recipe_config(recipe)
    assert base.source is not None
    values = {"source": {"root": data or base.source.root}}
    why = {
        "source.root": "folder of the raw data" if base.source.given or data else "set the folder of the raw data"
    }
    about = f"The recipe {recipe} with its own folders; values that are not written here are those of the recipe"
    return Draft(kind, about, values, why, base=(recipe, base))
