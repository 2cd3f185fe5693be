"""From pictures to network inputs: scaling, padding, crops, flips.

Graph functions of single samples without state: what is random comes in as
draws, made from (seed, position in the stream) alone. Every resizing puts
corners on corners, as the reference's does.
"""

from typing import NamedTuple, Optional

import tensorflow as tf

from DeepLabv3plus.layers import resize_bilinear, resize_nearest

MEAN_PIXEL = 127.5  # zero to the network, as the padding of convolutions is
MIRROR_SHARE = 0.5
# New draws go to the end: moved ones would change what a seed gives.
DRAWS = 4  # random numbers that a sample uses


class Recipe(NamedTuple):
    """What is done to samples; see the flags of train.py."""

    kind: str
    height: int
    width: int
    ignore_label: int
    # The defaults are the reference's for VOC, where the last three are off.
    min_scale: float = 0.5
    max_scale: float = 2.0
    scale_step: float = 0.25
    min_resize: Optional[int] = None
    max_resize: Optional[int] = None
    resize_factor: Optional[int] = None


def resize_image(image: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """[h, w, 3] to float32 of another size."""
    return resize_bilinear(tf.cast(image, tf.float32)[tf.newaxis], size)[0]


def resize_ids(ids: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """[h, w, c] to another size; no value is made up."""
    return resize_nearest(ids[tf.newaxis], size)[0]


def scaled_size(size: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Height and width after scaling, cut down to whole pixels, int32 [2]."""
    return tf.cast(tf.cast(size, tf.float32) * factor, tf.int32)


def range_size(size: tf.Tensor, recipe: Recipe) -> tf.Tensor:
    """Height and width of a picture brought to the range of min_resize.

    The short side becomes min_resize, or by the reference's cutting off a
    pixel less, unless the long side would exceed max_resize: then that is its
    length. With a factor f sides are raised to the next k f + 1.
    """
    if not recipe.min_resize:
        return size
    sides = tf.cast(size, tf.float32)
    factor, limit = recipe.resize_factor, recipe.max_resize
    # Cut down as in the reference, so that rounding may cost a side a pixel.
    resized = scaled_size(size, recipe.min_resize / tf.reduce_min(sides))
    if limit:
        if factor:
            # Lowered first, or the raising of sides below could exceed it.
            limit -= (limit - 1) % factor
        smaller = scaled_size(size, limit / tf.reduce_max(sides))
        too_long = tf.reduce_max(resized) > limit
        resized = tf.where(too_long, smaller, resized)
    if factor:
        resized += (factor - (resized - 1) % factor) % factor
    return resized


def random_scale(draw: tf.Tensor, recipe: Recipe) -> tf.Tensor:
    """A scale between the recipe's bounds, in its steps; step 0: any."""
    low, high, step = recipe.min_scale, recipe.max_scale, recipe.scale_step
    if low == high or not step:
        return low + (high - low) * draw
    scales = tf.linspace(low, high, int((high - low) / step + 1))
    count = tf.cast(tf.size(scales), tf.float32)
    # A draw stays 2**-23 below 1, so that no product rounds up to the count.
    return tf.cast(
        tf.gather(scales, tf.cast(draw * count, tf.int32)), "float32"
    )


def pad(pixels: tf.Tensor, height: int, width: int, value: float) -> tf.Tensor:
    """Pads [h, w, c] at the bottom and right to at least a size."""
    size = tf.shape(pixels)[:2]
    missing = tf.maximum(tf.constant([height, width]) - size, 0)
    paddings = [[0, missing[0]], [0, missing[1]], [0, 0]]
    return tf.pad(pixels, paddings, constant_values=value)


def counted(label: tf.Tensor, ignore_label: int) -> tf.Tensor:
    """1 where a pixel counts and 0 elsewhere, uint8 like the label."""
    # Not as uint8, where an ignore_label of -1 would mean 255.
    return tf.cast(tf.cast(label, tf.int32) != ignore_label, tf.uint8)


def finish_sample(
    image: tf.Tensor, label: tf.Tensor, valid: tf.Tensor
) -> dict[str, tf.Tensor]:
    """What the network and the loss take.

    Returns:
      `image` [h, w, 3] float32 in 0..255, `label` [h, w] int32 with 0 where
      it is ignored, `valid` [h, w] float32, 1 where a pixel counts.
    """
    return {
        "image": image,
        # The loss looks class weights up by it, and tf.gather takes no 255.
        "label": tf.cast(label * valid, tf.int32)[..., 0],
        "valid": tf.cast(valid, tf.float32)[..., 0],
    }


def augment(
    image: tf.Tensor, label: tf.Tensor, recipe: Recipe, seed: tf.Tensor
) -> dict[str, tf.Tensor]:
    """One sample for training, static in shape.

    Args:
      image: [h, w, 3], uint8.
      label: [h, w, 1], uint8.
      recipe: kind `reference`: scaled, padded, cropped, mirrored; `none`:
        padded and cropped.
      seed: [2] int64, unique to the sample's position in the stream.

    Returns:
      See finish_sample; `image` is [crop height, crop width, 3].
    """
    # At once: each call of a stateless generator costs more than its numbers.
    draws = tf.random.stateless_uniform([DRAWS], seed)
    size = range_size(tf.shape(image)[:2], recipe)
    image, label = resize_image(image, size), resize_ids(label, size)
    if recipe.kind == "reference":
        size = scaled_size(size, random_scale(draws[0], recipe))
        image, label = resize_image(image, size), resize_ids(label, size)
    # Scaled whole and cropped after, as in the reference: with corners on
    # corners, scaling a crop alone would give other pixels.
    crop = (recipe.height, recipe.width)
    valid = counted(label, recipe.ignore_label)
    image = pad(image, *crop, MEAN_PIXEL)
    # The reference pads with ignore_label, but no byte can be -1.
    label, valid = pad(label, *crop, 0), pad(valid, *crop, 0)
    room = tf.cast(tf.shape(image)[:2] - crop + 1, tf.float32)
    top, left = tf.unstack(tf.cast(draws[1:3] * room, tf.int32))
    parts = []
    for pixels in (image, label, valid):
        part = pixels[top : top + crop[0], left : left + crop[1]]
        part = tf.ensure_shape(part, (*crop, pixels.shape[-1]))
        if recipe.kind == "reference":
            mirrored = draws[3] < MIRROR_SHARE
            part = tf.where(mirrored, part[:, ::-1], part)
        parts.append(part)
    return finish_sample(*parts)
