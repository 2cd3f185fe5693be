"""Reads and checks pictures and labels: TIFF volumes and folders of pairs.

Everything that can be wrong with somebody's files is found here, before the
first step, and told in one line that names the file and the mend.
"""

import os
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from common.npu_config import UserError
from UNet2D import progress

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
# Ours, a little above Pillow's own limit of 89 million.
MAX_PIXELS = 100_000_000  # a larger picture is taken for a bomb
MIN_SIDE = 16  # pixels; the network's smallest step
LAYOUTS = (("images", "labels"), ("train/image", "train/label"))
LAYOUT_HELP = (
    "expected train-volume.tif with train-labels.tif, or folders "
    "images/ and labels/ (or train/image/ and train/label/) whose files "
    "share their stems"
)


class Picture(NamedTuple):
    """A picture [h, w, channels] and its class ids [h, w], both uint8."""

    name: str
    pixels: np.ndarray
    label_name: str
    label: np.ndarray


def natural_key(name: str) -> list:
    """Sorts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", os.path.basename(name))
    # Text and numbers alternate, so that like is compared with like.
    return [int(part) if part.isdigit() else part for part in parts]


def read_pages(path: str, label: bool = False) -> list[np.ndarray]:
    """All pages of a picture file as uint8 arrays [h, w] or [h, w, c].

    16-bit grey is scaled to 8 bits. Of a palette a label keeps the indices,
    which are its ids, and a picture the colours.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        # A damaged file's warnings would come before our one line.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Up to twice its limit Pillow only warns; here that is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return [
                    _to_array(page, label)
                    for page in ImageSequence.Iterator(file)
                ]
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


def _to_array(page: Image.Image, label: bool) -> np.ndarray:
    """Pixels of one page as uint8."""
    if page.mode == "P" and not label:
        page = page.convert("RGB")
    # No conversion of labels: it would turn a palette's ids into grey.
    pixels = np.asarray(page)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype == np.uint8:
        return pixels
    # 16-bit grey comes as either type; 257 takes 65535 to 255 exactly.
    if pixels.dtype in (np.uint16, np.int32) and 0 <= pixels.min():
        if pixels.max() <= 65535:
            return np.round(pixels / 257.0).astype(np.uint8)
    raise ValueError(f"{page.mode} pixels; 8 or 16 bits expected")


def check_picture(name: str, pixels: np.ndarray, channels: int) -> np.ndarray:
    """The picture as [h, w, channels], or a UserError."""
    pixels = pixels.reshape(pixels.shape[:2] + (-1,))
    # Some tools save greyscale as three equal channels, or with a palette.
    if channels == 1 < pixels.shape[-1] and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    if pixels.shape[-1] != channels:
        raise UserError(
            f"{name}: {pixels.shape[-1]} channels where --in_channels="
            f"{channels}; convert the picture or change --in_channels"
        )
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise UserError(
            f"{name}: {pixels.shape[1]}x{pixels.shape[0]} pixels; a tile "
            f"needs at least {MIN_SIDE} on each side: leave the picture out"
        )
    return pixels


def to_classes(
    name: str, label: np.ndarray, num_classes: int, ignore_label: int
) -> np.ndarray:
    """A label file's pixels as class ids [h, w] uint8.

    Two-class masks may be drawn with 0 and 255, as the EM labels are.
    """
    # Some tools save greyscale as three equal channels.
    if label.ndim == 3:
        if (label != label[..., :1]).any():
            raise UserError(
                f"{name}: a colour picture; labels hold one class id per "
                "pixel: save them as greyscale or palette PNG"
            )
        label = label[..., 0]
    if num_classes == 2 and ignore_label != 255 and label.max() == 255:
        return np.where(label == 255, np.uint8(1), label)
    return label


def count_classes(
    pairs: Sequence[Picture], num_classes: int, ignore_label: int
) -> np.ndarray:
    """Pixels of each class; a UserError names values that are none."""
    counts = np.zeros(256, np.int64)
    for pair in pairs:
        # Counting is many times faster than np.unique, which sorts.
        own = np.bincount(pair.label.ravel(), minlength=256)
        wrong = [
            value
            for value in np.flatnonzero(own).tolist()
            if value >= num_classes and value != ignore_label
        ]
        if wrong:
            raise UserError(
                f"{pair.label_name}: label values {wrong[:8]} where "
                f"0..{num_classes - 1} and ignore_label {ignore_label} are "
                "allowed; set --num_classes or --ignore_label, or renumber "
                "the labels"
            )
        counts += own
    return counts[:num_classes]


