"""Finds, reads and checks pictures and their labels.

Everything that can be wrong with somebody's files is found here, before the
first step, and told in one line that names the file and the mend.
"""

import io
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.npu_config import UserError
from DeepLabv3plus import progress

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
# What TensorFlow decodes itself; others are decoded once, at the start. Not
# PNG: TensorFlow 2.6 prints a line for every one of them.
GRAPH_FORMAT, GRAPH_MODES = "JPEG", ("L", "RGB")
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_TAIL = 4096  # bytes that cameras may write after the end
# Ours, a little above Pillow's own limit of 89 million.
MAX_PIXELS = 100_000_000  # a larger picture is taken for a bomb
CHECKED_PICTURES = 32  # pictures that are decoded unless all are asked for
DESCRIBED_PICTURES = 500  # labels that are counted for the log
READERS = 4  # threads; Pillow lets go of Python's lock while it decodes
NAMES_FILE = "class_names.txt"  # a name a line, beside the data
# In the devkit's order: a class's id is its place.
VOC_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train "
    "tvmonitor"
).split()


class Picture(NamedTuple):
    """A picture to be read from disk, with its label in memory.

    Attributes:
      name: path of the picture.
      content: its file if that came out of a TFRecord, or its pixels
        [h, w, 3], packed; empty for files that TensorFlow decodes itself.
      label: class ids [h, w], packed.
      size: height and width, pixels.
    """

    name: str
    content: bytes
    label: bytes
    size: tuple[int, int]


class Source(NamedTuple):
    """A picture and its label before they are read.

    Attributes:
      name: path of the picture, or what to call it.
      label: path of the label, or what to call it.
      content: the picture's file if it is not on disk.
      label_content: the label's file if it is not on disk.
    """

    name: str
    label: str
    content: bytes = b""
    label_content: bytes = b""


def read_class_names(data_path: str) -> list[str]:
    """Names of the classes: those beside the data, or Pascal VOC's."""
    path = os.path.join(data_path, NAMES_FILE)
    if not os.path.exists(path):
        return list(VOC_NAMES)
    with open(path, encoding="utf8") as file:
        return [line.strip() for line in file if line.strip()]


def fit_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Names of `count` classes; those that have none are numbers."""
    numbers = (f"class {id_}" for id_ in range(len(names), count))
    return (*names[:count], *numbers)


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


def _open(path: str, decode: bool = True, content: bytes = b"") -> Image.Image:
    """A picture file: size, mode and, if asked for, its first page.

    `content` is the file, where `path` only names it.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        # A damaged file's warnings would come before our one line.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Up to twice its limit Pillow only warns; here that is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(content) if content else path
            with Image.open(file) as image:
                if decode:
                    image.load()
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


def _check_end(path: str, content: bytes) -> None:
    """Raises UserError for a JPEG that was cut off, without decoding it."""
    if not content:
        with open(path, "rb") as file:
            file.seek(-min(JPEG_TAIL, os.path.getsize(path)), os.SEEK_END)
            content = file.read()
    if JPEG_END not in content[-JPEG_TAIL:]:
        raise UserError(
            f"{path}: cannot be read as a picture (it ends too early); is "
            "the file truncated?"
        )


def read_picture(path: str, content: bytes = b"") -> np.ndarray:
    """A picture file as RGB [h, w, 3] uint8, whatever its own mode."""
    image = _open(path, content=content)
    if image.mode.startswith("I"):
        # Pillow would cut 16 bits off at 255 instead of scaling them.
        wide = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))
    # A palette's colours, a grey value thrice, no transparency.
    return np.asarray(image.convert("RGB"))


