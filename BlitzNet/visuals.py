"""Pictures of results: palettes, overlays, contact sheets and curves.

Drawn with Pillow alone, so that a server without a screen or a plotting
package still leaves something to look at.
"""

from collections.abc import Sequence
from typing import Optional

import numpy as np
from PIL import Image, ImageDraw

from BlitzNet.augment import UNLABELLED

PICTURE_SHARE, COLOUR_SHARE = 130 / 255, 125 / 255  # as the reference has it
# The looks from here on are our own; the reference's boxes are 5 wide.
BOX_WIDTH = 3  # pixels
# Blue, red and green of Matplotlib's default colours.
CURVE_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))
GAP = 4  # pixels between the tiles of a contact sheet
CAPTION = 14  # pixels of height of a line of text
TILE = 240  # pixels of width of a tile


def palette(count: int) -> np.ndarray:
    """Pascal VOC's colours [count, 3], uint8, as many as wanted up to 256."""
    colours = np.zeros((count, 3), np.uint8)
    for index in range(count):
        for bit in range(8):
            # Three bits at a time, spread over the channels from the top.
            digit = index >> 3 * bit
            colours[index] |= np.array(
                [(digit >> channel & 1) << 7 - bit for channel in range(3)],
                np.uint8,
            )
    return colours


def overlay(
    picture: np.ndarray, classes: np.ndarray, count: int
) -> np.ndarray:
    """Blends colours over a picture [h, w, 3]; background stays as it is.

    Returns uint8.
    """
    blended = PICTURE_SHARE * picture + COLOUR_SHARE * palette(count)[classes]
    drawn = np.where(classes[..., np.newaxis] > 0, blended, picture)
    return drawn.astype(np.uint8)


def draw_boxes(
    picture: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str],
    scores: Optional[np.ndarray] = None,
) -> np.ndarray:
    """Boxes with names and scores on a picture [h, w, 3] uint8.

    Args:
      picture: is left as it is; the result is a copy.
      boxes: [n, 4], (top, left, bottom, right), shares of its sides.
      classes: [n].
      names: of the classes.
      scores: [n], or None for the ground truth.
    """
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    height, width = picture.shape[:2]
    colours = palette(len(names))
    # The best last, so that they lie on top.
    for number in range(len(boxes))[::-1]:
        colour = tuple(map(int, colours[classes[number]]))
        top, left, bottom, right = boxes[number] * ([height, width] * 2)
        # Pillow's rectangles include their last row and column.
        corners = (left, top, max(right - 1, left), max(bottom - 1, top))
        pen.rectangle(corners, outline=colour, width=BOX_WIDTH)
        text = names[classes[number]]
        if scores is not None:
            text += f" {scores[number]:.2f}"
        place = (left + BOX_WIDTH + 1, top + BOX_WIDTH)
        pen.rectangle(pen.textbbox(place, text), fill=colour)
        pen.text(place, text, fill="white" if sum(colour) < 384 else "black")
    return np.asarray(image)


def difference(classes: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Wrong pixels in red on a pale copy of the label, [h, w, 3] uint8.

    Pixels of the label that do not count are white, and never wrong.
    """
    counted = label < UNLABELLED
    shades = np.where(counted & (label > 0), 200, 255).astype(np.uint8)
    picture = np.repeat(shades[..., np.newaxis], 3, -1)
    picture[(classes != label) & counted] = (214, 39, 40)
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
