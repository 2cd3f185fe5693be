"""Pictures and masks on disk: opened, checked, packed.

Everything that can be wrong with somebody's files is found before the first
step, and told in one line that names the file and the mend.
"""

import os
import re
import warnings
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from BlitzNet.augment import UNLABELLED
from common.npu_config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff")
# What TensorFlow decodes itself; others are decoded once, at the start. Not
# PNG: TensorFlow 2.6 prints a line for every one of them.
GRAPH_FORMAT, GRAPH_MODES = "JPEG", ("L", "RGB")
# The marker of a JPEG's end, which coded data cannot hold by chance, and how
# many bytes are searched for it: our choice.
JPEG_END, JPEG_TAIL = b"\xff\xd9", 4096  # cameras may write after it
# Ours, a little above Pillow's own limit of 89 million.
MAX_PIXELS = 100_000_000  # a larger picture is taken for a bomb
JPEG, RAW, PACKED = 0, 1, 2  # how a picture's pixels are kept


class Objects(NamedTuple):
    """The objects of a picture.

    Attributes:
      boxes: [n, 4] float32, (left, top, width, height), shares of its sides.
      labels: [n] int32, from 1 on.
      difficult: [n] bool: trained on, but left out of evaluations.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


class Picture(NamedTuple):
    """A picture that is read when its turn comes, with what belongs to it.

    Attributes:
      name: stem of its file, for results.
      path: the file that holds it.
      span: offset and length, in bytes, of its pixels in the file.
      kind: JPEG; RAW pixels; or PACKED in `content` where the file has
        another format.
      content: pixels [h, w, 3], packed.
      mask: class ids [h, w], packed, with UNLABELLED where pixels do
        not count; empty where there is no mask.
      objects: boxes and classes.
      size: height and width, pixels.
    """

    name: str
    path: str
    span: tuple[int, int]
    kind: int
    content: bytes
    mask: bytes
    objects: Objects
    size: tuple[int, int]


def no_objects() -> Objects:
    """What a picture without boxes has."""
    return Objects(
        np.zeros([0, 4], np.float32), np.zeros(0, np.int32), np.zeros(0, bool)
    )


def natural_key(name: str) -> list:
    """Sorts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", os.path.basename(name))
    # Text and numbers alternate, so that like is compared with like.
    return [int(part) if part.isdigit() else part for part in parts]


def list_pictures(folder: str) -> list[str]:
    """Picture files of a folder in natural order."""
    return sorted(
        (
            os.path.join(folder, name)
            for name in os.listdir(folder)
            if name.lower().endswith(EXTENSIONS)
        ),
        key=natural_key,
    )


