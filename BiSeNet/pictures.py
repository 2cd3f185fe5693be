"""Finds, reads and checks pictures and their labels.

Everything that can be wrong with somebody's files is found here, before the
first step, and told in one line that names the file and the mend.
"""

import os
import re
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from BiSeNet import classes as class_tables
from BiSeNet import progress
from BiSeNet.classes import UNKNOWN, Classes
from common.npu_config import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
# Ours, a little above Pillow's own limit of 89 million.
MAX_PIXELS = 100_000_000  # a larger picture is taken for a bomb
# Ours: CamVid's largest split, 421 pictures of 960x720, takes 0.9 GB.
MAX_DECODED = 2**31  # bytes of decoded pictures that are kept in memory
# What TensorFlow may decode itself. All else is kept decoded, even beyond
# MAX_DECODED.
GRAPH_FORMATS = [
    (kind, mode) for kind in ("PNG", "JPEG") for mode in ("L", "RGB")
]
CHECKED_PICTURES = 32  # pictures that are decoded unless all are asked for
READERS = 4  # threads; Pillow lets go of Python's lock while it decodes
# The seed's and SegNet's; CamVid itself names labels with _L.
LABEL_SUFFIXES = ("_labels", "annot")  # of the folder beside the pictures'
STEM_SUFFIXES = ("", "_L")  # of a label's stem after its picture's
LAYOUT_HELP = (
    "expected folders train/, val/ and test/ with pictures, each with a "
    "folder train_labels/ (colours of class_dict.csv) or trainannot/ (class "
    "ids) of PNG files x.png or x_L.png beside it, or a list train.txt of "
    "pairs; --exec_mode=train needs train alone"
)


class Picture(NamedTuple):
    """A picture with its label in memory.

    Attributes:
      name: path of the picture.
      content: its pixels [h, w, 3], uint8; empty where there are too many
        of them for the memory.
      label: class ids [h, w], packed; UNKNOWN where nothing is known.
      size: height and width, pixels.
    """

    name: str
    content: bytes
    label: bytes
    size: tuple[int, int]


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
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if decode:
                    image.load()
                # Closed, it still tells its size and mode.
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


def read_picture(path: str) -> np.ndarray:
    """A picture file as RGB [h, w, 3] uint8, whatever its own mode."""
    # Not turned as EXIF says: TensorFlow does not do so either, and a label
    # lies on the pixels as they are stored.
    image = _open(path)
    if image.mode.startswith("I"):
        # Pillow would cut 16 bits off at 255 instead of scaling them.
        wide = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))
    # A palette's colours, a grey value thrice, no transparency.
    return np.asarray(image.convert("RGB"))


def read_ids(path: str, count: int, ignore_label: int) -> np.ndarray:
    """Class ids [h, w] uint8 of a grey or palette picture."""
    ids = np.asarray(_open(path))
    if ids.ndim == 3 and ids.shape[-1] in (2, 4):
        ids = ids[..., :-1]  # the last channel says how opaque a pixel is
    if ids.ndim == 3:
        # Some tools save greyscale as three equal channels.
        if (ids != ids[..., :1]).any():
            raise UserError(
                f"{path}: a colour picture; labels in this folder hold one "
                "class id per pixel: save them as greyscale or palette PNG, "
                "or put colour labels in a folder of the name <split>_labels"
            )
        ids = ids[..., 0]
    ids = ids.astype(np.int64)
    # Counting is many times faster than np.unique, which sorts.
    own = np.bincount(np.clip(ids, 0, 256).ravel(), minlength=257)
    wrong = [
        value
        for value in np.flatnonzero(own).tolist()
        if value >= count and value != ignore_label
    ]
    if wrong:
        raise UserError(
            f"{path}: label values {wrong[:8]} where 0..{count - 1} and "
            f"ignore_label {ignore_label} are allowed; set --num_classes or "
            "--ignore_label, or renumber the labels"
        )
    return np.where(ids == ignore_label, UNKNOWN, ids).astype(np.uint8)


