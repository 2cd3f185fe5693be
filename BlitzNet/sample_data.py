"""Draws scenes of overlapping shapes with exact boxes and masks.

python BlitzNet/sample_data.py --output=DIR [--count=40]
The layout is that of Pascal VOC. A shape's class is its outline alone: sizes,
turns, colours and patterns are drawn alike for all classes, and shapes hide
parts of each other.
"""

import os
import sys
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BlitzNet import progress, visuals
from BlitzNet.launch import launch

FLAGS = flags.FLAGS
CLASSES = ("disc", "square", "triangle", "star", "cross", "ring")
# All of these are our own choice: the scenes follow no benchmark.
MOST_OBJECTS = 6  # of a picture
SIDES = (0.16, 0.62)  # of objects, shares of the picture's shorter side
LEAST_VISIBLE = 0.45  # share of a shape that others may leave
DIFFICULT_VISIBLE = 0.6  # with less of it a shape is marked difficult
LARGEST_TURN = 20.0  # degrees either way; more would make shapes alike
PLACES = 8  # tries to place a shape without hiding another
HOLE = 0.5  # radius of a ring's hole by its own
NOISE = 12  # largest change of a pixel


class Scene(NamedTuple):
    """picture [h, w, 3] and mask [h, w] uint8; objects (class, box, hard).

    Boxes are (xmin, ymin, xmax, ymax) of the visible pixels.
    """

    picture: np.ndarray
    mask: np.ndarray
    objects: list[tuple[str, tuple[int, int, int, int], bool]]


def outline(name: str, turn: float) -> np.ndarray:
    """Corners [n, 2] of a shape of radius 1 around the origin."""
    if name in ("disc", "ring"):
        angles, radii = np.linspace(0, 2 * np.pi, 40), np.ones(40)
    elif name == "square":
        angles, radii = np.pi * (0.25 + 0.5 * np.arange(4)), np.ones(4)
    elif name == "triangle":
        angles, radii = np.pi * (-0.5 + np.arange(3) / 1.5), np.ones(3)
    elif name == "star":
        angles = np.pi * (-0.5 + np.arange(10) / 5)
        radii = np.where(np.arange(10) % 2, 0.42, 1.0)
    else:
        corner = np.arctan2(1.0, 3.0)
        arms = 0.5 * np.pi * np.arange(4)[:, np.newaxis]
        angles = (arms + [-corner, corner, 0.25 * np.pi]).ravel()
        radii = np.tile([1.0, 1.0, 0.45], 4)
    angles = angles + turn
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, np.newaxis]


def draw_shape(
    rng: np.random.RandomState, name: str, height: int, width: int
) -> np.ndarray:
    """Where one shape of random size, place and turn lies, [h, w] bool."""
    shorter = min(height, width)
    # Evenly in the logarithm: as many small objects as large ones.
    radius = 0.5 * shorter * np.exp(rng.uniform(*np.log(SIDES)))
    centre = radius + rng.uniform(size=2) * ([width, height] - 2 * radius)
    turn = np.deg2rad(rng.uniform(-LARGEST_TURN, LARGEST_TURN))
    stretch = rng.uniform(0.8, 1.0, 2)
    corners = centre + radius * stretch * outline(name, turn)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    pen.polygon(list(map(tuple, corners)), fill=1)
    if name == "ring":
        hole = centre + HOLE * (corners - centre)
        pen.polygon(list(map(tuple, hole)), fill=0)
    return np.asarray(canvas) > 0


