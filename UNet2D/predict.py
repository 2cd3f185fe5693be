"""Segments your own pictures with a run of UNet2D, at their own size.

python UNet2D/predict.py --run=RUN --input=FILE|FOLDER|GLOB --output=DIR
Large pictures go through the network in overlapping tiles that give the same
numbers as one pass over the whole picture would.
"""

import glob
import os
import sys
import time
from typing import Callable

import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from common.npu_config import UserError
from UNet2D import augment, dataset, evaluate, pictures, sample_data, visuals
from UNet2D.launch import launch
from UNet2D.model import MARGIN, STRIDE, check_input_side, covering_side

FLAGS = flags.FLAGS
# A tile's first rows and columns see the network's own edge, since the
# up-convolutions lack the neighbour before their first pixel: after four of
# them 15 pixels. The next multiple of the stride is dropped.
EDGE = STRIDE
TILE_SIZE = 572  # pixels, as the network was drawn
SMALLEST_TILE = 220  # pixels; smaller ones would be all edge


def define_flags() -> None:
    """Defines the flags of prediction."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("input", None, "A picture, a folder or a glob.")
    flags.DEFINE_string("output", None, "Folder for masks and overlays.")
    flags.DEFINE_integer(
        "tile_size", TILE_SIZE, "Largest input side, 16 k + 60."
    )
    flags.DEFINE_bool("probabilities", False, "Write them as float TIFF too.")
    for name in ("run", "input", "output"):
        flags.mark_flag_as_required(name)


def tile_starts(length: int, output: int) -> list[int]:
    """Offsets of tiles of `output` pixels that cover `length` pixels.

    Multiples of the network's stride, so that poolings fall alike in every
    tile, and close enough to drop the edge of all but the first.
    """
    if length <= output:
        return [0]
    # Outputs have 16 k + 4 pixels; without the 4 the steps are aligned.
    step = output - EDGE - 4
    return list(range(0, length - output + step, step))


def predict_tiles(
    infer: Callable[[tf.Tensor], tf.Tensor],
    image: np.ndarray,
    num_classes: int,
    tile_size: int,
) -> np.ndarray:
    """Probabilities of every pixel of an image.

    Args:
      infer: [1, H, W, c] in [-1, 1] to probabilities [1, H-184, W-184, C].
      image: [h, w, c] in [-1, 1] at the network's scale.
      num_classes: C.
      tile_size: largest side of a tile, pixels.

    Returns:
      [h, w, C] float32.
    """
    # A picture that fits is one tile, without any seam to think about.
    sides = [min(tile_size, covering_side(side)) for side in image.shape[:2]]
    outputs = [side - 2 * MARGIN for side in sides]
    starts = [
        tile_starts(length, output)
        for length, output in zip(image.shape[:2], outputs)
    ]
    rows, columns = (
        augment.mirror_indices(-MARGIN, start[-1] + side - MARGIN, length)
        for start, side, length in zip(starts, sides, image.shape[:2])
    )
    extent = [start[-1] + output for start, output in zip(starts, outputs)]
    result = np.empty((*extent, num_classes), np.float32)
    for top in starts[0]:
        for left in starts[1]:
            tile = image[rows[top : top + sides[0]]]
            tile = tile[:, columns[left : left + sides[1]]]
            # Later tiles overwrite the last rows of earlier ones, which are
            # as good; of their own first rows nothing is kept.
            inner = infer(tf.constant(tile[np.newaxis]))[0].numpy()
            down, right = EDGE * (top > 0), EDGE * (left > 0)
            result[
                top + down : top + outputs[0], left + right : left + outputs[1]
            ] = inner[down:, right:]
    return result[: image.shape[0], : image.shape[1]]


def predict_picture(
    infer: Callable[[tf.Tensor], tf.Tensor],
    picture: np.ndarray,
    scale: tuple[float, float],
    geometry: dataset.Geometry,
    tile_size: int,
) -> np.ndarray:
    """Probabilities [h, w, C] of a picture [h, w, channels] uint8.

    The picture is brought to the scale of training and the probabilities,
    not the classes, are brought back.
    """
    height, width = picture.shape[:2]
    scaled = [
        max(1, int(round(side * factor)))
        for side, factor in zip((height, width), scale)
    ]
    # The network knows structures at the size it was trained on.
    image = tf.cast(picture, tf.float32) / 127.5 - 1.0
    image = augment.resize_bilinear(image, scaled, geometry.resize_rule)
    maps = predict_tiles(infer, image.numpy(), geometry.num_classes, tile_size)
    return augment.resize_bilinear(
        tf.constant(maps), [height, width], geometry.resize_rule
    ).numpy()


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


def test_pictures(data_path: str) -> list[str]:
    """The unlabelled test pictures of a data set."""
    volume = os.path.join(data_path, "test-volume.tif")
    return find_inputs(
        volume if os.path.exists(volume) else os.path.join(data_path, "test")
    )


def _save(
    path: str,
    output: str,
    pages: list[np.ndarray],
    maps: list[np.ndarray],
    probabilities: bool,
) -> None:
    """Writes masks and overlays of one file's pages.

    A TIFF gives a TIFF of as many pages; others give a palette PNG that
    keeps the class ids.
    """
    stem, extension = os.path.splitext(os.path.basename(path))
    base = os.path.join(output, stem)
    count = maps[0].shape[-1]
    classes = [page.argmax(-1).astype(np.uint8) for page in maps]
    colours = visuals.palette(count)
    if extension.lower() in (".tif", ".tiff"):
        # As the EM labels are drawn: 0 and 255.
        scale = 255 if count == 2 else 1
        masks = [page * np.uint8(scale) for page in classes]
        sample_data.save_volume(base + "_mask.tif", masks)
    else:
        # Indices with a palette: ids for programs, colours for people.
        mask = Image.fromarray(classes[0])
        mask.putpalette(colours.ravel().tolist())
        mask.save(base + "_mask.png")
    if probabilities:
        foreground = [page[..., -1] for page in maps]
        sample_data.save_volume(base + "_probability.tif", foreground)
    for number, (picture, page) in enumerate(zip(pages, classes)):
        suffix = f"_{number:03d}" if len(pages) > 1 else ""
        grey = picture if picture.shape[-1] == 3 else picture[..., :1]
        blended = visuals.overlay(grey, page, count)
        Image.fromarray(blended).save(f"{base}{suffix}_overlay.png")


def predict_run(
    run: str,
    paths: list[str],
    output: str,
    tile_size: int = TILE_SIZE,
    probabilities: bool = False,
) -> None:
    """Segments the pictures in `paths` with the best weights of `run`."""
    values, network = evaluate.restore(run)
    geometry = dataset.geometry_of(values)
    side = geometry.output_size
    scale = tuple(side / length for length in values["picture_size"])
    # Traced once per tile shape: two or three in a folder of any pictures.
    infer = tf.function(
        lambda tile: tf.nn.softmax(network(tile, training=False)),
        autograph=False,
    )
    os.makedirs(output, exist_ok=True)
    start = time.perf_counter()
    for done, path in enumerate(paths, 1):
        pages = [
            pictures.check_picture(path, page, geometry.channels)
            for page in pictures.read_pages(path)
        ]
        maps = [
            predict_picture(infer, page, scale, geometry, tile_size)
            for page in pages
        ]
        _save(path, output, pages, maps, probabilities)
        left = (time.perf_counter() - start) / done * (len(paths) - done)
        print(f"{done}/{len(paths)} {path}  left {left:.0f} s", flush=True)
    print(f"wrote masks and overlays of {len(paths)} files to {output}")


def main() -> None:
    """Predicts what --input names."""
    # Before the device is opened, so that a wrong path is told at once.
    paths = find_inputs(FLAGS.input)
    check_input_side(FLAGS.tile_size, "--tile_size")
    if FLAGS.tile_size < SMALLEST_TILE:
        raise UserError(
            f"--tile_size={FLAGS.tile_size}: at least {SMALLEST_TILE}, for "
            "tiles overlap"
        )
    print(npu_config.setup().describe())
    predict_run(
        FLAGS.run, paths, FLAGS.output, FLAGS.tile_size, FLAGS.probabilities
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
