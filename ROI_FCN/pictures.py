"""Finds, reads and checks pictures, labels and vessel maps.

Everything that can be wrong with somebody's files is found here, before the
first step, and told in one line that names the file and the mend.
"""

import os
import re
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from common.npu_config import UserError
from ROI_FCN import progress

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
# What TensorFlow decodes itself; others are decoded once, at the start. Not
# PNG: TensorFlow 2.6 prints a line for every one of them.
GRAPH_FORMAT, GRAPH_MODES = "JPEG", ("L", "RGB")
JPEG_END, JPEG_TAIL = b"\xff\xd9", 4096  # cameras may write after it
# Ours, a little above Pillow's own limit of 89 million.
MAX_PIXELS = 100_000_000  # a larger picture is taken for a bomb
CHECKED_PICTURES = 32  # pictures that are decoded unless all are asked for
READERS = 4  # threads; Pillow lets go of Python's lock while it decodes
ROI_FOLDER = "VesselLabels"
LAYOUT_HELP = (
    "expected folders Train_Images/ and Test_Images_All/ with pictures, and "
    "VesselLabels/ and LiquidSolidLabels/ (or FillLevelLabels/, "
    "ExactPhaseLabels/) with a PNG of the same stem for each of them; only "
    "--exec_mode=train does without Test_Images_All"
)


class LabelSet(NamedTuple):
    """A folder of labels and the names of its classes."""

    folder: str
    class_names: tuple[str, ...]


# Folders and ids are those of Materials_In_Vessels; the first names are what
# the reference's evaluation prints.
LABEL_SETS = {
    "liquid_solid": LabelSet(
        "LiquidSolidLabels", ("BackGround", "Empty Vessel", "Liquid", "Solid")
    ),
    "fill_level": LabelSet(
        "FillLevelLabels", ("BackGround", "Empty", "Filled")
    ),
    "exact_phase": LabelSet(
        "ExactPhaseLabels",
        (
            "BackGround",
            "Vessel",
            "Liquid",
            "Liquid phase two",
            "Suspension",
            "Emulsion",
            "Foam",
            "Solid",
            "Gel",
            "Powder",
            "Granular",
            "Bulk",
            "Bulk liquid/solid+liquid mix",
            "Solid phase two",
            "Vapor",
        ),
    ),
}


class Picture(NamedTuple):
    """A picture to be read from disk, with its masks in memory.

    Attributes:
      name: path of the picture.
      content: its pixels [h, w, 3], packed; empty for files that TensorFlow
        decodes itself.
      masks: the label and the ROI map of 0 and 1, [2, h, w], packed.
      size: height and width, pixels.
    """

    name: str
    content: bytes
    masks: bytes
    size: tuple[int, int]


def class_names(labels: str, count: int) -> tuple[str, ...]:
    """Names of `count` classes; those that the label set lacks are numbers."""
    names = LABEL_SETS[labels].class_names[:count]
    return (*names, *(f"class {id_}" for id_ in range(len(names), count)))


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


