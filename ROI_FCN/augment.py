"""From pictures to network inputs: sizes, canvases, augmentation.

Graph functions of single samples without state: what is random comes in as
draws, made from (seed, position in the stream) alone. The reference gave each
batch a size of its own; here every sample is placed on a canvas of one size,
and what is left of it is mean grey that does not count.
"""

from typing import NamedTuple

import tensorflow as tf

from ROI_FCN.model import MEAN_RGB

# The reference's probabilities and ranges, for --augment=paper.
STRETCH_SHARE, STRETCH_LEAST = 0.8, 0.5
MIRROR_SHARE = 0.5
SHADE_SHARE, SHADE_LEAST = 0.8, 0.4
GREY_SHARE = 0.4
CHANNEL_SHARE, CHANNEL_RANGE = 0.6, (0.1, 1.1)
NOISE_RANGE = (0.95, 1.05)
# The tries are ours: the reference draws up to 501, one after another.
CROP_LEAST, CROP_TRIES, CROP_PIXELS = 0.7, 16, 500
# New draws go to the end: moved ones would change what a seed gives.
DRAWS = 53  # random numbers that a sample uses


class Recipe(NamedTuple):
    """What is done to samples; see the flags of train.py."""

    kind: str
    height: int
    width: int
    ignore_label: int
    min_scale: float
    crop: float
    colour: float
    noise: float

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the canvas, pixels."""
        return self.height, self.width


class Sample(NamedTuple):
    """image [h, w, 3] in 0..255; label, roi and valid [h, w, 1] uint8."""

    image: tf.Tensor
    label: tf.Tensor
    roi: tf.Tensor
    valid: tf.Tensor


def between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """Draws in [0, 1) as numbers in [low, high)."""
    return low + (high - low) * draw


def fit_scale(size: tf.Tensor, recipe: Recipe) -> tf.Tensor:
    """Factors [2] for height and width that bring a picture to its scale.

    `port` fills the canvas, whatever the aspect, as the Ascend port did. The
    others leave a picture as it is unless it exceeds the canvas. Evaluation
    and prediction use the same rule, so that they see what training saw.
    """
    factors = tf.constant(recipe.canvas, tf.float32)
    factors /= tf.cast(size, tf.float32)
    if recipe.kind == "port":
        return factors
    return tf.ones([2]) * tf.minimum(1.0, tf.reduce_min(factors))


def scaled_size(size: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Height and width after scaling, int32 [2], at least 1."""
    scaled = tf.round(tf.cast(size, tf.float32) * factors)
    return tf.maximum(tf.cast(scaled, tf.int32), 1)


def seen_size(size: tf.Tensor, recipe: Recipe) -> tf.Tensor:
    """Height and width at which the network sees a picture, unaugmented."""
    return scaled_size(size, fit_scale(size, recipe))


