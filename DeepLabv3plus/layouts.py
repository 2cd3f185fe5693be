"""Where the pictures and labels of a split lie: the layouts that are known.

Pascal VOC's devkit, TFRecords as the reference's tool writes them, and plain
folders for data of one's own.
"""

import glob
import os
from typing import Optional

import tensorflow as tf

from common.npu_config import UserError
from DeepLabv3plus import pictures
from DeepLabv3plus.pictures import Source

PICTURES, LISTS = "JPEGImages", os.path.join("ImageSets", "Segmentation")
# The first that is there: the reference's, without colours, or the devkit's.
LABEL_FOLDERS = ("SegmentationClassRaw", "SegmentationClass")
# Where a data set may lie below the folder that is given.
VOC_ROOTS = ("", "VOC2012", os.path.join("VOCdevkit", "VOC2012"))
RECORD_ROOTS = ("", "tfrecord")
# What is read of the reference's schema; build_tfrecords.py writes the rest.
RECORD_FEATURES = {
    # Empty by default, so that we can say which record lacks what.
    name: tf.io.FixedLenFeature([], tf.string, "")
    for name in (
        "image/filename",
        "image/encoded",
        "image/segmentation/class/encoded",
    )
}
# People write either.
SAME_SPLITS = {"train_aug": "trainaug", "trainaug": "train_aug"}
LAYOUT_HELP = (
    "expected JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/"
    "{split}.txt as in VOC2012, TFRecords {split}-*, or pictures in {split}/ "
    "with a PNG of the same stem in {split}_labels/ for each of them; only "
    "--exec_mode=train does without a split to evaluate"
)


def find_sources(
    data_path: str, split: str, label_folder: Optional[str] = None
) -> list[Source]:
    """The pictures of a split with their labels, in the data's own order."""
    if not os.path.isdir(data_path):
        raise UserError(
            f"--data_path={data_path}: no such folder; "
            + LAYOUT_HELP.format(split=split)
        )
    for name in (split, SAME_SPLITS.get(split, split)):
        found = (
            _from_voc(data_path, name, label_folder)
            or _from_records(data_path, name)
            or _from_folders(data_path, name)
        )
        if found:
            return found
    raise UserError(
        f"{data_path}: no pictures of split {split} found; "
        + LAYOUT_HELP.format(split=split)
    )


def read_list(path: str) -> list[str]:
    """The stems that a list of ImageSets names."""
    with open(path, encoding="utf8") as file:
        return [line.split()[0] for line in file if line.strip()]


def voc_root(data_path: str) -> Optional[str]:
    """The folder with JPEGImages, if there is one."""
    for root in VOC_ROOTS:
        path = os.path.join(data_path, root)
        if os.path.isdir(os.path.join(path, PICTURES)):
            return path
    return None


def _from_voc(
    data_path: str, split: str, label_folder: Optional[str]
) -> list[Source]:
    """A split of a VOC devkit; empty if there is no such list."""
    root = voc_root(data_path)
    if root is None:
        return []
    path = os.path.join(root, LISTS, f"{split}.txt")
    if not os.path.exists(path):
        return []
    folders = [label_folder] if label_folder else LABEL_FOLDERS
    labels = [os.path.join(root, name) for name in folders]
    labels = [name for name in labels if os.path.isdir(name)]
    if not labels:
        raise UserError(
            f"{root}: no folder {' or '.join(folders)} with labels; add it, "
            "or name another with --label_folder"
        )
    by_stem = {}
    for name in pictures.list_pictures(os.path.join(root, PICTURES)):
        by_stem[os.path.splitext(os.path.basename(name))[0]] = name
    sources = []
    for stem in read_list(path):
        if stem not in by_stem:
            raise UserError(
                f"{path}: names {stem}, which is not in {PICTURES}/; add the "
                "picture or take the line out"
            )
        sources.append(_pair(by_stem[stem], labels[0]))
    return sources


def _from_folders(data_path: str, split: str) -> list[Source]:
    """Pictures in <split>/ with labels in <split>_labels/."""
    folder = os.path.join(data_path, split)
    if not os.path.isdir(folder):
        return []
    names = pictures.list_pictures(folder)
    return [_pair(name, f"{folder}_labels") for name in names]


def _pair(name: str, folder: str) -> Source:
    """A picture file with its label in a folder."""
    label = pictures.label_path(name, folder)
    if not os.path.exists(label):
        raise UserError(
            f"{name}: no label {label}; add it, or move the picture away"
        )
    return Source(name, label)


def _from_records(data_path: str, split: str) -> list[Source]:
    """A split in TFRecords, read into memory; empty if there are none."""
    for root in RECORD_ROOTS:
        folder = os.path.join(data_path, root)
        # The dash keeps train from taking trainval-* as well.
        pattern = os.path.join(glob.escape(folder), f"{split}-*")
        paths = sorted(glob.glob(pattern))
        if paths:
            return [each for path in paths for each in read_records(path)]
    return []


def read_records(path: str) -> list[Source]:
    """The pictures and labels in a file of TFRecords."""
    sources = []
    # Kept in memory: the stream asks for pictures in any order, which files
    # of records cannot serve.
    try:
        for record in tf.data.TFRecordDataset(path):
            parsed = tf.io.parse_single_example(record, RECORD_FEATURES)
            values = (parsed[name].numpy() for name in RECORD_FEATURES)
            sources.append(_source_of(path, *values))
    except tf.errors.OpError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: cannot be read as TFRecords after {len(sources)} "
            f"records ({reason}); is the file truncated?"
        ) from None
    return sources


def _source_of(path: str, name: bytes, picture: bytes, label: bytes) -> Source:
    """The picture and label of one record, both as files."""
    where = f"{path}:{name.decode(errors='replace')}"
    if not picture or not label:
        raise UserError(
            f"{where}: a record without {'label' if picture else 'picture'}; "
            "write records with build_tfrecords.py, or segment pictures that "
            "have no labels with predict.py"
        )
    return Source(where, f"{where} (label)", picture, label)
