"""Segments your own pictures with a run of DeepLabv3plus, at their own size.

python DeepLabv3plus/predict.py --run=RUN --input=FILE|FOLDER|GLOB
  --output=DIR [--scales=0.75,1,1.25] [--flip]
"""

import glob
import os
import sys
import time
from collections.abc import Sequence
from typing import Optional

import numpy as np
from absl import flags
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from common.npu_config import UserError
from DeepLabv3plus import evaluate, pictures, visuals
from DeepLabv3plus.launch import launch

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of prediction."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("input", None, "A picture, a folder or a glob.")
    flags.DEFINE_string("output", None, "Folder for masks and overlays.")
    evaluate.define_scale_flags()
    for name in ("eval_crop_size", "scales", "flip"):
        flags.declare_key_flag(name)
    flags.DEFINE_bool("probabilities", False, "Write them too, as npz.")
    for name in ("run", "input", "output"):
        flags.mark_flag_as_required(name)


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
) -> str:
    """Writes the palette PNG of class ids and the overlay of one picture.

    Returns the beginning of the names of both files.
    """
    base = os.path.join(output, os.path.splitext(os.path.basename(path))[0])
    # Indices with a palette: ids for programs, colours for people.
    mask = Image.fromarray(classes)
    mask.putpalette(visuals.palette(count).ravel().tolist())
    mask.save(base + "_mask.png")
    blended = visuals.overlay(picture, classes, count)
    Image.fromarray(blended).save(base + "_overlay.png")
    return base


def predict_run(
    run: str,
    paths: list[str],
    output: str,
    crop: Optional[str] = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    probabilities: bool = False,
) -> None:
    """Segments the pictures in `paths` with the best weights of `run`.

    Args:
      run: the run folder.
      paths: picture files.
      output: folder for masks and overlays.
      crop: `height,width` that the network sees; none: the run's own.
      scales: of the crop, over which probabilities are averaged.
      flip: average over mirrored crops too.
      probabilities: write them too, in float16.
    """
    values, network = evaluate.restore(run)
    values["eval_crop_size"] = crop or values["eval_crop_size"]
    segmenter = evaluate.make_segmenter(values, network, scales, flip)
    os.makedirs(output, exist_ok=True)
    start = time.perf_counter()
    for done, path in enumerate(paths, 1):
        picture = pictures.read_picture(path)
        shares = segmenter(picture)
        classes = shares.argmax(-1).astype(np.uint8)
        base = _save(path, output, picture, classes, shares.shape[-1])
        if probabilities:
            np.savez_compressed(
                base + "_probabilities.npz",
                probabilities=shares.astype(np.float16),
            )
        left = (time.perf_counter() - start) / done * (len(paths) - done)
        print(f"{done}/{len(paths)} {path}  left {left:.0f} s", flush=True)
    print(f"wrote masks and overlays of {len(paths)} files to {output}")


def main() -> None:
    """Predicts what --input names."""
    # Before the device is opened, so that a wrong path is told at once.
    paths, scales = find_inputs(FLAGS.input), evaluate.read_scales()
    print(npu_config.setup().describe())
    predict_run(
        FLAGS.run,
        paths,
        FLAGS.output,
        FLAGS.eval_crop_size,
        scales,
        FLAGS.flip,
        FLAGS.probabilities,
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
