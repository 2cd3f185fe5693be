"""Segments your own pictures with a run of ROI_FCN, at their own size.

python ROI_FCN/predict.py --run=RUN --input=FILE|FOLDER|GLOB --output=DIR
  [--roi=FILE|FOLDER]
--roi names the regions, one PNG with the stem of each picture: 0 outside,
anything else inside. Without it whole pictures are the regions.
"""

import glob
import os
import sys
import time
from typing import Callable, Optional

import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from common.npu_config import UserError
from ROI_FCN import augment, dataset, evaluate, pictures, visuals
from ROI_FCN.launch import launch

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of prediction."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("input", None, "A picture, a folder or a glob.")
    flags.DEFINE_string("output", None, "Folder for masks and overlays.")
    flags.DEFINE_string("roi", None, "Region file or folder; none: all of it.")
    for name in ("run", "input", "output"):
        flags.mark_flag_as_required(name)


def make_inference(
    network: tf.keras.Model, recipe: augment.Recipe
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of a picture [h, w, 3] and its region [h, w], both uint8.

    It returns logits [h, w, C]. The network sees the picture at the scale of
    training.
    """

    def infer(picture, region):
        size = tf.shape(picture)[:2]
        seen = augment.seen_size(size, recipe)
        region = augment.resize_ids(region[..., tf.newaxis], seen)
        return evaluate.predict_logits(
            network,
            augment.resize_image(picture, seen)[tf.newaxis],
            tf.cast(region, tf.float32)[tf.newaxis],
            size,
        )[0]

    # Traced once for pictures of all sizes.
    signature = [
        tf.TensorSpec([None, None, 3], tf.uint8),
        tf.TensorSpec([None, None], tf.uint8),
    ]
    graph = tf.function(infer, signature, autograph=False)
    return lambda picture, region: graph(picture, region).numpy()


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
    classes: np.ndarray,
    count: int,
) -> None:
    """Writes the palette PNG of class ids and the overlay of one picture."""
    base = os.path.join(output, os.path.splitext(os.path.basename(path))[0])
    # Indices with a palette: ids for programs, colours for people.
    mask = Image.fromarray(classes)
    mask.putpalette(visuals.palette(count).ravel().tolist())
    mask.save(base + "_mask.png")
    blended = visuals.overlay(picture, classes, count)
    Image.fromarray(blended).save(base + "_overlay.png")


def predict_run(
    run: str, paths: list[str], output: str, regions: Optional[str] = None
) -> None:
    """Segments the pictures in `paths` with the best weights of `run`."""
    # Before the network is built: a region that is missing is told at once.
    roi_paths = [pictures.find_roi(path, regions) for path in paths]
    values, network = evaluate.restore(run)
    infer = make_inference(network, dataset.recipe_of(values))
    if regions is None and not values["no_roi"]:
        print("no --roi: whole pictures are the regions")
    os.makedirs(output, exist_ok=True)
    start = time.perf_counter()
    for done, (path, roi_path) in enumerate(zip(paths, roi_paths), 1):
        picture = pictures.read_picture(path)
        region = np.ones(picture.shape[:2], np.uint8)
        if roi_path:
            region = pictures.read_roi(roi_path, picture.shape[:2])
        logits = infer(picture, region)
        classes = logits.argmax(-1).astype(np.uint8)
        _save(path, output, picture, classes, logits.shape[-1])
        left = (time.perf_counter() - start) / done * (len(paths) - done)
        print(f"{done}/{len(paths)} {path}  left {left:.0f} s", flush=True)
    print(f"wrote masks and overlays of {len(paths)} files to {output}")


def main() -> None:
    """Predicts what --input names."""
    # Before the device is opened, so that a wrong path is told at once.
    paths = find_inputs(FLAGS.input)
    print(npu_config.setup().describe())
    predict_run(FLAGS.run, paths, FLAGS.output, FLAGS.roi)


if __name__ == "__main__":
    define_flags()
    launch(main)
