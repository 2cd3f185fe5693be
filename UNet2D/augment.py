"""From pictures to network inputs: normalisation, borders, augmentation.

Graph functions of single samples, with static shapes and without state: what
is random comes in as draws, made from (seed, position in the stream) alone.
A sample on its way is one float32 map [H, W, channels + classes + 1]: image,
one-hot label and a last channel that is 1 where a pixel counts.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

ELASTIC_GRID = 3  # displacement vectors on a 3x3 grid, as in the paper
ELASTIC_SIGMA_PIXELS = 10.0  # their standard deviation, as in the paper
BOX_SHARE = 0.3  # at most this share is cut off each side (reference)
BRIGHTNESS = 0.2  # largest shift of images in [-1, 1] (reference)
# New draws go to the end: moved ones would change what a seed gives.
DRAWS = 8  # random numbers that a sample uses


def resize_bilinear(
    maps: tf.Tensor, size: Sequence[int], rule: str
) -> tf.Tensor:
    """Resizes [h, w, c] to height and width `size`.

    `legacy` takes pixel corners as the origin, as TF1 did; `half_pixel`
    takes centres, as TF2 does.
    """
    if rule == "legacy":
        # The raw operation: tf.compat.v1's wrapper warns that it is old.
        resized = tf.raw_ops.ResizeBilinear(images=maps[tf.newaxis], size=size)
        resized = resized[0]
    else:
        resized = tf.image.resize(maps, size)
    return resized


def harden(soft: tf.Tensor) -> tf.Tensor:
    """Class ids [h, w], int32, from soft one-hot maps [h, w, C].

    Ties go to the higher class, as the reference's threshold at one half
    gives them.
    """
    # tf.argmax takes the first of equals, hence the reversal.
    classes = soft.shape[-1]
    return classes - 1 - tf.argmax(soft[..., ::-1], -1, tf.int32)


def prepare(
    picture: tf.Tensor,
    label: tf.Tensor,
    side: int,
    num_classes: int,
    rule: str,
    ignore_label: int,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Scales a picture and its label to the size of the network's output.

    Args:
      picture: [h, w, channels], uint8.
      label: [h, w], uint8 class ids.
      side: height and width of the result.
      num_classes: number of classes.
      rule: see resize_bilinear.
      ignore_label: value of pixels that do not count.

    Returns:
      image [side, side, channels] in [-1, 1], label [side, side] uint8,
      valid [side, side] uint8.
    """
    # Not as uint8, where an ignore_label of -1 would mean 255.
    label = tf.cast(label, tf.int32)
    image = tf.cast(picture, tf.float32) / 127.5 - 1.0
    # Classes are interpolated as soft maps and hardened after: interpolated
    # ids would invent classes between two others.
    counts = tf.cast(label != ignore_label, tf.float32)[..., tf.newaxis]
    maps = tf.concat([tf.one_hot(label, num_classes), counts], -1)
    maps = resize_bilinear(maps, [side, side], rule)
    return (
        resize_bilinear(image, [side, side], rule),
        tf.cast(harden(maps[..., :-1]), tf.uint8),
        tf.cast(maps[..., -1] >= 0.5, tf.uint8),
    )


def stack_sample(
    image: tf.Tensor, label: tf.Tensor, valid: tf.Tensor, num_classes: int
) -> tf.Tensor:
    """One map [h, w, channels + classes + 1] of what belongs together."""
    # Label and validity travel with the image through every warp, so that
    # none of them can move alone.
    one_hot = tf.one_hot(tf.cast(label, tf.int32), num_classes)
    counts = tf.cast(valid, tf.float32)[..., tf.newaxis]
    return tf.concat([image, one_hot * counts, counts], -1)


def split_sample(
    sample: tf.Tensor, num_classes: int, margin: int
) -> dict[str, tf.Tensor]:
    """Image at full size, label and valid at the network's output size.

    Args:
      sample: [H, W, channels + classes + 1].
      num_classes: number of classes.
      margin: pixels that the network eats on each side.

    Returns:
      `image` [H, W, channels], `label` [H - 2 margin, ...] int32, `valid`
      of the same size, float32.
    """
    # The network's output covers the middle of its input only.
    inner = sample[margin:-margin, margin:-margin]
    return {
        "image": sample[..., : -num_classes - 1],
        "label": harden(inner[..., -num_classes - 1 : -1]),
        "valid": tf.cast(inner[..., -1] >= 0.5, tf.float32),
    }


def mirror_indices(start: int, stop: int, count: int) -> np.ndarray:
    """Indices into `count` pixels for positions start .. stop - 1.

    Positions outside are mirrored without repeating the edge, as often as
    needed, so that even a tiny picture has a border of any width.
    """
    period = max(2 * (count - 1), 1)
    folded = np.mod(np.arange(start, stop), period)
    return np.minimum(folded, period - folded) if count > 1 else folded * 0


