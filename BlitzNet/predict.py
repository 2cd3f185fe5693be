"""Finds and segments objects in your own pictures with a run of BlitzNet.

python BlitzNet/predict.py --run=RUN --input=FILE|FOLDER|GLOB --output=DIR
Masks as palette PNGs, pictures with boxes and masks drawn in, and all boxes
in detections.json.
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

from BlitzNet import augment, evaluate, pictures, run_folder, visuals
from BlitzNet.launch import launch
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of prediction."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("input", None, "A picture, a folder or a glob.")
    flags.DEFINE_string("output", None, "Folder for masks and overlays.")
    flags.DEFINE_float(
        "min_score", evaluate.SHOWN_SCORE, "Least score of a box.", 0.0, 1.0
    )
    # So the reference's demo calls it.
    flags.DEFINE_alias("eval_min_conf", "min_score")
    for name in ("run", "input", "output"):
        flags.mark_flag_as_required(name)


def make_inference(
    judge: evaluate.Judge, image_size: int
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function of a picture [h, w, 3] uint8; see evaluate.Judge."""

    def prepare(picture):
        image = tf.cast(picture, tf.float32) / 255.0
        return augment.resize_image(image, image_size)[tf.newaxis]

    # Traced once for pictures of all sizes.
    signature = [tf.TensorSpec([None, None, 3], tf.uint8)]
    graph = tf.function(prepare, signature, autograph=False)

    def infer(picture):
        size = tf.constant(picture.shape[:2], tf.int32)
        results = judge.infer(graph(picture), size)
        return {name: value.numpy() for name, value in results.items()}

    return infer


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


def as_json(
    results: dict[str, np.ndarray], size: tuple[int, int], names: list[str]
) -> list[dict[str, object]]:
    """The boxes of a picture of `size` for people and programs, in pixels."""
    height, width = size
    found = zip(results["boxes"], results["scores"], results["classes"])
    return [
        {
            "class": names[class_],
            "score": round(float(score), 6),
            "xmin": float(box[1] * width),
            "ymin": float(box[0] * height),
            "xmax": float(box[3] * width),
            "ymax": float(box[2] * height),
        }
        for box, score, class_ in found
    ]


def save_pictures(
    base: str,
    picture: np.ndarray,
    results: dict[str, np.ndarray],
    names: list[str],
) -> None:
    """Writes the mask and the overlay of a picture."""
    drawn = picture
    if "predicted" in results:
        classes = results["predicted"]
        # Indices with a palette: ids for programs, colours for people.
        mask = Image.fromarray(classes)
        mask.putpalette(visuals.palette(256).ravel().tolist())
        mask.save(base + "_mask.png")
        drawn = visuals.overlay(picture, classes, len(names))
    if "boxes" in results:
        found = (results[name] for name in ("boxes", "classes"))
        drawn = visuals.draw_boxes(drawn, *found, names, results["scores"])
    Image.fromarray(drawn).save(base + "_overlay.png")


def confident(
    results: dict[str, np.ndarray], least: float
) -> dict[str, np.ndarray]:
    """Results without boxes of a lower score than `least`."""
    if "boxes" not in results:
        return results
    top, left, bottom, right = results["boxes"].T
    # Decoding can leave boxes that lie beyond the picture.
    chosen = (bottom > top) & (right > left) & (results["classes"] > 0)
    chosen &= results["scores"] >= least
    boxes = {n: results[n][chosen] for n in ("boxes", "scores", "classes")}
    return {**results, **boxes}


def predict_run(
    run: str, paths: list[str], output: str, least: Optional[float] = None
) -> None:
    """Predicts the pictures in `paths` with the best weights of `run`."""
    values, network = evaluate.restore(run)
    names = ["background", *values["classes"]]
    judge = evaluate.make_judge(values, network)
    infer = make_inference(judge, values["image_size"])
    least = evaluate.SHOWN_SCORE if least is None else least
    os.makedirs(output, exist_ok=True)
    start, found = time.perf_counter(), {}
    for done, path in enumerate(paths, 1):
        picture = pictures.read_picture(path)
        results = confident(infer(picture), least)
        name = os.path.basename(path)
        base = os.path.join(output, os.path.splitext(name)[0])
        save_pictures(base, picture, results, names)
        if "boxes" in results:
            found[name] = as_json(results, picture.shape[:2], names)
        left = (time.perf_counter() - start) / done * (len(paths) - done)
        print(f"{done}/{len(paths)} {path}  left {left:.0f} s", flush=True)
    if values["detect"]:
        path = os.path.join(output, "detections.json")
        run_folder.write_json(path, found)
    print(f"wrote results of {len(paths)} files to {output}")


def main() -> None:
    """Predicts what --input names."""
    # Before the device is opened, so that a wrong path is told at once.
    paths = find_inputs(FLAGS.input)
    print(npu_config.setup().describe())
    predict_run(FLAGS.run, paths, FLAGS.output, FLAGS.min_score)


if __name__ == "__main__":
    define_flags()
    launch(main)