def _open(path: str, decode: bool = True) -> Image.Image:
    """A picture file: size, mode and, if asked for, its first page."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        # A damaged file's warnings would come before our one line.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Up to twice its limit Pillow only warns; here that is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
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


def _check_end(path: str) -> None:
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
    image = _open(path)
    if image.mode.startswith("I"):
        # Pillow would cut 16 bits off at 255 instead of scaling them.
        # 257 takes 65535 to 255 exactly.
        wide = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))
    # A palette's colours, a grey value thrice, no transparency.
    return np.asarray(image.convert("RGB"))


def read_ids(path: str, size: tuple[int, int]) -> np.ndarray:
    """Ids [h, w] uint8 of a picture of `size`: grey or palette indices."""
    ids = np.asarray(_open(path))
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


def read_roi(path: str, size: tuple[int, int]) -> np.ndarray:
    """A region map of a picture of `size` as 0 and 1, [h, w] uint8."""
    # People draw a region with 1 or with 255: both mean inside.
    return (read_ids(path, size) > 0).astype(np.uint8)


def mask_path(name: str, folder: str) -> str:
    """The PNG in `folder` that has the stem of picture `name`."""
    # The reference cuts off four characters, which does not suit .jpeg.
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
            f"and ignore_label {ignore_label} are allowed; set --labels, "
            "--num_classes or --ignore_label, or renumber the labels"
        )


class Reader:
    """Reads the pictures of one data set under one choice of labels."""

    def __init__(
        self,
        data_path: str,
        labels: str,
        num_classes: int,
        ignore_label: int,
        no_roi: bool,
    ) -> None:
        """`no_roi`: the whole picture is the region; no maps are needed."""
        if not os.path.isdir(data_path):
            raise UserError(
                f"--data_path={data_path}: no such folder; {LAYOUT_HELP}"
            )
        self.data_path = data_path
        self.num_classes, self.ignore_label = num_classes, ignore_label
        self.folders = [LABEL_SETS[labels].folder]
        if not no_roi:
            self.folders.append(ROI_FOLDER)

    @classmethod
    def of(cls, values: dict[str, object]) -> "Reader":
        """The reader that the flags of a run describe."""
        names = ("data_path", "labels", "num_classes", "ignore_label")
        return cls(*(values[name] for name in names), values["no_roi"])

    def read(self, folder: str, check_all: bool = False) -> list[Picture]:
        """The pictures of `folder` with their masks, in natural order.

        All masks are read and checked, and of the pictures a sample, or all
        of them.
        """
        path = os.path.join(self.data_path, folder)
        names = list_pictures(path) if os.path.isdir(path) else []
        if not names:
            raise UserError(f"{path}: no pictures found; {LAYOUT_HELP}")
        step = 1 if check_all else -(-len(names) // CHECKED_PICTURES)
        decode = [number % step == 0 for number in range(len(names))]
        # In order, so that the first mistake told is the first there is.
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(self._read_one, names, decode)
            return list(progress.watched(read, len(names), "reading picture"))

    def _read_one(self, name: str, decode: bool) -> Picture:
        """Reads the masks of a picture, and checks that they fit it."""
        image = _open(name, decode=False)
        width, height = image.size
        content = b""
        # What is packed has to be decoded anyway, and only once.
        if image.format != GRAPH_FORMAT or image.mode not in GRAPH_MODES:
            content = pack(read_picture(name))
        elif decode:
            _open(name)
        else:
            _check_end(name)
        packed = pack(self.read_masks(name, (height, width)))
        return Picture(name, content, packed, (height, width))

    def read_masks(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Label and ROI map [2, h, w] of a picture of `size`."""
        masks = []
        for folder in self.folders:
            path = mask_path(name, os.path.join(self.data_path, folder))
            if not os.path.exists(path):
                raise UserError(
                    f"{name}: no {path}; add it, move the picture away"
                    + self._remedy(folder)
                )
            read = read_roi if folder == ROI_FOLDER else read_ids
            masks.append(read(path, size))
            if folder != ROI_FOLDER:
                check_values(
                    path, masks[-1], self.num_classes, self.ignore_label
                )
        if len(masks) == 1:
            masks.append(np.ones(size, np.uint8))
        return np.stack(masks)

    @staticmethod
    def _remedy(folder: str) -> str:
        """What else to do about a missing file of this folder."""
        if folder == ROI_FOLDER:
            return ", or train without regions: --no_roi"
        return ", or choose other --labels"


def pack(pixels: np.ndarray) -> bytes:
    """The bytes of an array, compressed."""
    # Masks take a few kilobytes where raw ones would fill the memory. Level
    # 1, since more would take longer than it saves.
    return zlib.compress(np.ascontiguousarray(pixels).tobytes(), 1)


def describe(
    pairs: Sequence[Picture], ignore_label: int, names: Sequence[str]
) -> str:
    """One line: how many pictures, and what their labels hold."""
    counts = np.zeros(256, np.int64)
    for pair in pairs:
        masks = np.frombuffer(zlib.decompress(pair.masks), np.uint8)
        label = masks[: len(masks) // 2]
        counts += np.bincount(label, minlength=256)
    if ignore_label >= 0:
        counts[ignore_label] = 0
    shares = counts[: len(names)] / max(counts.sum(), 1)
    shown = ", ".join(f"{n} {s:.1%}" for n, s in zip(names, shares))
    return f"{len(pairs)} pictures; of their pixels: {shown}"


def find_roi(name: str, where: Optional[str]) -> Optional[str]:
    """The ROI map of a picture: a file, or a folder's file of its stem."""
    if where is None:
        return None
    path = mask_path(name, where) if os.path.isdir(where) else where
    if not os.path.exists(path):
        raise UserError(
            f"{name}: no region {path}; add it, or leave --roi out to take "
            "whole pictures"
        )
    return path