class Reader:
    """Reads the pictures of one data set under one choice of classes.

    Attributes:
      classes: those that the network tells apart.
    """

    def __init__(self, values: dict[str, object]) -> None:
        """Takes the flags of a run by their names."""
        self.data_path = values["data_path"]
        if not os.path.isdir(self.data_path):
            raise UserError(
                f"--data_path={self.data_path}: no such folder; {LAYOUT_HELP}"
            )
        self.ignore_label = values["ignore_label"]
        self.admit_unknown = values["unknown_colour"] == "ignore"
        path = class_tables.find(self.data_path, values["class_dict"])
        count = values["num_classes"]
        if path:
            self.drawn = class_tables.read(path)
        else:
            groups = len(class_tables.CAMVID_GROUPS)
            self.drawn = class_tables.numbered(count or groups)
        self.table = class_tables.colour_table(self.drawn) if path else None
        self.classes, self.groups = self.drawn, None
        if values["group_classes"] == "camvid11":
            self.classes = class_tables.groups()
            # All 256, so that UNKNOWN goes through the table unchanged.
            ids = np.arange(256, dtype=np.uint8)
            ids[: len(self.drawn.names)] = class_tables.grouping(self.drawn)
            self.groups = ids
        if count not in (None, len(self.classes.names)):
            raise UserError(
                f"--num_classes={count}: {path or self.data_path} has "
                f"{len(self.classes.names)} classes; leave the flag out"
            )
        # Void is the default, which a data set may lack; a name that somebody
        # gives has to exist.
        self.classes = self.classes.ignoring(
            values["ignore_classes"], values["ignore_classes"] != ["Void"]
        )

    def read(self, split: str, check_all: bool = False) -> list[Picture]:
        """The pictures of a split with their labels, in natural order.

        All labels are read and checked. Pictures are decoded and kept as
        long as they fit the memory; of more than that a sample, or all, are
        checked.
        """
        pairs = self.find_pairs(split)
        decoded = sum(
            3 * width * height
            for width, height in (_open(name, False).size for name, _ in pairs)
        )
        keep = decoded <= MAX_DECODED
        step = 1 if check_all else -(-len(pairs) // CHECKED_PICTURES)
        checked = [number % step == 0 for number in range(len(pairs))]
        # In order, so that the first mistake told is the first there is.
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(
                lambda pair, check: self._read_one(*pair, keep, check),
                pairs,
                checked,
            )
            return list(progress.watched(read, len(pairs), "reading picture"))

    def find_pairs(self, split: str) -> list[tuple[str, str]]:
        """Paths of the pictures of a split and of their labels."""
        listed = os.path.join(self.data_path, f"{split}.txt")
        folder = os.path.join(self.data_path, split)
        if not os.path.isdir(folder) and os.path.exists(listed):
            return self._read_list(listed)
        names = list_pictures(folder) if os.path.isdir(folder) else []
        if not names:
            raise UserError(f"{folder}: no pictures found; {LAYOUT_HELP}")
        folders = [f"{folder}{suffix}" for suffix in LABEL_SUFFIXES]
        found = [each for each in folders if os.path.isdir(each)]
        if not found:
            raise UserError(f"{folders[0]}: no such folder; {LAYOUT_HELP}")
        # By stem: the reference pairs two sorted listings, where one missing
        # file shifts all labels after it.
        return [(name, _label_of(name, found[0])) for name in names]

    def _read_list(self, path: str) -> list[tuple[str, str]]:
        """Pairs from a list, whose paths may be of another machine."""
        with open(path, encoding="utf8") as file:
            rows = [line.split() for line in file if line.strip()]
        pairs = []
        for row in rows:
            if len(row) != 2:
                raise UserError(
                    f"{path}: {' '.join(row)}: expected the path of a "
                    "picture and that of its label"
                )
            pairs.append(tuple(self._locate(name, path) for name in row))
        if not pairs:
            raise UserError(f"{path}: no pairs in it; {LAYOUT_HELP}")
        return pairs

    def _locate(self, name: str, listed: str) -> str:
        """A listed file: as it is written, or below the data's folder."""
        parts = name.strip("/").split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        below = [os.path.join(self.data_path, end) for end in ends]
        # The longest end first, so that equal names in two folders stay apart.
        for path in (name, *below):
            if os.path.isfile(path):
                return path
        raise UserError(f"{listed}: {name}: no such file; add it, or its row")

    def _read_one(
        self, name: str, label_path: str, keep: bool, check: bool
    ) -> Picture:
        """Reads a picture and its label, and checks that they fit."""
        image, content = _open(name, check and not keep), b""
        size = image.size[::-1]
        # TensorFlow does not decode every kind of file.
        if keep or (image.format, image.mode) not in GRAPH_FORMATS:
            content = read_picture(name).tobytes()
        label = self.read_label(label_path)
        if label.shape != size:
            raise UserError(
                f"{label_path}: {label.shape[1]}x{label.shape[0]} pixels, "
                f"its picture has {size[1]}x{size[0]}; they must be equal"
            )
        return Picture(name, content, pack(label), size)

    def read_label(self, path: str) -> np.ndarray:
        """Class ids [h, w] uint8 of a colour or an integer label."""
        # A grey picture is taken for ids, even where the csv has grey colours.
        if self.table is not None and _open(path, False).mode != "L":
            ids = self._read_colours(path)
        else:
            ids = read_ids(path, len(self.drawn.names), self.ignore_label)
        return ids if self.groups is None else self.groups[ids]

    def _read_colours(self, path: str) -> np.ndarray:
        """Class ids [h, w] of a picture in the colours of class_dict.csv."""
        colours = read_picture(path)
        # A byte would lose the bits that are shifted.
        wide = colours.astype(np.int32)
        ids = self.table[wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]]
        unknown = ids == UNKNOWN
        # CamVid's Seq05VD_f02610_L.png is known for such pixels, which the
        # reference makes class 0, Animal.
        if unknown.any() and not self.admit_unknown:
            first = colours[unknown][0]
            raise UserError(
                f"{path}: {unknown.sum()} pixels of colours that are not in "
                f"{class_tables.FILE}, the first {tuple(first.tolist())}, "
                f"nearest to {class_tables.nearest(self.drawn, first)}; mend "
                "the label, or ignore them: --unknown_colour=ignore"
            )
        return ids