def add_border(sample: tf.Tensor, margin: int, border: str) -> tf.Tensor:
    """Widens [h, w, c] by `margin` on each side.

    `zero` gives mid grey that does not count in the loss (the reference);
    `mirror` gives mirrored pixels with their mirrored labels (the paper).
    """
    if border == "zero":
        return tf.pad(sample, [[margin, margin], [margin, margin], [0, 0]])
    # Two gathers: tf.pad's REFLECT refuses borders wider than the picture.
    rows, columns = (
        mirror_indices(-margin, side + margin, side)
        for side in sample.shape[:2]
    )
    return tf.gather(tf.gather(sample, rows, axis=0), columns, axis=1)


def flip(sample: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Mirrors left-right and up-down where the two draws exceed one half."""
    sample = tf.where(draws[0] > 0.5, sample[:, ::-1], sample)
    return tf.where(draws[1] > 0.5, sample[::-1], sample)


def random_box(sample: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Enlarges a box of [H, W, c] to the whole size, bilinear.

    The four draws in [0, 1) say how much is cut off left, right, top and
    bottom; the aspect is not kept, as in the reference.
    """
    left, right, top, bottom = tf.unstack(BOX_SHARE * draws)
    box = tf.stack([top, left, 1.0 - bottom, 1.0 - right])
    # Corners are box edges times (side - 1), as in the reference.
    resized = tf.image.crop_and_resize(
        sample[tf.newaxis], box[tf.newaxis], [0], sample.shape[:2]
    )[0]
    return tf.ensure_shape(resized, sample.shape)


def quarter_turns(sample: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """Turns a square map by 0, 90, 180 or 270 degrees, draw in [0, 1)."""
    # Two binary choices: a branch per angle would trace four graphs.
    turned = tf.where(draw % 0.5 >= 0.25, tf.image.rot90(sample), sample)
    return tf.where(draw >= 0.5, turned[::-1, ::-1], turned)


def elastic(sample: tf.Tensor, grid: tf.Tensor) -> tf.Tensor:
    """Warps [H, W, c] by a smooth random displacement.

    Args:
      sample: [H, W, c].
      grid: [3, 3, 2], standard normal; scaled to ELASTIC_SIGMA_PIXELS and
        interpolated bicubically to a displacement (down, right) per pixel.
    """
    height, width, _ = sample.shape
    shift = tf.image.resize(
        grid * ELASTIC_SIGMA_PIXELS, [height, width], method="bicubic"
    )
    rows = tf.range(height, dtype=tf.float32)[:, tf.newaxis] + shift[..., 0]
    columns = tf.range(width, dtype=tf.float32) + shift[..., 1]
    rows = tf.clip_by_value(rows, 0.0, height - 1.0)
    columns = tf.clip_by_value(columns, 0.0, width - 1.0)
    # The last cell begins one pixel early, so no gather leaves the map.
    top = tf.minimum(tf.floor(rows), height - 2.0)
    left = tf.minimum(tf.floor(columns), width - 2.0)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    # One gather of all channels per corner of the bilinear cell.
    flat = tf.reshape(sample, [height * width, -1])
    corner = tf.cast(top, tf.int32) * width + tf.cast(left, tf.int32)
    upper = tf.gather(flat, corner) * (1.0 - right)
    upper += tf.gather(flat, corner + 1) * right
    lower = tf.gather(flat, corner + width) * (1.0 - right)
    lower += tf.gather(flat, corner + width + 1) * right
    return upper * (1.0 - down) + lower * down


def brighten(image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """Shifts [H, W, c] by up to BRIGHTNESS either way; stays in [-1, 1]."""
    return tf.clip_by_value(image + (2.0 * draw - 1.0) * BRIGHTNESS, -1, 1)


def augment(
    sample: tf.Tensor, channels: int, kind: str, seed: tf.Tensor
) -> tf.Tensor:
    """Augments one bordered sample.

    Args:
      sample: [H, W, channels + classes + 1].
      channels: of the image, which alone is brightened.
      kind: `none`; `reference`: flips, random box, brightness, in this
        order; `turns`: quarter turns in place of the box; `paper`: elastic
        deformation on top.
      seed: [2] int64, unique to the sample's position in the stream.
    """
    if kind == "none":
        return sample
    # At once: each call of a stateless generator costs more than its numbers.
    draws = tf.random.stateless_uniform([DRAWS], seed)
    sample = flip(sample, draws[:2])
    # A box enlarges what it shows; the network then trains on another scale
    # than it is evaluated on, which costs more than it gives in short runs.
    if kind == "reference":
        sample = random_box(sample, draws[2:6])
    else:
        sample = quarter_turns(sample, draws[7])
    if kind == "paper":
        grid = [ELASTIC_GRID, ELASTIC_GRID, 2]
        sample = elastic(sample, tf.random.stateless_normal(grid, seed))
    # Last, so that borders are brightened with the picture (reference).
    image = brighten(sample[..., :channels], draws[6])
    return tf.concat([image, sample[..., channels:]], -1)
