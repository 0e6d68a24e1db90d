"""Tasks of Taskonomy: the content of their files, the readers of these files, and the constants of the tasks.

Sources:

* Standley et al. 2020 ("Which Tasks Should Be Learned Together in Multi-task Learning?", ICML), repository
  tstandley/taskgrouping, `taskonomy_loader.py` and `taskonomy_losses.py`: offsets, scales, losses and the limit
  of valid depth of depth_zbuffer, normal, segment_semantic, keypoints2d, edge_texture, edge_occlusion, reshading
  and principal_curvature. 8-bit constants are for 0..1 there, and for 0..255 here.
* Zamir et al. 2018 ("Taskonomy", CVPR), repository StanfordVL/taskonomy, `data/README.md`, `taskbank/` and
  `code/lib/data/load_ops.py`: units, class ids, class vectors, and all of keypoints3d.
* The scripts that created the files, repository EPFL-VILAB/omnidata, `omnidata_annotator/scripts`: depth of the
  files, and the meaning of a response or a segment id.

Four tasks differ from the published ones, which have no counterpart in `Task`:

* `segment_unsup2d`, `segment_unsup25d`: ids of a graph cut. They are arbitrary in each picture, so no network can
predict
  them. Zamir et al. learn an embedding of the pixels that belong together; Standley et al. leave both tasks out.
  Here the target is the border of the segments: a pixel is "boundary" if one of its four neighbours has another
  id.
* `class_object`, `class_scene`: the output of another network (ResNet-152 for the 1000 classes of ImageNet,
logits; a
  Places network for 365 scenes, probabilities). Zamir et al. learn the soft vector of the classes that occur
  indoors (100 and 63); here the label is the most likely of all classes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from PIL import Image

from dmtg_core.tasks import Task
from pipelines.data.sources.base import BadSampleError, Column
from pipelines.data.sources.images import (
    decode_image,
    resize_ids,
    resize_numbers,
    rgb,
    sixteen_bit,
    to_integers,
)

CLASSES = (
    "uncertain",
    "background",
    "bottle",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
)

# the five tasks of the published experiments, and all tasks
TaskName = Literal["depth_zbuffer", "normal", "segment_semantic", "keypoints2d", "edge_texture"]
AnyTaskName = Literal[
    TaskName,
    "depth_euclidean",
    "keypoints3d",
    "edge_occlusion",
    "reshading",
    "principal_curvature",
    "segment_unsup2d",
    "segment_unsup25d",
    "class_object",
    "class_scene",
]


def _depth(name: str) -> Task:
    """A depth task. Depths from 16 m are not annotated; 65535 is no surface. Both have the same scale."""
    return Task(
        name,
        "dense_regression",
        loss="l1_shift",
        offset=(1500.0,),
        scale=(1000.0,),
        valid_below=2.0**13,
        unit="1/512 m",
    )


def _response(name: str, offset: float, scale: float, threshold: float) -> Task:
    """The 16-bit response of a detector at each pixel; `threshold` converts it to a class for the F1 score."""
    return Task(
        name, "dense_regression", loss="l1", offset=(offset,), scale=(scale,), threshold=threshold, unit="1/65535"
    )


def _boundaries(name: str) -> Task:
    return Task(name, "dense_classification", channels=2, metric="miou", labels=("inside", "boundary"))


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _depth("depth_zbuffer"),
        Task(
            "normal",
            "dense_regression",
            channels=3,
            loss="l1_shift",
            metric="within_30",
            offset=(127.5,),
            scale=(127.5,),
            flip=(-1.0, 1.0, 1.0),  # x to the right, y down, z to the camera
        ),
        Task(
            "segment_semantic",
            "dense_classification",
            channels=len(CLASSES),
            metric="miou",
            ignore_index=0,
            labels=CLASSES,
        ),
        # No published threshold is known. Offset and scale are the mean and the deviation over the data set. The
        # threshold is one deviation above the mean: such a response is distinct and not rare.
        _response("keypoints2d", 50.0, 100.0, threshold=150.0),
        _response("edge_texture", 718.0, 1070.0, threshold=1788.0),
        _depth("depth_euclidean"),
        # Zamir et al. map the whole 16-bit range to -1..1. In the detector (NARF, in the Point Cloud Library) a
        # pixel is a keypoint if its interest is at least .45 of that range.
        _response("keypoints3d", 32767.5, 32767.5, threshold=0.45 * 2**16),
        _response("edge_occlusion", 56.0248, 239.1265, threshold=56.0248 + 239.1265),
        # the lamp is at the camera, so a mirrored picture has the mirrored shading
        Task("reshading", "dense_regression", loss="l1", offset=(0.4962 * 255,), scale=(0.2846 * 255,)),
        # the two curvatures have no direction, so mirroring changes neither
        Task(
            "principal_curvature",
            "dense_regression",
            channels=2,
            loss="l1",
            offset=(0.5175 * 255, 0.4987 * 255),
            scale=(0.1373 * 255, 0.0359 * 255),
        ),
        _boundaries("segment_unsup2d"),
        _boundaries("segment_unsup25d"),
        Task("class_object", "multiclass", channels=1000),
        Task("class_scene", "multiclass", channels=365),
    )
}

# Labels that are rendered from the mesh of the building. They are meaningless in a hole of the mesh, and the
# published losses use the depth to leave these pixels out. Depth marks such pixels in its own values.
MESH = ("normal", "edge_occlusion", "reshading", "principal_curvature", "keypoints3d")


def column(name: str, size: int) -> Column:
    """Storage of the label of a task at `size` × `size`: the narrowest type that holds it."""
    task = TASKS[name]
    if not task.dense:
        return Column("uint16")
    wide = name.startswith("depth") or task.threshold is not None
    channels = () if task.classes or task.channels == 1 else (task.channels,)
    return Column("uint16" if wide else "uint8", (size, size, *channels))


def domains(task: str) -> tuple[str, ...]:
    """Names of a task in files, the usual one first: published copies differ in the underscore."""
    plain = task.replace("_", "")
    if task == "class_scene":
        return "class_places", task
    return (plain, task) if task == "segment_semantic" else tuple(dict.fromkeys((task, plain)))


def suffix(task: str) -> str:
    """File extension of the label files of a task."""
    return ".png" if task not in TASKS or TASKS[task].dense else ".npy"


def read_label(task: str, data: bytes, name: str, frame: tuple[int, int], size: int) -> np.ndarray:
    """The stored label that a file holds.

    Args:
        task: A key of `TASKS`.
        data: The bytes of the file.
        name: Name of the file, for messages.
        frame: Width and height of the photograph; a picture of labels must have the same size.
        size: Height and width of the result, for a task with a label for each pixel.

    Returns:
        An array of the shape and dtype of `column`.

    Raises:
        BadSampleError: For a file that is damaged, of the wrong size or depth, or without a known label.
    """
    if not TASKS[task].dense:
        return most_likely(data, name, TASKS[task].channels)
    image = decode_image(data, name)
    if image.size != frame:
        raise BadSampleError(f"{name} is {image.width}×{image.height}, its rgb {frame[0]}×{frame[1]}")
    return _READERS[task](image, name, size)


def most_likely(data: bytes, name: str, classes: int) -> np.ndarray:
    """Index of the largest value of a vector in NumPy's file format, uint16 `()`; for logits or probabilities.

    Raises:
        BadSampleError: For a file that is not such a vector of `classes` numbers, or whose numbers are equal.
    """
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise BadSampleError(f"damaged .npy file {name}: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise BadSampleError(f"expected {classes} numbers: {name}")
    values = values.squeeze()
    if values.shape != (classes,):
        raise BadSampleError(f"expected {classes} numbers, got an array of shape {values.shape}: {name}")
    if not np.isfinite(values).all() or values.min() == values.max():
        raise BadSampleError(f"no class is the most likely, the values are NaN, infinite or all equal: {name}")
    return np.asarray(values.argmax(), np.uint16)


def boundaries(ids: np.ndarray) -> np.ndarray:
    """1 where one of the four neighbours has another id: uint8, in the shape `(H, W)` of `ids`.

    Both sides of a border are marked, so mirrored ids have mirrored boundaries.
    """
    found = np.zeros(ids.shape, np.uint8)
    down, right = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    found[1:] |= down
    found[:-1] |= down
    found[:, 1:] |= right
    found[:, :-1] |= right
    return found


def _read_depth(image: Image.Image, name: str, size: int) -> np.ndarray:
    # nearest neighbour: an average of a depth and of 65535 (no surface) would be neither
    return resize_ids(sixteen_bit(image, name), size)


def _read_response(image: Image.Image, name: str, size: int) -> np.ndarray:
    return _resized(sixteen_bit(image, name), size)


def _read_normal(image: Image.Image, name: str, size: int) -> np.ndarray:
    """Averages of unit vectors, which are shorter than one, normalised to unit length."""
    values = _colours(image, name)
    if values.shape[:2] == (size, size):
        return values
    vectors = resize_numbers(values, size) / 127.5 - 1
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    # (127, 127, 127) is no surface: its tiny vector has no direction and is not normalised
    vectors = np.where(length > 0.5, vectors / np.maximum(length, 0.5), vectors)
    return to_integers((vectors + 1) * 127.5, np.uint8)


def _read_shading(image: Image.Image, name: str, size: int) -> np.ndarray:
    # the three channels of a white lamp are equal; a copy with one channel is equivalent
    return _resized(to_integers(np.asarray(rgb(image, name)).mean(2), np.uint8), size)


def _read_curvature(image: Image.Image, name: str, size: int) -> np.ndarray:
    return _resized(np.ascontiguousarray(_colours(image, name)[..., :2]), size)


def _read_classes(image: Image.Image, name: str, size: int) -> np.ndarray:
    ids = _ids(image, name)
    if ids.max() >= len(CLASSES):
        raise BadSampleError(f"class id {ids.max()}, the highest there is is {len(CLASSES) - 1}: {name}")
    return resize_ids(ids.astype(np.uint8), size)


def _read_segments(image: Image.Image, name: str, size: int) -> np.ndarray:
    # the ids are resized first: a boundary of one pixel could be lost between the pixels that are kept
    return boundaries(resize_ids(_ids(image, name), size))


def _resized(values: np.ndarray, size: int) -> np.ndarray:
    if values.shape[:2] == (size, size):
        return values
    return to_integers(resize_numbers(values, size), values.dtype.type)


def _colours(image: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(rgb(image, name))
    if len(image.getbands()) < 3:
        raise BadSampleError(f"expected an RGB image, got {image.mode}: {name}")
    return values


def _ids(image: Image.Image, name: str) -> np.ndarray:
    if len(image.getbands()) != 1:
        raise BadSampleError(f"expected one channel of class ids, got {image.mode}: {name}")
    return np.asarray(image)


_READERS: Mapping[str, Callable[[Image.Image, str, int], np.ndarray]] = {
    "depth_zbuffer": _read_depth,
    "depth_euclidean": _read_depth,
    "normal": _read_normal,
    "segment_semantic": _read_classes,
    "keypoints2d": _read_response,
    "keypoints3d": _read_response,
    "edge_texture": _read_response,
    "edge_occlusion": _read_response,
    "reshading": _read_shading,
    "principal_curvature": _read_curvature,
    "segment_unsup2d": _read_segments,
    "segment_unsup25d": _read_segments,
}
