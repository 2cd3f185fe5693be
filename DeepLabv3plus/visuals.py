"""Pictures of results: palettes, overlays, contact sheets and curves.

Drawn with Pillow alone, so that a server without a screen or a plotting
package still leaves something to look at.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

OVERLAY_SHARE = 0.6  # of the colour
# Blue, red and green of Matplotlib's default colours.
CURVE_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))
GAP = 4  # pixels between the tiles of a contact sheet
CAPTION = 14  # pixels of height of a line of text
TILE = 240  # pixels of width of a tile


def palette(count: int) -> np.ndarray:
    """Pascal VOC's colours [count, 3], uint8; 255 has one too."""
    ids = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    # Three bits of the id at a time go into the channels' highest free bits.
    for bit in range(7, -1, -1):
        for channel in range(3):
            colours[:, channel] |= (((ids >> channel) & 1) << bit).astype("u1")
        ids = ids >> 3
    return colours


def overlay(
    picture: np.ndarray, classes: np.ndarray, count: int
) -> np.ndarray:
    """Blends colours over a picture [h, w, 3]; background stays as it is.

    Returns uint8.
    """
    colours = palette(count)[classes].astype(np.float64)
    # Class 0 is VOC's background; other data show their first class bare.
    share = OVERLAY_SHARE * (classes > 0)[..., np.newaxis]
    return ((1.0 - share) * picture + share * colours).astype(np.uint8)


def difference(
    classes: np.ndarray, label: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Wrong pixels in red, those that do not count in grey, [h, w, 3]."""
    picture = np.full((*label.shape, 3), 255, np.uint8)
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
    # Curves may be empty or zero: neither may leave nothing to divide by.
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
