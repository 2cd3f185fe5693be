"""Makes a detection data set of one for segmentation, such as CamVid.

python BlitzNet/boxes_from_masks.py --data_path=DIR --output=DIR --objects=Car
makes an object with a box of every connected region of the classes named. It
reads the layout of CamVid, whose labels are colours, and writes Pascal VOC's.
"""

import csv
import os
import sys

import numpy as np
from absl import flags
from scipy import ndimage

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BlitzNet import pictures, progress
from BlitzNet.augment import UNLABELLED
from BlitzNet.launch import launch
from BlitzNet.sample_data import Scene, Writer
from common.npu_config import UserError

FLAGS = flags.FLAGS
SPLITS = ("train", "val")
CLASS_TABLE = "class_dict.csv"
LABEL_MARKS = ("", "_L")  # what a label's name may have after its picture's
COLOUR_WEIGHTS = np.array([65536, 256, 1])


def define_flags() -> None:
    """Defines the flags of the conversion."""
    text = flags.DEFINE_string
    text("data_path", None, "Folder with class_dict.csv, train, val.")
    text("output", None, "Folder for the data set in VOC's layout.")
    flags.DEFINE_list("objects", None, "Classes that get boxes, by name.")
    flags.DEFINE_list("void", ["Void"], "Classes that do not count.")
    flags.DEFINE_integer("least_pixels", 101, "Of an object.", 1)
    flags.mark_flags_as_required(["data_path", "output", "objects"])


def read_classes(path: str) -> dict[str, int]:
    """Colours as numbers, by class name."""
    try:
        with open(path, newline="", encoding="utf8") as file:
            return {
                row["name"].strip(): int(
                    COLOUR_WEIGHTS @ [int(row[each]) for each in "rgb"]
                )
                for row in csv.DictReader(file, skipinitialspace=True)
            }
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as a table of classes ({error!r}); "
            "expected name,r,g,b and a line per class"
        ) from None


def class_ids(
    path: str, colours: dict[str, int], names: list[str]
) -> np.ndarray:
    """Mask [h, w] uint8 of a label picture; void pixels are UNLABELLED.

    Args:
      path: of the label.
      colours: by class name.
      names: classes in the order of their ids, from 1 on.
    """
    numbers = pictures.read_picture(path).astype(np.int64) @ COLOUR_WEIGHTS
    mask = np.zeros(numbers.shape, np.uint8)
    known = np.isin(numbers, list(colours.values()))
    if not known.all():
        wrong = numbers[~known][0]
        shown = ",".join(str(wrong // each % 256) for each in COLOUR_WEIGHTS)
        raise UserError(
            f"{path}: colour {shown} is not in {CLASS_TABLE}; add it, or mend "
            "the label"
        )
    for name, number in colours.items():
        # main() names all classes but void ones: no pixel is background.
        value = names.index(name) + 1 if name in names else 0
        mask[numbers == number] = UNLABELLED if name in FLAGS.void else value
    return mask


def find_objects(
    mask: np.ndarray, names: list[str], objects: list[str], least_pixels: int
) -> list[tuple[str, tuple[int, int, int, int], bool]]:
    """A box for each connected region, see sample_data.Scene."""
    found = []
    for name in objects:
        own = mask == names.index(name) + 1
        # Corners connect, or what is thin and slanted would fall apart. Things
        # that touch become one object: such masks know no instances.
        regions, _ = ndimage.label(own, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel())
        for number, place in enumerate(ndimage.find_objects(regions), 1):
            rows, columns = place
            # Ends lie behind the last pixel: voc.py takes the differences.
            box = (columns.start, rows.start, columns.stop, rows.stop)
            if sizes[number] >= least_pixels:
                found.append((name, box, False))
    return found


def find_label(folder: str, stem: str) -> str:
    """The label of a picture."""
    for mark in LABEL_MARKS:
        path = os.path.join(folder, f"{stem}{mark}.png")
        if os.path.exists(path):
            return path
    raise UserError(f"{folder}: no label {stem}.png; add it")


def main() -> None:
    """Converts both splits."""
    table = os.path.join(FLAGS.data_path, CLASS_TABLE)
    colours = read_classes(table)
    unknown = sorted(set(FLAGS.objects) - set(colours))
    if unknown:
        raise UserError(
            f"--objects={','.join(unknown)}: {table} has {', '.join(colours)}"
        )
    # What gets no box gets a class of the mask all the same.
    others = [
        name
        for name in colours
        if name not in FLAGS.objects and name not in FLAGS.void
    ]
    names = [*FLAGS.objects, *others]
    writer = Writer(FLAGS.output, tuple(names))
    for split in SPLITS:
        folder = os.path.join(FLAGS.data_path, split)
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder")
        stems = []
        paths = pictures.list_pictures(folder)
        for path in progress.watched(paths, len(paths), f"writing {split}"):
            stem = os.path.splitext(os.path.basename(path))[0]
            label = find_label(f"{folder}_labels", stem)
            mask = class_ids(label, colours, names)
            found = find_objects(
                mask, names, FLAGS.objects, FLAGS.least_pixels
            )
            writer.write(stem, Scene(pictures.read_picture(path), mask, found))
            stems.append(stem)
        writer.write_list(split, stems)
        print(f"{split}: {len(stems)} pictures in {FLAGS.output}")


if __name__ == "__main__":
    define_flags()
    launch(main)