def open_picture(
    path: str, decode: bool = True, source: object = None
) -> Image.Image:
    """A picture file: size, mode and, if asked for, its first page.

    Args:
      path: of the file; named in errors.
      decode: the pixels too, which finds what is cut off.
      source: an open file to read instead.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        # A damaged file's warnings would come before our one line.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source or path) as image:
                if decode:
                    image.load()
                # Closed now: undecoded it knows but its size, mode and format.
                return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(
            f"{path}: more than {MAX_PIXELS} pixels; cut the picture up or "
            "make it smaller"
        ) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UserError(
            f"{path}: cannot be read as a picture ({error}); is the file "
            "truncated, or not an image?"
        ) from None


def check_end(path: str) -> None:
    """Raises UserError for a JPEG that was cut off, without decoding it."""
    with open(path, "rb") as file:
        file.seek(-min(JPEG_TAIL, os.path.getsize(path)), os.SEEK_END)
        ended = JPEG_END in file.read()
    if not ended:
        raise UserError(
            f"{path}: cannot be read as a picture (it ends too early); is "
            "the file truncated?"
        )


def read_picture(path: str) -> np.ndarray:
    """A picture file as RGB [h, w, 3] uint8, whatever its own mode."""
    image = open_picture(path)
    if image.mode.startswith("I"):
        # Pillow would cut 16 bits off at 255 instead of scaling them.
        wide = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))
    # A palette's colours, a grey value thrice, no transparency.
    return np.asarray(image.convert("RGB"))


def read_ids(
    path: str, size: tuple[int, int], source: object = None
) -> np.ndarray:
    """Ids [h, w] uint8 of a picture of `size`: grey or palette indices."""
    # No conversion by mode: it would turn a palette's ids into grey.
    ids = np.asarray(open_picture(path, source=source))
    if ids.ndim == 3 and ids.shape[-1] in (2, 4):
        ids = ids[..., :-1]  # the last channel says how opaque a pixel is
    if ids.ndim == 3:
        # Some tools save greyscale as three equal channels.
        if (ids != ids[..., :1]).any():
            raise UserError(
                f"{path}: a colour picture; masks hold one class id per "
                "pixel: save them as greyscale or palette PNG"
            )
        ids = ids[..., 0]
    if ids.min() < 0 or ids.max() > 255:
        raise UserError(
            f"{path}: mask values up to {ids.max()}; class ids are below "
            "255: save them as 8-bit greyscale or palette PNG"
        )
    check_size(path, ids.shape, size)
    return ids.astype(np.uint8)


def check_size(path: str, shape: tuple, size: tuple[int, int]) -> None:
    """Raises UserError for a mask of another size than its picture."""
    if tuple(shape) != tuple(size):
        raise UserError(
            f"{path}: {shape[1]}x{shape[0]} pixels, its picture has "
            f"{size[1]}x{size[0]}; they must be equal"
        )


def check_values(
    path: str, mask: np.ndarray, num_classes: int, ignore_label: int
) -> None:
    """Raises UserError for values that are no class."""
    # Counting is many times faster than np.unique, which sorts.
    own = np.bincount(mask.ravel(), minlength=256)
    wrong = [
        value
        for value in np.flatnonzero(own).tolist()
        if value >= num_classes and value != ignore_label
    ]
    if wrong:
        raise UserError(
            f"{path}: mask values {wrong[:8]} where 0..{num_classes - 1} "
            f"and ignore_label {ignore_label} are allowed; set --num_classes "
            "or --ignore_label, name the classes in classes.txt, or renumber "
            "the masks"
        )


def check_boxes(
    where: str, corners: np.ndarray, limits: tuple[float, float]
) -> None:
    """Raises UserError for boxes that are none, or not in the picture.

    Args:
      where: the file, for the message.
      corners: [n, 4], (left, top, right, bottom).
      limits: width and height of the picture in the same unit.
    """
    for number, box in enumerate(corners, 1):
        shown = ", ".join(f"{value:g}" for value in box)
        told = f"{where}: box {number} ({shown})"
        # NaN fails these comparisons too.
        if not (box[2] > box[0] and box[3] > box[1]):
            raise UserError(
                f"{told} has no area: left must be less than right, and top "
                "less than bottom; mend or remove it"
            )
        within = 0 <= box[0] and 0 <= box[1]
        if not (within and box[2] <= limits[0] and box[3] <= limits[1]):
            raise UserError(
                f"{told} leaves the picture of {limits[0]:g}x{limits[1]:g}; "
                "clip it"
            )


def pack(pixels: np.ndarray) -> bytes:
    """The bytes of an array, compressed."""
    # Masks take a few kilobytes where raw ones would fill the memory. Level
    # 1, since more would take longer than it saves.
    return zlib.compress(np.ascontiguousarray(pixels).tobytes(), 1)


def pack_mask(
    path: str, ids: np.ndarray, num_classes: int, ignore_label: int
) -> bytes:
    """Class ids [h, w] uint8, checked; ignored ones become UNLABELLED."""
    check_values(path, ids, num_classes, ignore_label)
    return pack(np.where(ids == ignore_label, UNLABELLED, ids))


def unpack(content: bytes, shape: tuple) -> np.ndarray:
    """The array of uint8 that was packed."""
    return np.frombuffer(zlib.decompress(content), np.uint8).reshape(shape)


def describe(pairs: Sequence[Picture], names: Sequence[str]) -> str:
    """One line: how many pictures, and what is in them."""
    labels = [pair.objects.labels for pair in pairs]
    counts = np.bincount(np.concatenate(labels), minlength=len(names))
    shown = ", ".join(
        f"{name} {count}"
        for name, count in zip(names[1:], counts[1:])
        if count
    )
    bare = sum(not len(each) for each in labels)
    unmasked = sum(not pair.mask for pair in pairs)
    return (
        f"{len(pairs)} pictures, {bare} without boxes, {unmasked} without "
        f"masks; objects: {shown or 'none'}"
    )