def resize_image(image: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """[h, w, 3] to float32 of another size, without aliasing."""
    # As Pillow resizes, which the reference uses.
    return tf.image.resize(image, size, antialias=True)


def resize_ids(ids: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """[h, w, c] to another size; no value is made up."""
    return tf.image.resize(ids, size, method="nearest")


def random_factors(draws: tf.Tensor, min_scale: float, kind: str) -> tf.Tensor:
    """Scale and stretch of a sample, [2] for height and width."""
    if kind != "paper":
        return tf.ones([2])
    scale = between(draws[0], min_scale, 1.0)
    narrow = between(draws[1], STRETCH_LEAST, 1.0)
    # Either the width or the height shrinks, if any of them.
    pair = tf.stack([1.0, narrow])
    pair = tf.where(draws[2] < 0.5, pair, pair[::-1])
    return scale * tf.where(draws[3] < STRETCH_SHARE, pair, tf.ones([2]))


def random_crop(
    sample: Sample, draws: tf.Tensor, probability: float
) -> Sample:
    """Cuts a window of 0.7 to 1 of each side that shows labelled pixels.

    The first of CROP_TRIES windows with CROP_PIXELS labelled pixels is taken,
    or that with the most of them: the reference searched in a loop and could
    end in a crash.
    """
    size = tf.shape(sample.label)[:2]
    share = between(draws[:2], CROP_LEAST, 1.0)
    share = tf.where(draws[2] < probability, share, tf.ones([2]))
    window = scaled_size(size, share)
    room = tf.cast(size - window + 1, tf.float32)
    # All tries at once: a loop in a graph would cost more than they do.
    corners = tf.reshape(draws[3 : 3 + 2 * CROP_TRIES], [CROP_TRIES, 2])
    corners = tf.cast(corners * room, tf.int32)
    # Sums over all windows at once, from a table of sums.
    label, valid = sample.label[..., 0], sample.valid[..., 0]
    marked = tf.cast((label > 0) & (valid > 0), tf.int32)
    table = tf.cumsum(tf.cumsum(tf.pad(marked, [[1, 0], [1, 0]])), axis=1)
    ends = corners + window
    counts = (
        tf.gather_nd(table, ends)
        - tf.gather_nd(table, tf.stack([corners[:, 0], ends[:, 1]], 1))
        - tf.gather_nd(table, tf.stack([ends[:, 0], corners[:, 1]], 1))
        + tf.gather_nd(table, corners)
    )
    # tf.argmax takes the first of equals, and the limit makes all windows that
    # show enough equal.
    top, left = tf.unstack(corners[tf.argmax(tf.minimum(counts, CROP_PIXELS))])
    bottom, right = top + window[0], left + window[1]
    return Sample(*(each[top:bottom, left:right] for each in sample))


def change_colours(
    image: tf.Tensor, draws: tf.Tensor, recipe: Recipe, seed: tf.Tensor
) -> tf.Tensor:
    """Shade and grey of the reference; channels and noise where asked for."""
    shade = between(draws[0], SHADE_LEAST, 1.0)
    image *= tf.where(draws[1] < SHADE_SHARE, shade, 1.0)
    grey = tf.reduce_mean(image, axis=-1, keepdims=True)
    image = tf.where(draws[2] < GREY_SHARE, grey * tf.ones([3]), image)
    if recipe.colour:
        changed = (draws[9] < recipe.colour) & (draws[3:6] < CHANNEL_SHARE)
        factors = between(draws[6:9], *CHANNEL_RANGE)
        image *= tf.where(changed, factors, tf.ones([3]))
    if recipe.noise:
        factors = tf.random.stateless_uniform(
            tf.shape(image), seed, *NOISE_RANGE
        )
        image *= tf.where(draws[10] < recipe.noise, factors, 1.0)
    return tf.clip_by_value(image, 0.0, 255.0)


def place(sample: Sample, recipe: Recipe, draws: tf.Tensor) -> Sample:
    """Puts a sample somewhere on the canvas; static shapes from here on."""
    canvas = recipe.canvas
    size = tf.shape(sample.label)[:2]
    room = tf.cast(tf.constant(canvas) - size + 1, tf.float32)
    top, left = tf.unstack(tf.cast(draws * room, tf.int32))

    def pad(pixels, channels):
        padded = tf.image.pad_to_bounding_box(pixels, top, left, *canvas)
        return tf.ensure_shape(padded, (*canvas, channels))

    # Zero after the mean is taken off, as the convolutions' own padding is.
    mean = tf.constant(MEAN_RGB)
    return Sample(
        pad(sample.image - mean, 3) + mean,
        pad(sample.label, 1),
        pad(sample.roi, 1),
        pad(sample.valid, 1),
    )


def augment(
    image: tf.Tensor, masks: tf.Tensor, recipe: Recipe, seed: tf.Tensor
) -> dict[str, tf.Tensor]:
    """One sample for training, static in shape.

    Args:
      image: [h, w, 3], uint8.
      masks: [2, h, w, 1], uint8: the label and the ROI map.
      recipe: kind `paper`: the reference's scale, stretch, mirror, shade and
        grey on a canvas; `port`: resized to the canvas; `none`: placed on it.
      seed: [2] int64, unique to the sample's position in the stream.

    Returns:
      See finish_sample; `image` is [canvas height, width, 3].
    """
    # At once: each call of a stateless generator costs more than its numbers.
    draws = tf.random.stateless_uniform([DRAWS], seed)
    size = tf.shape(image)[:2]
    # Both scales as one: resizing twice would blur twice.
    factors = fit_scale(size, recipe)
    factors *= random_factors(draws[:4], recipe.min_scale, recipe.kind)
    size = scaled_size(size, factors)
    label, roi = tf.unstack(masks)
    label = resize_ids(label, size)
    sample = Sample(
        resize_image(image, size),
        label,
        resize_ids(roi, size),
        # Even if -1 meant 255 as a byte: check_values lets none of them in.
        tf.cast(label != recipe.ignore_label, tf.uint8),
    )
    # In the reference's order; what its probabilities leave out costs nothing.
    if recipe.kind == "paper":
        if recipe.crop:
            sample = random_crop(sample, draws[4:39], recipe.crop)
        mirrored = (each[:, ::-1] for each in sample)
        sample = Sample(
            *(
                tf.where(draws[39] < MIRROR_SHARE, other, each)
                for each, other in zip(sample, mirrored)
            )
        )
        image = change_colours(sample.image, draws[40:51], recipe, seed)
        sample = sample._replace(image=image)
    return finish_sample(place(sample, recipe, draws[51:53]))


def finish_sample(sample: Sample) -> dict[str, tf.Tensor]:
    """What the network and the loss take.

    Returns:
      `image` [h, w, 3] float32 in 0..255, `roi` [h, w, 1] float32, `label`
      [h, w] int32 with 0 where it is ignored, `valid` [h, w] float32.
    """
    valid = sample.valid[..., 0]
    return {
        "image": sample.image,
        "roi": tf.cast(sample.roi, tf.float32),
        "label": tf.cast(sample.label[..., 0] * valid, tf.int32),
        "valid": tf.cast(valid, tf.float32),
    }
