"""Draws pictures of streets with exact labels, so all can be tried at once.

python BiSeNet/sample_data.py --output=DIR [--count=40]
The layout is that of the reference's CamVid: train, val and test with their
folders of colour labels, and class_dict.csv. Colour alone does not tell what
is what: cars, houses and trees share their colours, and Void is strewn in.
"""

import os
import sys

import numpy as np
from absl import flags
from PIL import Image, ImageDraw
from scipy import ndimage

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BiSeNet.classes import CAMVID_GROUPS, FILE, Classes
from BiSeNet.launch import launch

FLAGS = flags.FLAGS
NAMES = ("Sky", "Building", "Road", "Sidewalk", "Tree", "Car", "Void")
CLASSES = Classes(NAMES, tuple(CAMVID_GROUPS[name] for name in NAMES))
SKY, BUILDING, ROAD, SIDEWALK, TREE, CAR, VOID = range(len(NAMES))
# Mean colours of the classes; what differs within a class is larger.
TONES = np.array(
    (
        (175, 190, 210),
        (130, 110, 100),
        (95, 95, 100),
        (140, 135, 125),
        (80, 105, 65),
        (110, 70, 80),
        (60, 60, 60),
    )
)
TONE_SPREAD = 28.0  # standard deviation of an object's own colour
TEXTURE = np.array((3, 12, 8, 10, 26, 8, 30))  # the same of its pixels


def _draw_ids(
    rng: np.random.RandomState, height: int, width: int
) -> tuple[Image.Image, Image.Image]:
    """Class ids and object numbers of a street, drawn back to front."""
    ids, objects = (Image.new("L", (width, height)) for _ in range(2))
    pens = ImageDraw.Draw(ids), ImageDraw.Draw(objects)
    count = 0

    def put(kind, shape, *where):
        nonlocal count
        count += 1
        for pen, value in zip(pens, (kind, count)):
            getattr(pen, shape)(where, fill=value)

    horizon = int(height * rng.uniform(0.4, 0.55))
    right = 0
    while right < width:
        left, right = right, right + int(width * rng.uniform(0.12, 0.35))
        top = int(horizon * rng.uniform(0.05, 0.75))
        if rng.rand() < 0.8:
            put(BUILDING, "rectangle", left, top, right, horizon)
    put(SIDEWALK, "rectangle", 0, horizon, width, height)
    middle = width * rng.uniform(0.35, 0.65)
    edges = width * rng.uniform(0.5, 1.0, 2)
    put(
        ROAD,
        "polygon",
        (middle, horizon - 2),
        (middle + edges[0], height),
        (middle - edges[1], height),
    )
    for _ in range(rng.randint(1, 4)):
        x, size = rng.uniform(0, width), height * rng.uniform(0.1, 0.2)
        y = horizon - size * rng.uniform(0.4, 1.2)
        put(TREE, "ellipse", x - size, y - size, x + size, y + size)
    for _ in range(rng.randint(1, 4)):
        depth = rng.uniform(0.15, 0.8)
        base = horizon + depth * (height - horizon)
        size = height * (0.08 + 0.25 * depth)
        x = rng.uniform(0, width)
        put(CAR, "rectangle", x - size, base - 0.8 * size, x + size, base)
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    put(VOID, "ellipse", x, y, x + width / 12, y + height / 12)
    return ids, objects


def draw_street(
    rng: np.random.RandomState, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """A picture [h, w, 3] and its class ids [h, w], both uint8."""
    ids, objects = map(np.asarray, _draw_ids(rng, height, width))
    tones = TONES[ids] + rng.normal(0.0, TONE_SPREAD, (256, 3))[objects]
    noise = ndimage.gaussian_filter(rng.normal(size=ids.shape), 0.8)
    noise *= TEXTURE[ids] / noise.std()
    light = np.linspace(rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.2), width)
    picture = (tones + noise[..., np.newaxis]) * light[:, np.newaxis]
    return np.clip(picture, 0, 255).astype(np.uint8), ids


def draw(
    output: str,
    count: int = 40,
    height: int = 120,
    width: int = 160,
    seed: int = 0,
) -> None:
    """Draws `count` pictures for training, a quarter for each other split."""
    # NumPy keeps this generator's numbers the same in all versions.
    rng = np.random.RandomState(seed)
    colours = np.array(CLASSES.colours, np.uint8)
    for split in ("train", "val", "test"):
        pictures = count if split == "train" else max(count // 4, 2)
        folders = [
            os.path.join(output, f"{split}{e}") for e in ("", "_labels")
        ]
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        for number in range(pictures):
            picture, ids = draw_street(rng, height, width)
            stem = f"{split}_{number:04d}"
            Image.fromarray(picture).save(f"{folders[0]}/{stem}.png")
            Image.fromarray(colours[ids]).save(f"{folders[1]}/{stem}_L.png")
    CLASSES.save(os.path.join(output, FILE))


def main() -> None:
    """Draws what the flags say."""
    draw(FLAGS.output, FLAGS.count, FLAGS.height, FLAGS.width, FLAGS.seed)
    print(f"drew {FLAGS.count} training pictures in {FLAGS.output}")


def define_flags() -> None:
    """Defines the flags of the drawing."""
    flags.DEFINE_string("output", None, "Folder for the data set.")
    flags.DEFINE_integer("count", 40, "Training pictures.", 1)
    flags.DEFINE_integer("height", 120, "Height of pictures, pixels.", 64)
    flags.DEFINE_integer("width", 160, "Width of pictures, pixels.", 64)
    flags.DEFINE_integer("seed", 0, "Another seed, other pictures.", 0)
    flags.mark_flag_as_required("output")


if __name__ == "__main__":
    define_flags()
    launch(main)
