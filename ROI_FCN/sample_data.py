"""Draws pictures of glass vessels with liquids and solids, exactly labelled.

python ROI_FCN/sample_data.py --output=DIR [--count=40]
The layout is that of Materials_In_Vessels. Colour alone does not tell what is
what: liquids, solids, clutter and backgrounds share their colours, and a
picture may hold a second, filled vessel that is not the one asked for.
"""

import os
import sys
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from scipy import ndimage

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from ROI_FCN.launch import launch

FLAGS = flags.FLAGS
# ExactPhaseLabels of what is drawn; the coarser labels follow from them.
VESSEL, LIQUID, SOLID = 1, 2, 7
TWO_VESSELS_SHARE = 0.5  # of the pictures


class Scene(NamedTuple):
    """A picture [h, w, 3] uint8 and, for each vessel, its exact phases."""

    picture: np.ndarray
    phases: list[np.ndarray]


def liquid_solid(phases: np.ndarray) -> np.ndarray:
    """LiquidSolidLabels of ExactPhaseLabels, as the data set derives them."""
    # Phase 14 is vapour, which counts as an empty vessel.
    table = np.array([0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 1], np.uint8)
    return table[phases]


def fill_level(phases: np.ndarray) -> np.ndarray:
    """FillLevelLabels of ExactPhaseLabels."""
    table = np.array([0, 1, *[2] * 12, 1], np.uint8)
    return table[phases]


def _noise(
    rng: np.random.RandomState, shape: tuple[int, int], size: float
) -> np.ndarray:
    """Smooth noise [h, w] with standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), size)
    return (noise - noise.mean()) / max(noise.std(), 1e-9)


def _colour(rng: np.random.RandomState) -> np.ndarray:
    """A colour of anything: liquids, solids, clutter, walls."""
    return rng.uniform(30, 225, 3)


def _granular(
    rng: np.random.RandomState, shape: tuple[int, int], colour: np.ndarray
) -> np.ndarray:
    """Grains of about a colour, [h, w, 3]."""
    grains = _noise(rng, shape, rng.uniform(0.6, 1.4))
    return colour + rng.uniform(18, 35) * grains[..., np.newaxis]


def _background(
    rng: np.random.RandomState, shape: tuple[int, int]
) -> np.ndarray:
    """A wall, a table and things lying about, [h, w, 3]."""
    height, width = shape
    picture = np.ones((height, width, 3)) * _colour(rng)
    picture += 12 * _noise(rng, shape, width / 8)[..., np.newaxis]
    picture[int(height * rng.uniform(0.6, 0.95)) :] = _colour(rng)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(rng.randint(3, 8)):
        top, left = rng.uniform(0, height), rng.uniform(0, width)
        tall, wide = rng.uniform(0.05, 0.3, 2) * (height, width)
        inside = (abs(rows - top) < tall / 2) & (abs(columns - left) < wide)
        if rng.rand() < 0.5:
            inside = ((rows - top) / tall) ** 2 + (
                (columns - left) / wide
            ) ** 2 < 1
        thing = np.ones_like(picture) * _colour(rng)
        # As granular as a solid, or as flat as a liquid.
        if rng.rand() < 0.5:
            thing = _granular(rng, shape, thing)
        picture[inside] = thing[inside]
    return picture


def _outline(
    rng: np.random.RandomState, shape: tuple[int, int], left: int, right: int
) -> np.ndarray:
    """The inside of a beaker, a flask, a tube or a bulb, bool [h, w]."""
    height, _ = shape
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    half = (right - left) / 2 * rng.uniform(0.7, 0.95)
    centre = (left + right) / 2
    top = height * rng.uniform(0.04, 0.2)
    bottom = height * rng.uniform(0.82, 0.96)
    depth = (rows - top) / (bottom - top)
    kind = rng.randint(4)
    if kind == 0:  # beaker
        profile = np.full(shape, half)
    elif kind == 1:  # conical flask, a neck above a widening body
        profile = half * np.clip((depth - 0.25) / 0.6, 0.35, 1.0)
    elif kind == 2:  # test tube, round at its end
        half *= 0.6
        end = np.clip((rows - (bottom - half)) / half, 0, 1)
        profile = half * np.sqrt(1.0 - end**2)
    else:  # bulb under a neck
        radius = min(half, (bottom - top) / 3)
        bulb = radius**2 - (rows - (bottom - radius)) ** 2
        neck = np.where(rows < bottom - radius, 0.35 * radius, 0.0)
        profile = np.maximum(np.sqrt(np.maximum(bulb, 0.0)), neck)
    return (abs(columns - centre) <= profile) & (depth >= 0) & (depth <= 1.0)


def _fill(
    rng: np.random.RandomState, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Liquid and solid within a vessel, bool [h, w] each."""
    rows = np.flatnonzero(inside.any(1))
    top, bottom = rows[0], rows[-1]
    row, column = np.mgrid[: inside.shape[0], : inside.shape[1]]

    def below(least, most):
        share = rng.uniform(least, most)
        return bottom - share * (bottom - top)

    nothing = np.zeros_like(inside)
    kind = rng.choice(4, p=(0.1, 0.3, 0.3, 0.3))
    solid, liquid = nothing, nothing
    if kind in (1, 2):  # a heap: slanted and uneven
        slope = rng.uniform(-0.3, 0.3)
        wave = 2.0 * _noise(rng, inside.shape, 6)[0]
        middle = column.mean()
        surface = below(0.2, 0.6) + slope * (column - middle) + wave
        solid = inside & (row > surface)
    if kind in (2, 3):  # a level
        liquid = inside & (row > below(0.35, 0.85)) & ~solid
    return liquid, solid


