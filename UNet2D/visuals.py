"""Pictures of results: palettes, overlays, contact sheets and curves.

Drawn with Pillow alone, so that a server without a screen or a plotting
package still leaves something to look at.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

# Membrane black, cells white, as the EM labels are drawn; further classes
# take the colours of the Pascal VOC palette.
FIRST_COLOURS = ((0, 0, 0), (255, 255, 255))
# White would but raise the contrast of a grey picture.
OVERLAY_COLOUR = (255, 127, 14)  # of class 1
OVERLAY_SHARE = 0.4  # of the colour
# Blue, red and green of Matplotlib's default colours.
CURVE_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))
GAP = 4  # pixels between the tiles of a contact sheet
CAPTION = 14  # pixels of height of a line of text


def palette(count: int) -> np.ndarray:
    """Fixed colours [count, 3], uint8."""
    colours = np.zeros((count, 3), np.uint8)
    for index in range(count):
        for bit in range(8):
            # Three bits of the id at a time go to red, green, blue.
            for channel in range(3):
                value = index >> (3 * bit + channel) & 1
                colours[index, channel] |= value << (7 - bit)
    colours[: len(FIRST_COLOURS)] = FIRST_COLOURS[:count]
    return colours


def to_bytes(image: np.ndarray) -> np.ndarray:
    """An image [h, w, 1 or 3] in [-1, 1] as [h, w, 3] uint8."""
    pixels = np.clip((image + 1.0) * 127.5, 0, 255).astype(np.uint8)
    return np.broadcast_to(pixels, pixels.shape[:2] + (3,))


def overlay(
    picture: np.ndarray, classes: np.ndarray, count: int
) -> np.ndarray:
    """Blends colours over a picture [h, w, 3], uint8; class 0 is left bare."""
    colours = palette(count).astype(np.float32)
    colours[1] = OVERLAY_COLOUR
    blended = OVERLAY_SHARE * colours[classes]
    blended += (1.0 - OVERLAY_SHARE) * picture
    return np.where(classes[..., None] == 0, picture, blended).astype(np.uint8)


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
    """Tiles [h, w, 3] uint8 in rows under column titles."""
    height, width = rows[0][0].shape[:2]
    # Nearest neighbour below: a label must not gain colours it has not.
    scale = max(1, 192 // width)  # tiny tiles would be hard to see
    height, width = height * scale, width * scale
    sheet = Image.new(
        "RGB",
        (
            len(titles) * (width + GAP) + GAP,
            len(rows) * (height + GAP) + GAP + CAPTION,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left = GAP + column * (width + GAP)
        draw.text((left, 1), title, fill="black")
        for row, tiles in enumerate(rows):
            tile = Image.fromarray(tiles[column]).resize((width, height), 0)
            sheet.paste(tile, (left, CAPTION + GAP + row * (height + GAP)))
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
