"""Writes a VOC data set as TFRecords, in the reference's schema and shards.

python DeepLabv3plus/build_tfrecords.py --data_path=VOC2012 --output=DIR
Every list of ImageSets/Segmentation becomes <split>-0000i-of-00004.tfrecord;
pictures keep their bytes. train.py reads either form.
"""

import glob
import itertools
import os
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.npu_config import UserError
from DeepLabv3plus import layouts, pictures, progress
from DeepLabv3plus.launch import launch

FLAGS = flags.FLAGS
# The reference's number; any other is read as well.
SHARDS = 4


def define_flags() -> None:
    """Defines the flags of the conversion."""
    flags.DEFINE_string("data_path", None, "The devkit, or VOC2012 in it.")
    flags.DEFINE_string("output", None, "Folder for the TFRecords.")
    flags.DEFINE_string(
        "label_folder", None, "Of labels; none: SegmentationClass(Raw)."
    )
    flags.mark_flags_as_required(["data_path", "output"])


def example(source: layouts.Source) -> tf.train.Example:
    """The record of a picture; raises UserError where the label misfits."""
    with open(source.name, "rb") as file:
        content = file.read()
    # Decoded too: a damaged picture would stop whoever reads the records.
    height, width, _ = pictures.read_picture(source.name).shape
    # Without the palette, as the reference's tool expects its labels.
    label = pictures.read_ids(source.label, (height, width))
    stem, extension = os.path.splitext(os.path.basename(source.name))
    # The schema knows these two; readers look at the first bytes instead.
    kind = "png" if extension.lower() == ".png" else "jpeg"
    features = {
        "image/encoded": content,
        "image/filename": stem.encode(),
        "image/format": kind.encode(),
        "image/height": height,
        "image/width": width,
        "image/channels": 3,
        "image/segmentation/class/encoded": encode_label(label),
        "image/segmentation/class/format": b"png",
    }
    return tf.train.Example(
        features=tf.train.Features(
            feature={name: _feature(each) for name, each in features.items()}
        )
    )


def encode_label(label: np.ndarray) -> bytes:
    """Class ids [h, w] as an 8-bit PNG of one channel."""
    return tf.io.encode_png(label[..., np.newaxis]).numpy()


def _feature(value: object) -> tf.train.Feature:
    """Bytes or a whole number."""
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def write_split(
    sources: Sequence[layouts.Source], output: str, split: str
) -> None:
    """Writes the shards of a split, in the order of its list."""
    length = -(-len(sources) // SHARDS)
    watched = progress.watched(sources, len(sources), f"writing {split}")
    # Of fewer pictures than shards the last ones are empty, which is legal.
    for shard in range(SHARDS):
        name = f"{split}-{shard:05d}-of-{SHARDS:05d}.tfrecord"
        with tf.io.TFRecordWriter(os.path.join(output, name)) as writer:
            for source in itertools.islice(watched, length):
                writer.write(example(source).SerializeToString())
    print(f"{split}: {len(sources)} pictures in {SHARDS} shards")


def main() -> None:
    """Converts all splits."""
    root = layouts.voc_root(FLAGS.data_path)
    pattern = os.path.join(glob.escape(root or ""), layouts.LISTS, "*.txt")
    lists = sorted(glob.glob(pattern)) if root else []
    if not lists:
        raise UserError(
            f"--data_path={FLAGS.data_path}: no JPEGImages/ with lists in "
            "ImageSets/Segmentation/; give a VOC devkit"
        )
    os.makedirs(FLAGS.output, exist_ok=True)
    for path in lists:
        split = os.path.splitext(os.path.basename(path))[0]
        sources = layouts.find_sources(root, split, FLAGS.label_folder)
        write_split(sources, FLAGS.output, split)


if __name__ == "__main__":
    define_flags()
    launch(main)
