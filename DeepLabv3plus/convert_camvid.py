"""Writes CamVid as a VOC layout with 11 classes and Void as 255.

python DeepLabv3plus/convert_camvid.py --data_path=CAMVID --output=DIR
Takes the two forms in which CamVid goes round: coloured labels in
<split>_labels/ with class_dict.csv, or ids 0 to 11 in <split>annot/ (SegNet).
"""

import csv
import os
import shutil
import sys
from typing import Callable

import numpy as np
from absl import flags
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.npu_config import UserError
from DeepLabv3plus import pictures, progress, visuals
from DeepLabv3plus.launch import launch
from DeepLabv3plus.layouts import LISTS, PICTURES

FLAGS = flags.FLAGS
SPLITS = ("train", "val", "test")
LABELS = "SegmentationClass"
# VOC's value, which is also train.py's default of --ignore_label.
VOID = 255
# Of SegNet's ids, which come without names; what follows them is Void.
SEGNET_NAMES = (
    "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian "
    "Bicyclist"
).split()
Convert = Callable[[str], np.ndarray]


def define_flags() -> None:
    """Defines the flags of the conversion."""
    flags.DEFINE_string("data_path", None, "Folder with train/ and val/.")
    flags.DEFINE_string("output", None, "Folder for the VOC layout.")
    flags.mark_flags_as_required(["data_path", "output"])


def read_colours(path: str) -> tuple[list[str], dict[int, int]]:
    """Names of the classes but Void, and ids by packed colour."""
    names, ids = [], {}
    with open(path, newline="", encoding="utf8") as file:
        for row in csv.DictReader(file):
            colour = int(row["r"]) << 16 | int(row["g"]) << 8 | int(row["b"])
            is_void = row["name"].strip().lower() == "void"
            ids[colour] = VOID if is_void else len(names)
            if not is_void:
                names.append(row["name"].strip())
    return names, ids


def from_colours(path: str, ids: dict[int, int]) -> np.ndarray:
    """Class ids [h, w] of a coloured label."""
    # As bytes, red and green would be shifted out of their range.
    picture = pictures.read_picture(path).astype(np.int32)
    red, green, blue = np.moveaxis(picture, 2, 0)
    packed = red << 16 | green << 8 | blue
    label = np.full(packed.shape, VOID, np.uint8)
    for colour in np.unique(packed):
        if colour not in ids:
            raise UserError(
                f"{path}: colour {colour >> 16},{colour >> 8 & 255},"
                f"{colour & 255} is not in class_dict.csv; add it there"
            )
        label[packed == colour] = ids[colour]
    return label


def from_ids(path: str) -> np.ndarray:
    """Class ids [h, w] of a SegNet label, what is no class as Void."""
    with Image.open(path) as image:
        label = np.array(image)
    label[label >= len(SEGNET_NAMES)] = VOID
    return label.astype(np.uint8)


def find_form(data_path: str) -> tuple[list[str], str, Convert]:
    """Names of the classes, ending of label folders, reader of labels."""
    table = os.path.join(data_path, "class_dict.csv")
    if os.path.exists(table):
        names, ids = read_colours(table)
        return names, "_labels", lambda path: from_colours(path, ids)
    if os.path.isdir(os.path.join(data_path, "trainannot")):
        return SEGNET_NAMES, "annot", from_ids
    raise UserError(
        f"--data_path={data_path}: neither class_dict.csv with train_labels/ "
        "nor trainannot/; give a folder with CamVid in one of these forms"
    )


def find_label(name: str, folder: str) -> str:
    """The label of a picture; some copies add _L to its stem."""
    path = pictures.label_path(name, folder)
    for candidate in (path, path.replace(".png", "_L.png")):
        if os.path.exists(candidate):
            return candidate
    raise UserError(f"{name}: no label {path}; add it, or move it away")


def convert_split(
    data_path: str, output: str, split: str, ending: str, convert: Convert
) -> int:
    """Writes a split; returns the number of its pictures."""
    folder = os.path.join(data_path, split)
    stems = []
    names = pictures.list_pictures(folder)
    for name in progress.watched(names, len(names), f"writing {split}"):
        stem = os.path.splitext(os.path.basename(name))[0]
        # PNGs stay PNGs: JPEGImages/ may hold any kind of picture here.
        shutil.copyfile(
            name, os.path.join(output, PICTURES, os.path.basename(name))
        )
        label = Image.fromarray(convert(find_label(name, folder + ending)))
        label.putpalette(visuals.palette(256).ravel().tolist())
        label.save(os.path.join(output, LABELS, f"{stem}.png"))
        stems.append(stem)
    with open(os.path.join(output, LISTS, f"{split}.txt"), "w") as file:
        file.writelines(f"{stem}\n" for stem in stems)
    return len(stems)


def main() -> None:
    """Converts the splits that are there."""
    names, ending, convert = find_form(FLAGS.data_path)
    for folder in (PICTURES, LABELS, LISTS):
        os.makedirs(os.path.join(FLAGS.output, folder), exist_ok=True)
    for split in SPLITS:
        if os.path.isdir(os.path.join(FLAGS.data_path, split)):
            count = convert_split(
                FLAGS.data_path, FLAGS.output, split, ending, convert
            )
            print(f"{split}: {count} pictures")
    path = os.path.join(FLAGS.output, pictures.NAMES_FILE)
    with open(path, "w", encoding="utf8") as file:
        file.writelines(f"{name}\n" for name in names)


if __name__ == "__main__":
    define_flags()
    launch(main)
