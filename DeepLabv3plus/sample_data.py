"""Draws pictures of shapes in Pascal VOC's layout, exactly labelled.

python DeepLabv3plus/sample_data.py --output=DIR [--count=40]
A class is a shape; its colour leans to a hue of its own, but not far enough
to tell for sure. As in VOC the labels are palette PNGs, with a border of void
around objects.
"""

import os
import sys

import numpy as np
from absl import flags
from PIL import Image
from scipy import ndimage

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from DeepLabv3plus import visuals
from DeepLabv3plus.launch import launch
from DeepLabv3plus.layouts import LISTS, PICTURES
from DeepLabv3plus.pictures import NAMES_FILE

FLAGS = flags.FLAGS
CLASSES = ("background", "disc", "square", "triangle", "ring")
# Where the colours of their surfaces centre.
HUES = (
    (120, 120, 120),
    (170, 90, 80),
    (80, 160, 90),
    (80, 100, 180),
    (170, 160, 70),
)
HUE_SPREAD = 20.0  # standard deviation around them
VOID = 255
LABELS = "SegmentationClass"


def _noise(
    rng: np.random.RandomState, shape: tuple[int, int], size: float
) -> np.ndarray:
    """Smooth noise [h, w, 1] with standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), size)
    return (noise / max(noise.std(), 1e-9))[..., np.newaxis]


def _surface(
    rng: np.random.RandomState, shape: tuple[int, int], kind: int
) -> np.ndarray:
    """The colour and texture of a thing of class `kind`, [h, w, 3]."""
    grain = _noise(rng, shape, rng.uniform(0.5, 4.0))
    colour = rng.normal(HUES[kind], HUE_SPREAD)
    return colour + rng.uniform(2, 15) * grain


def _inside(
    rng: np.random.RandomState, shape: tuple[int, int], kind: int
) -> np.ndarray:
    """The pixels of an object of class `kind`, bool [h, w]."""
    height, width = shape
    radius = rng.uniform(0.2, 0.4) * min(shape)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    rows = (rows - rng.uniform(radius, height - radius)) / radius
    columns = (columns - rng.uniform(radius, width - radius)) / radius
    distance = np.hypot(rows, columns)
    if CLASSES[kind] == "disc":
        return distance < 1.0
    if CLASSES[kind] == "ring":
        return (distance < 1.0) & (distance > 0.55)
    if CLASSES[kind] == "square":
        return np.maximum(abs(rows), abs(columns)) < 0.85
    return (rows < 0.8) & (abs(columns) < 0.6 * (rows + 1.0))


def draw_scene(
    rng: np.random.RandomState, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """A picture [h, w, 3] and its label [h, w] with VOID, both uint8."""
    shape = (height, width)
    picture = _surface(rng, shape, 0)
    picture += 15 * _noise(rng, shape, width / 6)
    label = np.zeros(shape, np.uint8)
    for _ in range(rng.randint(2, 5)):
        kind = rng.randint(1, len(CLASSES))
        inside = _inside(rng, shape, kind)
        picture[inside] = _surface(rng, shape, kind)[inside]
        label[inside] = kind
    border = ndimage.grey_dilation(label, 3) != ndimage.grey_erosion(label, 3)
    label[border] = VOID
    picture = np.clip(picture + rng.normal(0, 3, (*shape, 3)), 0, 255)
    return picture.astype(np.uint8), label


def draw(
    output: str,
    count: int = 40,
    height: int = 96,
    width: int = 128,
    seed: int = 0,
) -> None:
    """Draws `count` pictures for training and a quarter as many for val."""
    # NumPy keeps this generator's numbers the same in all versions.
    rng = np.random.RandomState(seed)
    for folder in (PICTURES, LABELS, LISTS):
        os.makedirs(os.path.join(output, folder), exist_ok=True)
    splits = {"train": count, "val": max(count // 4, 2)}
    stems = {
        split: [f"{split}_{number:04d}" for number in range(pictures)]
        for split, pictures in splits.items()
    }
    # Pictures for val are drawn last, so that another count changes them too.
    for stem in stems["train"] + stems["val"]:
        picture, label = draw_scene(rng, height, width)
        path = os.path.join(output, PICTURES, f"{stem}.jpg")
        Image.fromarray(picture).save(path, quality=92)
        image = Image.fromarray(label)
        image.putpalette(visuals.palette(256).ravel().tolist())
        image.save(os.path.join(output, LABELS, f"{stem}.png"))
    # The seed's commands train on it.
    stems["trainval"] = stems["train"] + stems["val"]
    texts = {
        os.path.join(LISTS, f"{split}.txt"): names
        for split, names in stems.items()
    }
    for name, lines in {**texts, NAMES_FILE: CLASSES}.items():
        with open(os.path.join(output, name), "w", encoding="utf8") as file:
            file.writelines(f"{line}\n" for line in lines)


def main() -> None:
    """Draws what the flags say."""
    draw(FLAGS.output, FLAGS.count, FLAGS.height, FLAGS.width, FLAGS.seed)
    print(f"drew {FLAGS.count} training pictures in {FLAGS.output}")


def define_flags() -> None:
    """Defines the flags of the drawing."""
    flags.DEFINE_string("output", None, "Folder for the data set.")
    flags.DEFINE_integer("count", 40, "Training pictures.", 1)
    flags.DEFINE_integer("height", 96, "Height of pictures, pixels.", 64)
    flags.DEFINE_integer("width", 128, "Width of pictures, pixels.", 64)
    flags.DEFINE_integer("seed", 0, "Another seed, other pictures.", 0)
    flags.mark_flag_as_required("output")


if __name__ == "__main__":
    define_flags()
    launch(main)
