"""From pictures to crops of one size: scale, flip, padding, colours.

Graph functions of single samples without state: what is random comes in as
draws, made from (seed, position in the stream) alone. The window is cut before
it is scaled, not after as in the reference: the same window for a fraction of
the work. It is then flipped, and padded last, so that padding stays black.
"""

from typing import NamedTuple

import tensorflow as tf

from BiSeNet.classes import UNKNOWN

# The reference's ranges; it has hue and contrast too, but switched off.
BRIGHTNESS = 32.0  # largest change, of 255
SATURATION = (0.5, 1.5)
BRIGHT_FIRST_SHARE = 0.25  # the reference's four cases differ in one only
MIRROR_SHARE = 0.5
# New draws go to the end: moved ones would change what a seed gives.
DRAWS = 7  # random numbers that a sample uses


class Recipe(NamedTuple):
    """What is done to samples; see the flags of train.py."""

    kind: str
    height: int
    width: int
    min_scale: float
    max_scale: float
    half_pixel: bool


def between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """Draws in [0, 1) as numbers in [low, high)."""
    return low + (high - low) * draw


def cut_and_scale(
    image: tf.Tensor,
    label: tf.Tensor,
    scale: tf.Tensor,
    draws: tf.Tensor,
    recipe: Recipe,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The random window that fills the crop once it is scaled.

    Where the scaled picture is smaller than the crop, all of it.

    Args:
      image: [h, w, 3], uint8.
      label: [h, w, 1], uint8.
      scale: of both sides.
      draws: two, for the place of the window.
      recipe: the size of the crop.

    Returns:
      Image float32 and label uint8, at most of the size of the crop.
    """
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    crop = tf.constant([recipe.height, recipe.width], tf.float32)
    scaled = tf.maximum(tf.minimum(tf.floor(size * scale), crop), 1.0)
    window = tf.minimum(tf.math.ceil(scaled / scale), size)
    room = size - window + 1.0
    top, left = tf.unstack(tf.cast(tf.floor(draws * room), tf.int32))
    height, width = tf.unstack(tf.cast(window, tf.int32))
    scaled = tf.cast(scaled, tf.int32)
    image = tf.raw_ops.ResizeBilinear(
        images=image[tf.newaxis, top : top + height, left : left + width],
        size=scaled,
        half_pixel_centers=recipe.half_pixel,
    )
    # In the grid of the image, or labels would lie beside what they label.
    label = tf.raw_ops.ResizeNearestNeighbor(
        images=label[tf.newaxis, top : top + height, left : left + width],
        size=scaled,
        half_pixel_centers=recipe.half_pixel,
    )
    return image[0], label[0]


def change_colours(image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Brightness and saturation, in either order."""
    shift = between(draws[0], -BRIGHTNESS, BRIGHTNESS)
    factor = between(draws[1], *SATURATION)
    bright_first = draws[2] < BRIGHT_FIRST_SHARE
    # A shift of 0 is no shift: cheaper than computing both orders.
    image = image + tf.where(bright_first, shift, 0.0)
    # Saturation is a ratio: 0..255 does as well as the reference's 0..1.
    image = tf.image.adjust_saturation(image, factor)
    image = image + tf.where(bright_first, 0.0, shift)
    return tf.clip_by_value(image, 0.0, 255.0)


def augment(
    image: tf.Tensor, label: tf.Tensor, recipe: Recipe, seed: tf.Tensor
) -> dict[str, tf.Tensor]:
    """One sample for training, static in shape.

    Args:
      image: [h, w, 3], uint8.
      label: [h, w, 1], uint8.
      recipe: kind `reference`: scale, crop, flip, colours; `none`: a random
        crop at the picture's own scale.
      seed: [2] int64, unique to the sample's position in the stream.

    Returns:
      `image` [height, width, 3] float32 in 0..255 and `label` [height, width]
      int32; below and to the right of a small picture black and UNKNOWN.
    """
    # At once: each call of a stateless generator costs more than its numbers.
    draws = tf.random.stateless_uniform([DRAWS], seed)
    full = recipe.kind == "reference"
    scale = tf.constant(1.0)
    if full:
        scale = between(draws[0], recipe.min_scale, recipe.max_scale)
    image, label = cut_and_scale(image, label, scale, draws[1:3], recipe)
    if full:
        image, label = tf.cond(
            draws[3] < MIRROR_SHARE,
            lambda: (image[:, ::-1], label[:, ::-1]),
            lambda: (image, label),
        )
        image = change_colours(image, draws[4:7])
    canvas = (recipe.height, recipe.width)
    image = tf.image.pad_to_bounding_box(image, 0, 0, *canvas)
    # Padded as 255 - id, since padding adds zeros.
    label = tf.image.pad_to_bounding_box(UNKNOWN - label, 0, 0, *canvas)
    label = UNKNOWN - tf.ensure_shape(label, (*canvas, 1))
    return {
        "image": tf.ensure_shape(image, (*canvas, 3)),
        "label": tf.cast(label[..., 0], tf.int32),
    }