def paint(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """A surface [h, w, 3] float32: two colours that run into each other."""
    cells = rng.randint(2, 5)
    colour = rng.randint(20, 236, 3)
    coarse = colour + rng.randint(-50, 51, (cells, cells, 3))
    coarse = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    # 2 is bilinear in every Pillow; the constant's name has moved.
    return np.asarray(coarse.resize((width, height), 2), np.float32)


def draw_scene(rng: np.random.RandomState, height: int, width: int) -> Scene:
    """One picture with its objects, the last of which lie in front."""
    picture = paint(rng, height, width)
    owner = np.zeros((height, width), np.uint8)
    names, areas = [], []
    for _ in range(rng.randint(2, MOST_OBJECTS + 1)):
        name = CLASSES[rng.randint(len(CLASSES))]
        for _ in range(PLACES):
            shape = draw_shape(rng, name, height, width)
            after = np.where(shape, len(names) + 1, owner)
            left = np.bincount(after.ravel(), minlength=len(names) + 2)
            if (left[1:-1] >= LEAST_VISIBLE * np.array(areas)).all():
                break
        else:
            # A full picture gets fewer, never none: the first one fits.
            continue
        owner = after
        names.append(name)
        areas.append(shape.sum())
        picture[shape] = paint(rng, height, width)[shape]
    noise = rng.randint(-NOISE, NOISE + 1, picture.shape)
    picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
    classes = [0, *(1 + CLASSES.index(name) for name in names)]
    objects = []
    for number, (name, area) in enumerate(zip(names, areas), 1):
        rows, columns = np.nonzero(owner == number)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        hard = len(rows) < DIFFICULT_VISIBLE * area
        objects.append((name, tuple(map(int, box)), hard))
    return Scene(picture, np.array(classes, np.uint8)[owner], objects)


def annotation(scene: Scene) -> str:
    """A scene's objects as VOC writes them."""
    height, width = scene.mask.shape
    lines = [
        "<annotation>",
        f"<size><width>{width}</width><height>{height}</height>"
        "<depth>3</depth></size>",
    ]
    for name, (left, top, right, bottom), hard in scene.objects:
        lines.append(
            f"<object><name>{name}</name><difficult>{hard:d}</difficult>"
            f"<bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
            f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>\n"])


class Writer:
    """Writes scenes and their lists in the layout of Pascal VOC."""

    def __init__(self, output: str, classes: tuple[str, ...]) -> None:
        self.output = output
        self.palette = visuals.palette(256).ravel().tolist()
        for folder in (
            "JPEGImages",
            "Annotations",
            "SegmentationClass",
            os.path.join("ImageSets", "Main"),
        ):
            os.makedirs(os.path.join(output, folder), exist_ok=True)
        self.write_text("classes.txt", "\n".join([*classes, ""]))

    def path(self, *parts: str) -> str:
        """A file of the data set."""
        return os.path.join(self.output, *parts)

    def write_text(self, name: str, text: str) -> None:
        """Writes a file of text."""
        with open(self.path(name), "w", encoding="utf8") as file:
            file.write(text)

    def write_list(self, split: str, stems: list[str]) -> None:
        """Writes a list of ImageSets."""
        self.write_text(
            os.path.join("ImageSets", "Main", f"{split}.txt"),
            "\n".join([*stems, ""]),
        )

    def write(self, stem: str, scene: Scene) -> None:
        """Writes picture, mask and annotation."""
        picture = Image.fromarray(scene.picture)
        picture.save(self.path("JPEGImages", f"{stem}.jpg"), quality=92)
        mask = Image.fromarray(scene.mask)
        mask.putpalette(self.palette)
        mask.save(self.path("SegmentationClass", f"{stem}.png"))
        self.write_text(
            os.path.join("Annotations", f"{stem}.xml"), annotation(scene)
        )


def draw(
    output: str,
    count: int = 40,
    height: int = 192,
    width: int = 256,
    seed: int = 0,
) -> None:
    """Draws `count` pictures to train on and a quarter as many to test."""
    # NumPy keeps this generator's numbers the same in all versions.
    rng = np.random.RandomState(seed)
    writer = Writer(output, CLASSES)
    for split, number in (("train", count), ("val", max(count // 4, 2))):
        stems = [f"{split}_{index:05d}" for index in range(number)]
        for stem in progress.watched(stems, number, f"drawing {split}"):
            writer.write(stem, draw_scene(rng, height, width))
        writer.write_list(split, stems)


def main() -> None:
    """Draws what the flags say."""
    draw(FLAGS.output, FLAGS.count, FLAGS.height, FLAGS.width, FLAGS.seed)
    print(f"drew {FLAGS.count} training pictures in {FLAGS.output}")


def define_flags() -> None:
    """Defines the flags of the drawing."""
    flags.DEFINE_string("output", None, "Folder for the data set.")
    flags.DEFINE_integer("count", 40, "Training pictures.", 1)
    flags.DEFINE_integer("height", 192, "Height of pictures, pixels.", 64)
    flags.DEFINE_integer("width", 256, "Width of pictures, pixels.", 64)
    flags.DEFINE_integer("seed", 0, "Another seed, other pictures.", 0)
    flags.mark_flag_as_required("output")


if __name__ == "__main__":
    define_flags()
    launch(main)
