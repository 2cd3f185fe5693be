"""Segments your own pictures with a run of BiSeNet, at their own size.

python BiSeNet/predict.py --input=FILE|FOLDER|GLOB --output=DIR [--run=RUN]
A folder may hold the frames of a video: they come in natural order, and the
last line tells how many a second were computed.
"""

import glob
import os
import sys
import time
from collections.abc import Sequence
from typing import Callable

import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BiSeNet import evaluate, pictures, run_folder, visuals
from BiSeNet.classes import Classes
from BiSeNet.launch import launch
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of prediction."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder; none: the one shipped.")
    flags.DEFINE_string("input", None, "A picture, a folder or a glob.")
    flags.DEFINE_string("output", None, "Folder for masks and overlays.")
    evaluate.define_scale_flags()
    for name in ("scales", "flip"):
        flags.declare_key_flag(name)
    for name in ("input", "output"):
        flags.mark_flag_as_required(name)


def make_inference(
    network: tf.keras.Model, scales: Sequence[float], flip: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a picture [h, w, 3] uint8 to class ids [h, w] uint8."""

    def infer(picture):
        images = tf.cast(picture, tf.float32)[tf.newaxis]
        scores = evaluate.predict_scores(network, images, scales, flip)
        return tf.cast(tf.argmax(scores[0], -1), tf.uint8)

    # Traced once for pictures of all sizes.
    signature = [tf.TensorSpec([None, None, 3], tf.uint8)]
    graph = tf.function(infer, signature, autograph=False)
    return lambda picture: graph(picture).numpy()


def find_inputs(pattern: str) -> list[str]:
    """Picture files meant by a file, a folder or a glob, natural order."""
    if os.path.isdir(pattern):
        found = pictures.list_pictures(pattern)
    # Before any glob: a name may have brackets in it.
    elif os.path.exists(pattern):
        found = [pattern]
    else:
        found = sorted(glob.glob(pattern), key=pictures.natural_key)
    if not found:
        raise UserError(
            f"--input={pattern}: no pictures found; give a file, a folder or "
            f"a glob of {', '.join(pictures.EXTENSIONS)} files"
        )
    named = {}
    for path in found:
        stem = os.path.splitext(os.path.basename(path))[0]
        # Without a word the later result would take the earlier one's place.
        if stem in named:
            raise UserError(
                f"{named[stem]} and {path}: the results of both would be "
                f"{stem}_*; rename one, or predict them into two folders"
            )
        named[stem] = path
    return found


def _save(
    path: str,
    output: str,
    picture: np.ndarray,
    ids: np.ndarray,
    classes: Classes,
) -> None:
    """Writes the palette PNG of class ids and the overlay of one picture."""
    base = os.path.join(output, os.path.splitext(os.path.basename(path))[0])
    # Indices with a palette: ids for programs, colours for people.
    mask = Image.fromarray(ids)
    mask.putpalette(visuals.palette(classes).ravel().tolist())
    mask.save(base + "_mask.png")
    blended = visuals.overlay(picture, ids, classes)
    Image.fromarray(blended).save(base + "_overlay.png")


def predict_run(
    run: str,
    paths: list[str],
    output: str,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> None:
    """Segments the pictures in `paths` with the best weights of `run`."""
    values, network = evaluate.restore(run)
    infer = make_inference(network, scales, flip)
    os.makedirs(output, exist_ok=True)
    start, seconds = time.perf_counter(), []
    for done, path in enumerate(paths, 1):
        picture = pictures.read_picture(path)
        before = time.perf_counter()
        ids = infer(picture)
        seconds.append(time.perf_counter() - before)
        _save(path, output, picture, ids, values["classes"])
        left = (time.perf_counter() - start) / done * (len(paths) - done)
        print(f"{done}/{len(paths)} {path}  left {left:.0f} s", flush=True)
    print(f"wrote masks and overlays of {len(paths)} files to {output}")
    # The first one traces the graph; a single picture tells no rate.
    if len(seconds) > 1:
        rate = 1.0 / np.mean(seconds[1:])
        print(f"{rate:.1f} fps of the network alone, after the first picture")


def main() -> None:
    """Predicts what --input names."""
    run = run_folder.find_run(FLAGS.run)
    # Before the device is opened, so that a wrong path is told at once.
    paths, scales = find_inputs(FLAGS.input), evaluate.read_scales()
    print(npu_config.setup().describe())
    predict_run(run, paths, FLAGS.output, scales, FLAGS.flip)


if __name__ == "__main__":
    define_flags()
    launch(main)