def _label_of(name: str, folder: str) -> str:
    """The label of a picture: the PNG of its stem, with or without _L."""
    stem = os.path.splitext(os.path.basename(name))[0]
    paths = [
        os.path.join(folder, f"{stem}{suffix}.png") for suffix in STEM_SUFFIXES
    ]
    for path in paths:
        if os.path.exists(path):
            return path
    raise UserError(
        f"{name}: no {paths[0]} nor {os.path.basename(paths[1])}; add it, or "
        "move the picture away"
    )


def pack(pixels: np.ndarray) -> bytes:
    """The bytes of an array, compressed."""
    # Labels take a few kilobytes where raw ones would fill the memory. Level
    # 1, since more would take longer than it saves.
    return zlib.compress(np.ascontiguousarray(pixels).tobytes(), 1)


def unpack_label(picture: Picture) -> np.ndarray:
    """Class ids [h, w] uint8 of a picture."""
    raw = np.frombuffer(zlib.decompress(picture.label), np.uint8)
    return raw.reshape(picture.size)


def class_counts(pairs: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each label value, and of the pictures where it occurs.

    Both int64 [256].
    """
    pixels, pictures = np.zeros((2, 256), np.int64)
    for pair in pairs:
        own = np.bincount(unpack_label(pair).ravel(), minlength=256)
        pixels += own
        pictures += np.where(own > 0, own.sum(), 0)
    return pixels, pictures


def describe(pairs: Sequence[Picture], classes: Classes) -> str:
    """One line: how many pictures, and what their labels hold."""
    counts, _ = class_counts(pairs)
    counts[list(classes.ignored)] = 0
    shares = counts[: len(classes.names)]
    shares = shares / max(shares.sum(), 1)
    shown = ", ".join(
        f"{name} {share:.1%}"
        for id_, (name, share) in enumerate(zip(classes.names, shares))
        if id_ not in classes.ignored
    )
    return f"{len(pairs)} pictures; of their pixels: {shown}"


def class_weights(
    kind: str, pairs: Sequence[Picture], classes: Classes
) -> list[float]:
    """Weights of the 256 label values in the loss; 0 where ignored.

    Args:
      kind: none, median_freq, sqrt_freq (its square root), or a weight for
        each class, separated by commas.
      pairs: the training pictures, whose pixels are counted.
      classes: of the labels.
    """
    weights, count = np.zeros(256), len(classes.names)
    weights[:count] = _weights_by_kind(kind, pairs, classes)
    weights[list(classes.ignored)] = 0.0
    return [float(weight) for weight in weights]


def _weights_by_kind(
    kind: str, pairs: Sequence[Picture], classes: Classes
) -> np.ndarray:
    """The weight of every class, ignored or not."""
    count = len(classes.names)
    if kind == "none":
        return np.ones(count)
    if kind in ("median_freq", "sqrt_freq"):
        pixels, pictures = (each[:count] for each in class_counts(pairs))
        # Median frequency balancing of Eigen and Fergus, arXiv 1411.4734, as
        # SegNet uses it; the root is ours, milder on the rarest classes.
        shares = pixels / np.maximum(pictures, 1)
        shown = shares > 0
        shown[list(classes.ignored)] = False
        # A class that never occurs never weighs anything.
        weights = np.where(
            shown, np.median(shares[shown]) / np.maximum(shares, 1e-12), 1.0
        )
        return np.sqrt(weights) if kind == "sqrt_freq" else weights
    try:
        given = [float(part) for part in kind.split(",")]
    except ValueError:
        given = []
    if len(given) != count or min(given) < 0.0:
        raise UserError(
            f"--class_weights={kind}: none, median_freq, sqrt_freq, or "
            f"{count} numbers of 0 or more, one for each class: "
            f"{', '.join(classes.names)}"
        )
    return np.array(given)
