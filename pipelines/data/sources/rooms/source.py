"""Reader of rooms: small synthetic indoor scenes, rendered here and stored in the format of Taskonomy.

The rooms use the code path of real data (16-bit PNG files, one folder for each task) without a download. They are
learnable: a class has typical colours, sizes and positions, but none of these determines the class alone. A
building has one style of floor, walls and wood; each of its points is a different room. The same seed creates the
same files on one machine.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from pydantic import Field

from dmtg_core.names import listed
from pipelines.config.validation import Section, Seed, checked
from pipelines.data.sources.base import Description, Entry
from pipelines.data.sources.rooms.scene import render_scene
from pipelines.data.sources.taskonomy.source import TASKS, TaskName, TaskonomySource, domains
from pipelines.errors import UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)
_DONE, _BEGUN = "rooms.json", "rooms.part.json"
_VERSION = 1  # version of the renderer: rooms of another version are rendered again


class RoomsOptions(Section):
    """`buildings` × `points` scenes, stored with `resolution` pixels a side and read at `size`.

    `tasks` and `missing` are options of the Taskonomy reader.
    """

    buildings: int = Field(12, ge=3, le=1000)
    points: int = Field(50, ge=1)
    resolution: int = Field(96, ge=16, le=1024)
    seed: Seed = 22
    size: int = Field(64, ge=8)
    tasks: tuple[TaskName, ...] = Field(get_args(TaskName), min_length=1)
    missing: Literal["quarantine", "mask"] = "quarantine"

    def drawing(self) -> dict[str, int]:
        """The options on which the files depend."""
        return {"version": _VERSION, **self.model_dump(include={"buildings", "points", "resolution", "seed"})}


class RoomsSource:
    """Reader that renders the rooms below the root, unless they exist, and reads them as Taskonomy.

    Raises:
        UserError: For a wrong option.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._root = root
        self._options = checked(RoomsOptions, options, "source.options")
        self._reader = TaskonomySource(root, self._options.model_dump(include={"size", "tasks", "missing"}))

    def raw(self) -> Sequence[Location]:
        """None: the rooms follow from the options."""
        return ()

    def describe(self) -> Description:
        """See `TaskonomySource.describe`; nothing is rendered yet."""
        return self._reader.describe()

    def entries(self) -> Iterator[Entry]:
        """All points, split by building. Rooms that do not exist with the same options are rendered first.

        Raises:
            UserError: When the root holds files of another origin.
        """
        done = self._root / _DONE
        if not (done.exists() and done.read_json() == self._options.drawing()):
            generate(self._root, self._options)
        yield from self._reader.entries()

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        """See `TaskonomySource.read`."""
        return self._reader.read(entry)


def generate(root: Location, options: RoomsOptions) -> int:
    """Render all rooms and replace earlier ones. `rooms.json` is written last.

    Returns:
        The number of scenes.

    Raises:
        UserError: When the root holds files of another origin, or cannot be written to.
    """
    _clear(root)
    (root / _BEGUN).write_json(options.drawing())
    logger.info("rendering %d rooms into %s", options.buildings * options.points, root)
    with ThreadPoolExecutor(1) as writer:  # files are written while the next scene is rendered
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
    """Remove earlier rooms: the pictures that the mark in the folder names. Other pictures are not removed.

    Raises:
        UserError: When the folder holds other pictures. Nothing has been removed then.
    """
    marks = [mark.read_json() for name in (_DONE, _BEGUN) if (mark := root / name).exists()]
    rendered = {place for mark in marks for place in _pictures(mark)}
    held = [f"{name}/{file}" for name in ("rgb", *TASKS) for file in (root / name).files()]
    foreign = [name for name in held if name not in rendered]
    if foreign:
        raise UserError(
            f"the folder holds {len(foreign)} images that were not rendered by this reader: {listed(foreign[:3])}",
            where=str(root),
            remedy="set source.root to an empty folder, or source.kind to taskonomy",
        )
    (root / _DONE).delete()  # first, so that a folder whose removal is interrupted does not count as complete
    for name in held:
        (root / name).delete()


def _pictures(drawing: Mapping[str, int]) -> Iterator[str]:
    """The files of rooms, relative to the root."""
    for building, point in product(range(drawing["buildings"]), range(drawing["points"])):
        for task in ("rgb", *TASKS):
            yield f"{task}/{_place(task, f'room{building:03d}', point)}"


def _place(task: str, building: str, point: int) -> str:
    return f"{building}/point_{point}_view_0_domain_{domains(task)[0]}.png"


def write_point(root: Location, building: str, point: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the pictures of one scene as PNG files.

    Args:
        root: The data set.
        building: Name of the building.
        point: Number of the point in the building.
        arrays: Task → array of `render_scene`; uint8 is written as 8-bit, uint16 as 16-bit.
    """
    for task, values in arrays.items():
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG", compress_level=1)
        (root / task / _place(task, building, point)).write_bytes(file.getvalue(), sync=False)