def read_ids(
    path: str, size: tuple[int, int], content: bytes = b""
) -> np.ndarray:
    """Ids [h, w] uint8 of a picture of `size`: grey or palette indices."""
    ids = np.asarray(_open(path, content=content))
    if ids.ndim == 3 and ids.shape[-1] in (2, 4):
        ids = ids[..., :-1]  # the last channel says how opaque a pixel is
    if ids.ndim == 3:
        # Some tools save greyscale as three equal channels.
        if (ids != ids[..., :1]).any():
            raise UserError(
                f"{path}: a colour picture; labels hold one class id per "
                "pixel: save them as greyscale or palette PNG"
            )
        ids = ids[..., 0]
    if ids.min() < 0 or ids.max() > 255:
        raise UserError(
            f"{path}: label values up to {ids.max()}; class ids are below "
            "255: save them as 8-bit greyscale or palette PNG"
        )
    if ids.shape != tuple(size):
        raise UserError(
            f"{path}: {ids.shape[1]}x{ids.shape[0]} pixels, its picture has "
            f"{size[1]}x{size[0]}; they must be equal"
        )
    return ids.astype(np.uint8)


def label_path(name: str, folder: str) -> str:
    """The PNG in `folder` that has the stem of picture `name`."""
    stem = os.path.splitext(os.path.basename(name))[0]
    return os.path.join(folder, stem + ".png")


def check_values(
    path: str, label: np.ndarray, num_classes: int, ignore_label: int
) -> None:
    """Raises UserError for values that are no class."""
    # Counting is many times faster than np.unique, which sorts.
    own = np.bincount(label.ravel(), minlength=256)
    wrong = [
        value
        for value in np.flatnonzero(own).tolist()
        if value >= num_classes and value != ignore_label
    ]
    if wrong:
        raise UserError(
            f"{path}: label values {wrong[:8]} where 0..{num_classes - 1} "
            f"and ignore_label {ignore_label} are allowed; set --num_classes "
            "or --ignore_label, or renumber the labels"
        )


def read_all(
    sources: Sequence[Source],
    num_classes: int,
    ignore_label: int,
    check_all: bool = False,
) -> list[Picture]:
    """Reads and checks all labels, and of the pictures a sample, or all."""
    step = 1 if check_all else -(-len(sources) // CHECKED_PICTURES)

    def read_one(number: int) -> Picture:
        decode = number % step == 0
        return _read_one(sources[number], num_classes, ignore_label, decode)

    # In order, so that the first mistake told is the first there is.
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(read_one, range(len(sources)))
        return list(progress.watched(read, len(sources), "reading picture"))


def _read_one(
    source: Source, num_classes: int, ignore_label: int, decode: bool
) -> Picture:
    """Reads the label of a picture, and checks that it fits."""
    name, content = source.name, source.content
    image = _open(name, decode=False, content=content)
    width, height = image.size
    # What is packed has to be decoded anyway, and only once.
    if image.format != GRAPH_FORMAT or image.mode not in GRAPH_MODES:
        content = pack(read_picture(name, content))
    elif decode:
        _open(name, content=content)
    else:
        _check_end(name, content)
    size = (height, width)
    label = read_ids(source.label, size, source.label_content)
    check_values(source.label, label, num_classes, ignore_label)
    return Picture(name, content, pack(label), size)


def pack(pixels: np.ndarray) -> bytes:
    """The bytes of an array, compressed."""
    # Labels take a few kilobytes where raw ones would fill the memory. Level
    # 1, since more would take longer than it saves.
    return zlib.compress(np.ascontiguousarray(pixels).tobytes(), 1)


def describe(
    pairs: Sequence[Picture], ignore_label: int, names: Sequence[str]
) -> str:
    """One line: how many pictures, and what their labels hold."""
    counts = np.zeros(256, np.int64)
    for pair in pairs[:: -(-len(pairs) // DESCRIBED_PICTURES)]:
        label = np.frombuffer(zlib.decompress(pair.label), np.uint8)
        counts += np.bincount(label, minlength=256)
    if ignore_label >= 0:
        counts[ignore_label] = 0
    shares = counts[: len(names)] / max(counts.sum(), 1)
    shown = ", ".join(f"{n} {s:.1%}" for n, s in zip(names, shares))
    return f"{len(pairs)} pictures; of their pixels: {shown}"
