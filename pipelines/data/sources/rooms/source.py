"""Small indoor scenes, made up and drawn here, written and read as Taskonomy's files are.

They walk the real path (16-bit PNG files, one folder a task) without a download, and are learnable: a class has
its colours, sizes and places, but none of them alone gives it away. A building is one style of floor, walls and
wood; each of its points is another room. The same seed gives the same files on one machine.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from pydantic import Field

from pipelines.config.validation import Section, checked
from pipelines.data.sources.base import Description, Entry
from pipelines.data.sources.rooms.scene import render_scene
from pipelines.data.sources.taskonomy.source import TASKS, TaskName, TaskonomySource, domains
from pipelines.errors import UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)
_DONE, _BEGUN = "rooms.json", "rooms.part.json"
_VERSION = 1  # of what is drawn: another version is drawn anew


class RoomsOptions(Section):
    """`buildings` × `points` scenes of `resolution` pixels a side on disk, read at `size`.

    `tasks` and `missing` are those of the Taskonomy reader.
    """

    buildings: int = Field(12, ge=3, le=1000)
    points: int = Field(50, ge=1)
    resolution: int = Field(96, ge=16, le=1024)
    seed: int = Field(22, ge=0)
    size: int = Field(64, ge=8)
    tasks: tuple[TaskName, ...] = Field(get_args(TaskName), min_length=1)
    missing: Literal["quarantine", "mask"] = "quarantine"

    def drawing(self) -> dict[str, int]:
        """The options that the files depend on."""
        return {"version": _VERSION, **self.model_dump(include={"buildings", "points", "resolution", "seed"})}


class RoomsSource:
    """Draws the rooms below the root unless they are there, and reads them as Taskonomy.

    Raises:
        UserError: For a wrong option.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._root = root
        self._options = checked(RoomsOptions, options, "source.options")
        self._reader = TaskonomySource(root, self._options.model_dump(include={"size", "tasks", "missing"}))

    def describe(self) -> Description:
        """As Taskonomy's; nothing is drawn yet."""
        return self._reader.describe()

    def entries(self) -> list[Entry]:
        """All points, split by building. Draws them first where they are not there with the same options.

        Raises:
            UserError: When the root holds files that are not from here.
        """
        done = self._root / _DONE
        if not (done.exists() and done.read_json() == self._options.drawing()):
            generate(self._root, self._options)
        return self._reader.entries()

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """As Taskonomy's."""
        return self._reader.read(entry)


def generate(root: Location, options: RoomsOptions) -> int:
    """Draw all rooms in place of those that were drawn here before. `rooms.json` is written last.

    Returns:
        The number of scenes.

    Raises:
        UserError: When the root holds files that are not from here, or cannot be written to.
    """
    _clear(root)
    (root / _BEGUN).write_json(options.drawing())
    logger.info("drawing %d rooms into %s", options.buildings * options.points, root)
    with ThreadPoolExecutor(1) as writer:  # the disk works while the next scene is drawn
        written: Future[None] | None = None
        for building, point in product(range(options.buildings), range(options.points)):
            seed = (options.seed, building, point)
            arrays = render_scene(seed, options.resolution, seed[:2])
            if written:
                written.result()
            written = writer.submit(write_point, root, f"room{building:03d}", point, arrays)
        if written:
            written.result()
    (root / _DONE).write_json(options.drawing())
    (root / _BEGUN).delete()
    return options.buildings * options.points


def _clear(root: Location) -> None:
    """Remove earlier rooms, and nothing that is not marked as rooms: the folder names are Taskonomy's."""
    folders = [root / name for name in ("rgb", *TASKS)]
    ours = (root / _DONE).exists() or (root / _BEGUN).exists()
    if not ours and any(folder.exists() for folder in folders):
        raise UserError(
            "the folder holds images that were not drawn here",
            where=str(root),
            remedy="set source.root to an empty folder, or source.kind to taskonomy",
        )
    (root / _DONE).delete()  # first, so that a half-emptied folder does not pass for a whole one
    for folder in folders:
        folder.delete()


def write_point(root: Location, building: str, point: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the pictures of one scene as PNG files.

    Args:
        root: The data set.
        building: Name of the building.
        point: Number of the point in it.
        arrays: By task, as `render_scene` gives them: uint8 is written as 8-bit, uint16 as 16-bit.
    """
    for task, values in arrays.items():
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG", compress_level=1)
        name = f"point_{point}_view_0_domain_{domains(task)[0]}.png"
        (root / task / building / name).write_bytes(file.getvalue(), sync=False)
