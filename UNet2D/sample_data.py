"""Draws pictures like electron micrographs of cells, with exact labels.

python UNet2D/sample_data.py --output=DIR [--count=15]
The layout is that of the ISBI 2012 data: train-volume.tif, train-labels.tif
and test-volume.tif; membranes are class 0, cells 1 (255 in two-class labels).
"""

import os
import sys

import numpy as np
from absl import flags
from PIL import Image
from scipy import ndimage, spatial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.npu_config import UserError
from UNet2D.launch import launch

FLAGS = flags.FLAGS
MEMBRANE_PIXELS = 4.0  # width of a membrane, about
CELL_PIXELS = 36  # mean distance of two cells


def draw_picture(
    rng: np.random.RandomState, side: int, channels: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """One picture [side, side(, channels)] and its class ids, uint8.

    Cells are those of a wobbly Voronoi diagram. Membranes are dark, but so
    are blobs inside the cells, and shading varies: a threshold on grey alone
    does not find them.
    """
    # From beyond the edges too, or cells there would be the largest.
    points = rng.uniform(
        -20, side + 20, (((side + 40) // CELL_PIXELS) ** 2, 2)
    )
    wobble = ndimage.gaussian_filter(
        rng.normal(size=(2, side, side)), (0, 9, 9)
    )
    grid = np.mgrid[:side, :side] + 6.0 * wobble / wobble.std()
    # A pixel is membrane where its two nearest cells are about as far.
    tree = spatial.cKDTree(points)
    distance, nearest = tree.query(np.moveaxis(grid, 0, -1), k=2)
    membrane = distance[..., 1] - distance[..., 0] < MEMBRANE_PIXELS
    label = np.where(membrane, 0, 1 + nearest[..., 0] % (classes - 1))
    # Distractors as dark as membranes, and shading across the picture.
    blobs = ndimage.gaussian_filter(rng.normal(size=(side, side)), 3)
    shade = ndimage.gaussian_filter(rng.normal(size=(side, side)), 40)
    grey = 170.0 + 25.0 * shade / shade.std()
    # Classes beyond the two differ by how bright their cells are.
    grey -= 60.0 * np.maximum(label - 1, 0) / max(classes - 2, 1)
    grey = np.where(blobs > 1.6 * blobs.std(), grey - 60.0, grey)
    grey = np.where(membrane, grey - 75.0, grey)
    grey = ndimage.gaussian_filter(grey, 1.0) + rng.normal(0, 14, grey.shape)
    picture = np.clip(grey, 0, 255).astype(np.uint8)
    if channels > 1:
        picture = np.repeat(picture[..., None], channels, -1)
    return picture, label.astype(np.uint8)


def draw(
    output: str,
    count: int = 15,
    side: int = 256,
    channels: int = 1,
    classes: int = 2,
    seed: int = 0,
) -> None:
    """Draws `count` labelled pictures and a third as many for testing."""
    if channels not in (1, 3):
        raise UserError(f"channels {channels}: 1 or 3 can be drawn")
    # NumPy keeps this generator's numbers the same in all versions.
    rng = np.random.RandomState(seed)
    pairs = [draw_picture(rng, side, channels, classes) for _ in range(count)]
    tests = [
        draw_picture(rng, side, channels, classes)[0]
        for _ in range(max(count // 3, 1))
    ]
    scale = 255 if classes == 2 else 1
    os.makedirs(output, exist_ok=True)
    for name, pages in (
        ("train-volume.tif", [picture for picture, _ in pairs]),
        ("train-labels.tif", [label * scale for _, label in pairs]),
        ("test-volume.tif", tests),
    ):
        save_volume(os.path.join(output, name), pages)


def save_volume(path: str, pages: list) -> None:
    """Writes arrays as the pages of one compressed TIFF."""
    images = [Image.fromarray(page) for page in pages]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        compression="tiff_deflate",
    )


def main() -> None:
    """Draws what the flags say."""
    draw(
        FLAGS.output,
        FLAGS.count,
        FLAGS.side,
        FLAGS.in_channels,
        FLAGS.num_classes,
        FLAGS.seed,
    )
    print(f"drew {FLAGS.count} labelled pictures in {FLAGS.output}")


def define_flags() -> None:
    """Defines the flags of the drawing."""
    flags.DEFINE_string("output", None, "Folder for the data set.")
    flags.DEFINE_integer("count", 15, "Labelled pictures.", 1)
    flags.DEFINE_integer("side", 256, "Height and width, pixels.", 64)
    flags.DEFINE_integer("in_channels", 1, "1 grey, 3 colour.")
    flags.DEFINE_integer("num_classes", 2, "Classes, membrane included.", 2)
    flags.DEFINE_integer("seed", 0, "Another seed, other pictures.", 0)
    flags.mark_flag_as_required("output")


if __name__ == "__main__":
    define_flags()
    launch(main)
