"""Writes TFRecords of a data set in the layout of Pascal VOC.

python BlitzNet/make_records.py --data_path=DIR --output=DIR [--dataset=NAME]
  [--sbd=DIR]
One file for each list of pictures, with names that train.py finds.
"""

import os
import sys

from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BlitzNet import pictures, records, voc
from BlitzNet.launch import launch

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the conversion."""
    text = flags.DEFINE_string
    text("data_path", None, "Data set in the layout of Pascal VOC.")
    text("output", None, "Folder for the TFRecords.")
    text("sbd", None, "SBD's folder dataset/, for its masks.")
    voc.define_flags()
    flags.mark_flags_as_required(["data_path", "output"])


def main() -> None:
    """Writes a TFRecord for each part of the data set."""
    values = FLAGS.flag_values_dict()
    reader = voc.Reader.of(values, FLAGS.sbd)
    parts, held_out = voc.parts_of(values)
    os.makedirs(FLAGS.output, exist_ok=True)
    # Each once: voc12-val is both trained and evaluated on.
    for part in dict.fromkeys([*parts, held_out]):
        pairs = reader.read(part)
        path = os.path.join(FLAGS.output, part.records[0])
        records.write(path, pairs)
        print(f"{path}: {pictures.describe(pairs, reader.names)}")
    # Records hold numbers; whoever reads them needs the names too.
    path = os.path.join(FLAGS.output, voc.CLASSES_FILE)
    with open(path, "w", encoding="utf8") as file:
        file.write("\n".join([*reader.names[1:], ""]))


if __name__ == "__main__":
    define_flags()
    launch(main)