def _through_liquid(
    rng: np.random.RandomState, picture: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """What a picture looks like behind a filled vessel, [h, w, 3].

    A filled vessel is a lens, which blurs what is behind; its liquid tints
    and is darker towards the walls, and bubbles rise in it.
    """
    tint = rng.uniform(0.4, 0.85)
    behind = ndimage.gaussian_filter(picture, (3, 3, 0))
    seen = (1 - tint) * behind + tint * _colour(rng)
    # Share of the way from a wall to the middle, row by row.
    columns = np.cumsum(inside, 1) / np.maximum(inside.sum(1), 1)[:, None]
    depth = 1.0 - abs(2.0 * columns - 1.0)
    seen *= 1.0 - rng.uniform(0.2, 0.5) * (1.0 - depth[..., None]) ** 2
    bubbles = rng.rand(*inside.shape) < rng.uniform(0.004, 0.015)
    seen[ndimage.binary_dilation(bubbles)] += rng.uniform(30, 60)
    return seen


def _draw_vessel(
    rng: np.random.RandomState, picture: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """Draws a vessel into `picture`; returns its phases [h, w] uint8."""
    liquid, solid = _fill(rng, inside)
    phases = np.where(inside, VESSEL, 0)
    phases[liquid], phases[solid] = LIQUID, SOLID
    # Glass: what is behind shows, a little lighter.
    picture[inside] = 0.88 * picture[inside] + 0.12 * 235
    picture[liquid] = _through_liquid(rng, picture, inside)[liquid]
    grains = _granular(rng, inside.shape, _colour(rng))
    picture[solid] = grains[solid]
    # The surface of a liquid shows as a thin line.
    surface = liquid & ~ndimage.binary_erosion(liquid, [[0], [1], [1]])
    surface &= np.roll(inside, 1, 0)
    picture[surface] = 0.5 * picture[surface] + 0.5 * rng.choice([25, 240])
    edge = inside & ~ndimage.binary_erosion(inside, iterations=2)
    # Its own shade, light or dark: an outline's colour tells nothing.
    picture[edge] = 0.45 * picture[edge] + 0.55 * rng.choice([30, 235])
    # A reflection along one side.
    columns = np.flatnonzero(inside.any(0))
    at = int(columns[0] + rng.uniform(0.2, 0.3) * len(columns))
    shine = inside & ndimage.binary_erosion(inside, iterations=4)
    picture[shine[:, at], at] += 60
    return phases.astype(np.uint8)


def draw_scene(
    rng: np.random.RandomState, height: int, width: int, vessels: int
) -> Scene:
    """One or two vessels, side by side."""
    picture = _background(rng, (height, width))
    if vessels == 1:
        share = rng.uniform(0.5, 0.9)
        left = int(rng.uniform(0, 1 - share) * width)
        places = [(left, int(left + share * width))]
    else:
        places = [(0, width // 2), (width // 2, width)]
    phases = [
        _draw_vessel(rng, picture, _outline(rng, picture.shape[:2], *place))
        for place in places
    ]
    picture = ndimage.gaussian_filter(picture, (0.6, 0.6, 0))
    picture += rng.normal(0, 5, picture.shape)
    return Scene(np.clip(picture, 0, 255).astype(np.uint8), phases)


def draw(
    output: str,
    count: int = 40,
    height: int = 128,
    width: int = 160,
    seed: int = 0,
) -> None:
    """Draws `count` pictures for training and a quarter as many for testing.

    A picture with two vessels is written twice, once for either of them.
    """
    # NumPy keeps this generator's numbers the same in all versions.
    rng = np.random.RandomState(seed)
    for folder, pictures in (
        ("Train_Images", count),
        ("Test_Images_All", max(count // 4, 2)),
    ):
        prefix = folder.split("_")[0].lower()
        number = 0
        while number < pictures:
            scene = draw_scene(
                rng, height, width, 1 + (rng.rand() < TWO_VESSELS_SHARE)
            )
            # The same picture under two names, once with either region.
            for phases in scene.phases[: pictures - number]:
                name = f"{prefix}_{number:04d}.png"
                number += 1
                for where, pixels in (
                    (folder, scene.picture),
                    ("VesselLabels", (phases > 0).astype(np.uint8)),
                    ("ExactPhaseLabels", phases),
                    ("LiquidSolidLabels", liquid_solid(phases)),
                    ("FillLevelLabels", fill_level(phases)),
                ):
                    path = os.path.join(output, where)
                    os.makedirs(path, exist_ok=True)
                    Image.fromarray(pixels).save(os.path.join(path, name))


def main() -> None:
    """Draws what the flags say."""
    draw(FLAGS.output, FLAGS.count, FLAGS.height, FLAGS.width, FLAGS.seed)
    print(f"drew {FLAGS.count} training pictures in {FLAGS.output}")


def define_flags() -> None:
    """Defines the flags of the drawing."""
    flags.DEFINE_string("output", None, "Folder for the data set.")
    flags.DEFINE_integer("count", 40, "Training pictures.", 1)
    flags.DEFINE_integer("height", 128, "Height of pictures, pixels.", 64)
    flags.DEFINE_integer("width", 160, "Width of pictures, pixels.", 64)
    flags.DEFINE_integer("seed", 0, "Another seed, other pictures.", 0)
    flags.mark_flag_as_required("output")


if __name__ == "__main__":
    define_flags()
    launch(main)
