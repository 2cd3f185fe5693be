"""Pictures of results: palettes, overlays, contact sheets and curves.

Drawn with Pillow alone, so that a server without a screen or a plotting
package still leaves something to look at.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from BiSeNet.classes import UNKNOWN, Classes

OVERLAY_SHARE = 0.5  # of the colour: a street should show through
# Blue, red and green of Matplotlib's default colours.
CURVE_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))
GAP = 4  # pixels between the tiles of a contact sheet
CAPTION = 14  # pixels of height of a line of text
TILE = 240  # pixels of width of a tile


def palette(classes: Classes) -> np.ndarray:
    """The data set's own colours by label value, uint8 [256, 3]."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(classes.colours)] = classes.colours
    return colours


def overlay(
    picture: np.ndarray, ids: np.ndarray, classes: Classes
) -> np.ndarray:
    """Blends the classes' colours over a picture [h, w, 3], uint8."""
    colours = palette(classes)[ids]
    blended = (1.0 - OVERLAY_SHARE) * picture + OVERLAY_SHARE * colours
    return blended.astype(np.uint8)


def difference(
    ids: np.ndarray, label: np.ndarray, classes: Classes
) -> np.ndarray:
    """Wrong pixels in red, right ones pale, ignored ones grey; uint8."""
    picture = np.full((*label.shape, 3), 235, np.uint8)
    picture[ids != label] = (214, 39, 40)
    picture[np.isin(label, (*classes.ignored, UNKNOWN))] = 160
    return picture


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]
) -> Image.Image:
    """Tiles [h, w, 3] uint8 in rows under column titles.

    Every tile is TILE wide; rows are as high as their pictures need.
    """
    heights = [
        max(1, round(TILE * row[0].shape[0] / row[0].shape[1])) for row in rows
    ]
    width = len(titles) * (TILE + GAP) + GAP
    height = CAPTION + GAP + sum(heights) + GAP * len(rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (TILE + GAP), 1), title, fill="black")
    top = CAPTION + GAP
    for row, tile_height in zip(rows, heights):
        for column, tile in enumerate(row):
            # Nearest neighbour: a label must not gain colours it has not.
            image = Image.fromarray(tile).resize((TILE, tile_height), 0)
            sheet.paste(image, (GAP + column * (TILE + GAP), top))
        top += tile_height + GAP
    return sheet


def draw_curves(
    curves: dict[str, list[tuple[int, float]]],
    size: tuple[int, int] = (640, 360),
) -> Image.Image:
    """Curves of (step, value) over one axis from 0 to their maximum."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 44, 10, size[0] - 12, size[1] - 24
    points = [point for curve in curves.values() for point in curve]
    last_step = max([step for step, _ in points] + [1])
    highest = max([value for _, value in points] + [1e-6])
    for tick in range(5):
        y = bottom - tick * (bottom - top) / 4
        draw.line((left, y, right, y), fill=(220, 220, 220))
        draw.text((4, y - 6), f"{highest * tick / 4:.3f}", fill="black")
        x = left + tick * (right - left) / 4
        draw.text((x - 10, bottom + 6), f"{last_step * tick // 4}", "black")
    for index, (name, curve) in enumerate(curves.items()):
        colour = CURVE_COLOURS[index % len(CURVE_COLOURS)]
        line = [
            (
                left + step / last_step * (right - left),
                bottom - value / highest * (bottom - top),
            )
            for step, value in curve
        ]
        draw.line(line, fill=colour, width=2)
        draw.text((right - 150, top + 14 * index), name, fill=colour)
    return image
