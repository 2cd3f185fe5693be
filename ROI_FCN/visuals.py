"""Pictures of results: palettes, overlays, contact sheets and curves.

Drawn with Pillow alone, so that a server without a screen or a plotting
package still leaves something to look at.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

# The reference's colours of the classes, as shares of red, green and blue;
# background has none, and further classes follow a formula.
CLASS_COLOURS = (
    (0, 0, 0),
    (1, 0, 0),
    (0, 0, 1),
    (0, 0.5, 0),
    (0, 1, 1),
    (1, 1, 0),
    (1, 0, 1),
    (0, 1, 0),
    (0, 0.7, 0.5),
    (0.5, 0.4, 0),
    (0.7, 0.7, 0.2),
    (0.3, 0.2, 0.2),
    (0.5, 0, 0.7),
    (1, 0.25, 0.5),
    (0.5, 0.5, 0.5),
)
OVERLAY_SHARE = 0.7  # of the colour, as the reference has it
# Blue, red and green of Matplotlib's default colours.
CURVE_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))
GAP = 4  # pixels between the tiles of a contact sheet
CAPTION = 14  # pixels of height of a line of text
TILE = 240  # pixels of width of a tile


def class_colours(count: int) -> np.ndarray:
    """Fixed colours [count, 3], float64 in 0..255."""
    colours = [[255 * share for share in row] for row in CLASS_COLOURS[:count]]
    for index in range(len(colours), count):
        # The reference's formula, in bytes where its table has shares.
        blue = index**3 + 7 * index**2 + 3 * index + 30
        red = index**2 + 4 * index + 5
        colours.append([red % 255, 10 * index % 255, blue % 255])
    return np.array(colours, np.float64)


def palette(count: int) -> np.ndarray:
    """Fixed colours [count, 3], uint8."""
    return np.round(class_colours(count)).astype(np.uint8)


def overlay(
    picture: np.ndarray, classes: np.ndarray, count: int
) -> np.ndarray:
    """Blends colours over a picture [h, w, 3]; background stays as it is.

    Returns uint8.
    """
    colours = class_colours(count)[classes]
    share = OVERLAY_SHARE * (classes > 0)[..., np.newaxis]
    return ((1.0 - share) * picture + share * colours).astype(np.uint8)


def difference(
    classes: np.ndarray, label: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Wrong pixels in red on a pale copy of the label, ignored ones grey."""
    # The limit keeps all classes pale, and 40 times the id within a byte.
    shades = 255 - 40 * np.minimum(label, 3).astype(np.uint8)
    picture = np.repeat(shades[..., None], 3, -1)
    picture[classes != label] = (214, 39, 40)
    picture[valid == 0] = (160, 160, 160)
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
            # 0 is its number in every Pillow, whose names for it have moved.
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