def _pair(
    name: str,
    pixels: np.ndarray,
    label_name: str,
    label: np.ndarray,
    checks: tuple[int, int, int],
) -> Picture:
    """Checks that picture and label fit the flags and each other."""
    channels, num_classes, ignore_label = checks
    pixels = check_picture(name, pixels, channels)
    label = to_classes(label_name, label, num_classes, ignore_label)
    if pixels.shape[:2] != label.shape:
        raise UserError(
            f"{name}: the picture has {pixels.shape[1]}x{pixels.shape[0]} "
            f"pixels, its label {label.shape[1]}x{label.shape[0]}; they "
            "must be equal"
        )
    return Picture(name, pixels, label_name, label)


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


def _read_volume(
    data_path: str, checks: tuple[int, int, int]
) -> list[Picture]:
    """The pages of train-volume.tif with those of train-labels.tif."""
    volume = os.path.join(data_path, "train-volume.tif")
    labels = os.path.join(data_path, "train-labels.tif")
    if not os.path.exists(labels):
        raise UserError(f"{labels}: missing; {LAYOUT_HELP}")
    pages, masks = read_pages(volume), read_pages(labels, label=True)
    if len(pages) != len(masks):
        raise UserError(
            f"{volume} has {len(pages)} pages, {labels} {len(masks)}; "
            "each page needs its label"
        )
    return [
        _pair(f"{volume}[{page}]", pixels, f"{labels}[{page}]", mask, checks)
        for page, (pixels, mask) in enumerate(zip(pages, masks))
    ]


def _read_folders(
    image_folder: str, label_folder: str, checks: tuple[int, int, int]
) -> list[Picture]:
    """Pairs of files with equal stems."""
    # By stem: a PNG label belongs to a JPEG picture of the same name.
    labels = {}
    if os.path.isdir(label_folder):
        for path in list_pictures(label_folder):
            labels[os.path.splitext(os.path.basename(path))[0]] = path
    pairs = []
    paths = list_pictures(image_folder)
    for path in progress.watched(paths, len(paths), "reading picture"):
        stem = os.path.splitext(os.path.basename(path))[0]
        if stem not in labels:
            raise UserError(
                f"{path}: no label {stem}.* in {label_folder}; add it or "
                "move the picture away"
            )
        pixels = read_single(path)
        label = read_single(labels[stem], label=True)
        pairs.append(_pair(path, pixels, labels[stem], label, checks))
    return pairs


def read_single(path: str, label: bool = False) -> np.ndarray:
    """The only page of a picture file; see `read_pages`."""
    pages = read_pages(path, label)
    if len(pages) != 1:
        raise UserError(
            f"{path}: {len(pages)} pages; in folders each file holds one "
            "picture (a volume is named train-volume.tif)"
        )
    return pages[0]


def read_pairs(
    data_path: str,
    channels: int,
    num_classes: int,
    ignore_label: int,
) -> Sequence[Picture]:
    """Reads and checks all labelled pictures of a data set, naturally ordered.

    They are held in memory, so that nothing is left to check later.
    """
    checks = (channels, num_classes, ignore_label)
    if not os.path.isdir(data_path):
        raise UserError(
            f"--data_path={data_path}: no such folder; {LAYOUT_HELP}"
        )
    pairs: list[Picture] = []
    if os.path.exists(os.path.join(data_path, "train-volume.tif")):
        pairs = _read_volume(data_path, checks)
    for images, labels in LAYOUTS:
        images = os.path.join(data_path, images)
        if not pairs and os.path.isdir(images):
            labels = os.path.join(data_path, labels)
            pairs = _read_folders(images, labels, checks)
    if not pairs:
        raise UserError(
            f"--data_path={data_path}: no pictures found; {LAYOUT_HELP}"
        )
    counts = count_classes(pairs, num_classes, ignore_label)
    # A label may be ignored altogether.
    shares = counts / max(counts.sum(), 1)
    shown = ", ".join(f"class {n} {s:.1%}" for n, s in enumerate(shares))
    print(f"{len(pairs)} pictures; of their pixels: {shown}")
    return pairs
