"""Inputs for a model converted for an Ascend 310, and scores of its outputs.

python BlitzNet/offline.py --run=RUN --exec_mode=inputs --output=DIR writes the
pictures of the evaluation as %05d.bin, float32 [1, S, S, 3]; --exec_mode=score
--input=DIR evaluates %05d_output_0 (confidence), _1 (location) and _2
(segmentation), .txt or .bin, as evaluate.py does the live network.
"""

import os
import sys

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BlitzNet import dataset, detection, evaluate, run_folder
from BlitzNet.launch import launch
from BlitzNet.model import Architecture
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS
# The seed's names: the number of a picture in the list, from 0 on.
STEM = "{:05d}"


def define_flags() -> None:
    """Defines the flags of both halves."""
    npu_config.define_flags()
    FLAGS.set_default("precision_mode", "force_fp32")
    text = flags.DEFINE_string
    flags.DEFINE_enum(
        "exec_mode", "score", ["inputs", "score"], "Which half to do."
    )
    text("run", None, "Run folder: --output_path of train.py.")
    text("data_path", None, "Data set; none: the run's own.")
    text("input", None, "Folder with the outputs of msame.")
    text("output", None, "Folder for the inputs or the results.")
    flags.DEFINE_integer("limit_eval", 0, "Only the first pictures; 0: all.")
    detection.define_flags()
    flags.mark_flags_as_required(["run", "output"])


class OfflineJudge(evaluate.Judge):
    """A judge of what was computed elsewhere, picture by picture."""

    def __init__(
        self,
        folder: str,
        architecture: Architecture,
        limits: detection.Limits,
    ) -> None:
        # Without a network: of the judge's graphs only `compare` is traced.
        super().__init__(None, architecture, limits)
        self.folder = folder
        boxes, side = len(self.prior_boxes), architecture.map_sizes()[0]
        self.shapes = {}
        # In the order of the export's outputs.
        if architecture.detect:
            self.shapes["confidence"] = (1, boxes, self.classes)
            self.shapes["location"] = (1, boxes, 4)
        if architecture.segment:
            self.shapes["segmentation"] = (1, side, side, self.classes)
        signature = {
            name: tf.TensorSpec(shape) for name, shape in self.shapes.items()
        }
        graph = tf.function(
            self.compare,
            [signature, tf.TensorSpec([None, None], tf.int32)],
            autograph=False,
        )
        self.step = lambda batch: graph(self.read(), batch["mask"][0])
        self.number = 0

    def read(self) -> dict[str, tf.Tensor]:
        """The outputs for the next picture."""
        # By a count: pictures have to come in order, and all to one rank.
        base = os.path.join(self.folder, STEM.format(self.number))
        self.number += 1
        return {
            name: tf.constant(read_output(f"{base}_output_{index}", shape))
            for index, (name, shape) in enumerate(self.shapes.items())
        }


def read_output(base: str, shape: tuple) -> np.ndarray:
    """An output as text or binary float32, whichever there is."""
    path = base + (".bin" if os.path.exists(base + ".bin") else ".txt")
    try:
        values = (
            np.fromfile(path, np.float32)
            if path.endswith(".bin")
            else np.loadtxt(path, np.float32).ravel()
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give msame's outputs for "
            "every picture, in text or binary form"
        ) from None
    if values.size != np.prod(shape):
        raise UserError(
            f"{path}: {values.size} numbers where {shape} are expected; was "
            "it made by another model?"
        )
    return values.reshape(shape)


def write_inputs(values: dict[str, object], output: str) -> int:
    """Writes the pictures as the network sees them; returns their number."""
    os.makedirs(output, exist_ok=True)
    pairs = evaluate.read_pictures(values)
    batches = dataset.evaluation_batches(pairs, values["image_size"])
    for number, batch in enumerate(batches):
        path = os.path.join(output, f"{STEM.format(number)}.bin")
        # In [0, 1], since the exported graph multiplies by 255 itself.
        batch["image"].numpy().tofile(path)
    return len(pairs)


def main() -> None:
    """Writes inputs, or scores outputs."""
    if FLAGS.exec_mode == "score" and not os.path.isdir(FLAGS.input or ""):
        raise UserError(f"--input={FLAGS.input}: give the folder of outputs")
    runtime = npu_config.setup()
    values = run_folder.read_flags(FLAGS.run)
    values["limit_eval"] = FLAGS.limit_eval
    values["data_path"] = FLAGS.data_path or values["data_path"]
    values.update(detection.given_flags())
    if FLAGS.exec_mode == "inputs":
        count = write_inputs(values, FLAGS.output)
        print(f"wrote {count} pictures to {FLAGS.output}")
        return
    limits = detection.Limits.of(values)
    judge = OfflineJudge(FLAGS.input, Architecture.of(values), limits)
    pairs = evaluate.read_pictures(values)
    table, rows = evaluate.evaluate(judge, values, pairs, runtime)
    evaluate.save_results(FLAGS.output, table, rows, values)


if __name__ == "__main__":
    define_flags()
    launch(main)
