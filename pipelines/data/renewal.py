"""Whether shards are those of the configuration, and their renewal when the raw data has changed.

Shards belong to their raw data, its options and the version of the code. A command that trains compares them with
the configuration. Shards of the same raw data with other content are created again. Shards of raw data at another
address are not: another command may need them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from dmtg_core.names import listed
from pipelines.config.loading import Config
from pipelines.data.manifest import FILE, SPLITS, Manifest, read_manifest
from pipelines.data.raw_data import differences, identity, same_place
from pipelines.data.shards import shard
from pipelines.data.sources import build_source
from pipelines.data.statistics import moments
from pipelines.errors import UserError
from pipelines.execution.executor import Executor
from pipelines.storage import locate

MOST = 5  # phrases of each kind in a message
logger = logging.getLogger(__name__)


def ensure_shards(
    config: Config,
    progress: Callable[[str], None] = logger.info,
    executor: Executor | None = None,
    manifest: Manifest | None = None,
) -> Manifest:
    """The manifest of `data.shards`. Shards that do not exist, or whose raw data has changed, are created.

    Args:
        config: Configuration; without a source, the shards are used as they are.
        progress: Called with each line.
        executor: The executor of the command; by default one is opened if shards have to be created.
        manifest: Result of `ready_shards`, so that the raw data is not compared again.

    Raises:
        UserError: As `ready_shards` and `shard`.
    """
    return manifest or ready_shards(config, progress) or renew_shards(config, progress, executor)


def renew_shards(
    config: Config, progress: Callable[[str], None] = logger.info, executor: Executor | None = None
) -> Manifest:
    """Create the shards of which `ready_shards` has found none, or changed ones; arguments as `ensure_shards`.

    Raises:
        UserError: As `shard`.
    """
    before = read_manifest(locate(config.data.shards)) if (locate(config.data.shards) / FILE).exists() else None
    now = shard(config, progress, executor).manifest
    if before is not None:
        for change in changes(before, now):
            progress(f"changed: {change}")
    return now


def ready_shards(config: Config, progress: Callable[[str], None] = logger.info) -> Manifest | None:
    """The manifest of `data.shards`; None if the shards have to be created first.

    Raises:
        UserError: For shards of raw data at another address, and without shards and a source.
    """
    folder = locate(config.data.shards)
    if config.source is None or not config.source.given:
        return read_manifest(folder)
    if not (folder / FILE).exists():
        return None
    manifest = read_manifest(folder)
    try:
        changed = stale(config, manifest)
    except UserError as error:
        if not _as_recorded(config, manifest):
            raise
        progress(f"note: the raw data cannot be read ({error.what}): its shards are used as they are")
        return manifest
    if not changed:
        return manifest
    if not _same_root(config, manifest):
        raise UserError(
            f"these shards were created from {manifest.source['root'] or manifest.source['kind']}, "
            f"source.root is {config.source.root}",
            where=str(folder),
            remedy="set data.shards to another folder, or replace these shards with dmtg shard",
            wrong_use=True,
        )
    progress(f"the shards in {folder} are created again: {'; '.join(changed)}")
    return None


def stale_notes(config: Config, manifest: Manifest) -> list[str]:
    """A note if shards are not those of the configuration, for commands that do not create any."""
    if config.source is None or not config.source.given:
        return []
    try:
        changed = stale(config, manifest)
    except UserError:  # the raw data is elsewhere, as where models are evaluated
        return []
    return [f"the shards are not those of the raw data: {'; '.join(changed)}"] if changed else []


def stale(config: Config, manifest: Manifest) -> list[str]:
    """What differs between shards and the raw data of a configuration with a source; see `differences`.

    Of shards of earlier versions only the options are known.

    Raises:
        UserError: When the raw data cannot be read.
    """
    section = config.source
    assert section is not None
    if not manifest.made:
        same = _as_recorded(config, manifest) or not manifest.source
        return [] if same else ["source differs from that of the shards"]
    source = build_source(section.kind, section.root, section.options)
    return differences(manifest.made, identity(source, section, config.data))


def _same_root(config: Config, manifest: Manifest) -> bool:
    assert config.source is not None
    return same_place(str(manifest.source.get("root", "")), config.source.root)


def _as_recorded(config: Config, manifest: Manifest) -> bool:
    """Whether the shards record the source of the configuration, as written."""
    assert config.source is not None
    held = manifest.source
    kind, options = config.source.kind, config.source.model_dump(mode="json")["options"]
    return held.get("kind") == kind and held.get("options") == options and _same_root(config, manifest)


def changes(before: Manifest, now: Manifest) -> list[str]:
    """What differs between two data sets: rows, columns, and labels of the training split; one phrase each."""
    found = [
        f"{split} has {now.rows(split)} samples, before {before.rows(split)}"
        for split in SPLITS
        if now.rows(split) != before.rows(split)
    ]
    tasks, earlier = ({task.name: task for task in manifest.description.tasks} for manifest in (now, before))
    new, lost = [name for name in tasks if name not in earlier], [name for name in earlier if name not in tasks]
    found += [f"new tasks: {listed(new)}"] if new else []
    found += [f"tasks that are gone: {listed(lost)}"] if lost else []
    inputs = [(one.description.input, dict(one.description.preparation)) for one in (before, now)]
    found += [_input_change(before, now)] if inputs[0] != inputs[1] else []
    kinds = {name: (task.kind, earlier[name].kind) for name, task in tasks.items() if name in earlier}
    found += [f"{name} is {kind}, before {was}" for name, (kind, was) in kinds.items() if kind != was][:MOST]
    labels = [_label_change(name, before, now) for name, (kind, was) in kinds.items() if kind == was]
    found += [change for change in labels if change][:MOST]
    return found or (["the content of some samples"] if now.digest() != before.digest() else [])


def _input_change(before: Manifest, now: Manifest) -> str:
    old, new = (columns_of(manifest.description.preparation) for manifest in (before, now))
    added, lost = [name for name in new if name not in old], [name for name in old if name not in new]
    parts = [f"new {listed(added[:MOST])}"] if added else []
    parts += [f"gone {listed(lost[:MOST])}"] if lost else []
    return f"columns of the input: {', '.join(parts) or 'other values or another order'}"


def columns_of(preparation: object) -> list[str]:
    """The columns that a preparation reads, in order; none for an image."""
    held = preparation if isinstance(preparation, dict) else {}
    if "features" in held and isinstance(held["features"], list):
        return [feature["column"] for feature in held["features"]]
    return [held["column"]] if "column" in held else []


def _label_change(name: str, before: Manifest, now: Manifest) -> str:
    old, new = (manifest.sums["train"][name] for manifest in (before, now))
    if "classes" in new and "classes" in old:
        return (
            ""
            if old["classes"] == new["classes"]
            else (f"labels of {name} by class: {new['classes']}, before {old['classes']}")
        )
    mean, was = (moments(sums).get("mean") for sums in (new, old))
    return "" if mean == was or mean is None or was is None else f"mean of {name}: {mean:.6g}, before {was:.6g}"
