"""From pictures with boxes and masks to network inputs and targets.

Graph functions of single samples without state: what is random comes in as
draws, made from (seed, position in the stream) alone. Boxes are (left, top,
width, height), shares of the picture's sides.
"""

from typing import NamedTuple

import tensorflow as tf

from BlitzNet import anchors
from BlitzNet.layers import resize

# The reference's ranges, for --augment=paper.
BRIGHTNESS, HUE = 0.125, 0.07  # largest change
SATURATION, CONTRAST = (0.5, 1.5), (0.5, 1.5)
# Every picture gets all four: the reference's probabilities are never read.
ORDERS = ("BSHC", "SBCH", "CHBS", "HSCB")  # of the four changes
ZOOM = (1.05, 4.0)  # sides of the canvas by those of the picture
# layers.MEAN_BGR as shares, in the order of a picture's channels.
CANVAS_RGB = (0.482948, 0.454521, 0.404167)  # its colour: the mean
# Shares covered where SSD has overlaps: TensorFlow's sampler takes these.
COVERED = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # of an object, least, in a crop
ASPECT, AREA, TRIES = (0.5, 2.0), (0.3, 1.0), 50  # of a crop
MIRROR_SHARE = 0.5
SMALLEST = 2  # pixels that an object keeps at least
UNLABELLED = 255  # mask value of pixels that do not count
# New draws go to the end: moved ones would change what a seed gives.
DRAWS = 11  # random numbers that a sample uses


class Recipe(NamedTuple):
    """What is done to samples; see the flags of train.py.

    Attributes:
      kind: `paper`, the reference's augmentation, or `none`.
      image_size, map_size: sides of the network's input and of its finest map.
      zoomout_prob: probability of a canvas around the picture.
      zero_canvas: its mask is background even if the picture has no mask.
    """

    kind: str
    image_size: int
    map_size: int
    zoomout_prob: float
    zero_canvas: bool


class Sample(NamedTuple):
    """image [h, w, 3] in [0, 1]; mask [h, w, 1]; boxes [n, 4]; labels [n]."""

    image: tf.Tensor
    mask: tf.Tensor
    boxes: tf.Tensor
    labels: tf.Tensor


def between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """Draws in [0, 1) as numbers in [low, high)."""
    return low + (high - low) * draw


def change_colours(
    image: tf.Tensor,
    order: tf.Tensor,
    brightness: tf.Tensor,
    saturation: tf.Tensor,
    hue: tf.Tensor,
    contrast: tf.Tensor,
) -> tf.Tensor:
    """Four changes of an image in [0, 1], in one of ORDERS; clipped."""
    changes = {
        "B": lambda pixels: pixels + brightness,
        "S": lambda pixels: tf.image.adjust_saturation(pixels, saturation),
        "H": lambda pixels: tf.image.adjust_hue(pixels, hue),
        "C": lambda pixels: tf.image.adjust_contrast(pixels, contrast),
    }

    def in_order(letters):
        pixels = image
        for letter in letters:
            pixels = changes[letter](pixels)
        return pixels

    branches = [
        lambda letters=letters: in_order(letters) for letters in ORDERS
    ]
    # Clipped once: on the way values may leave [0, 1], as the reference's do.
    return tf.clip_by_value(tf.switch_case(order, branches), 0.0, 1.0)


class Canvas(NamedTuple):
    """Where a picture lies on its canvas, in pixels and in shares.

    Attributes:
      before, after: [2] int32, rows and columns around the picture.
      shift: [2] float32, as `before` but not rounded.
      zoom: scalar, sides of the canvas by those of the picture.
    """

    before: tf.Tensor
    after: tf.Tensor
    shift: tf.Tensor
    zoom: tf.Tensor


def make_canvas(size: tf.Tensor, zoom: tf.Tensor, shift: tf.Tensor) -> Canvas:
    """The canvas for a picture of `size`: zoom from 1 on, shift in pixels."""
    room = (zoom - 1.0) * tf.cast(size, tf.float32)
    before = tf.cast(shift, tf.int32)
    # Cut off one by one: the canvas may be a pixel short, as theirs was.
    return Canvas(before, tf.cast(room - shift, tf.int32), shift, zoom)


def zoom_boxes(boxes: tf.Tensor, canvas: Canvas, size: tf.Tensor) -> tf.Tensor:
    """Boxes [n, 4] as shares of the canvas."""
    # Not rounded, unlike the picture's own place: so the reference has it.
    shift = (canvas.shift / tf.cast(size, tf.float32))[::-1]
    moved = tf.concat([boxes[:, :2] + shift, boxes[:, 2:]], 1)
    return moved / canvas.zoom


def cut(
    pixels: tf.Tensor, begin: tf.Tensor, size: tf.Tensor, fill: tf.Tensor
) -> tf.Tensor:
    """The window of `size` at `begin`, which may lie outside the picture.

    So a canvas is never made whole: it can be sixteen times the picture.

    Args:
      pixels: [h, w, c].
      begin: [2] int32, from the picture's corner; may be negative.
      size: [2] int32.
      fill: [c], for what lies outside.
    """
    limits = tf.shape(pixels)[:2]
    start = tf.clip_by_value(begin, 0, limits)
    stop = tf.clip_by_value(begin + size, 0, limits)
    before = tf.clip_by_value(-begin, 0, size)
    after = size - before - (stop - start)
    inner = pixels[start[0] : stop[0], start[1] : stop[1]]
    borders = tf.stack([before, after], 1)
    # tf.pad takes one value for all channels; uint8 wraps around and back.
    padded = tf.pad(inner - fill, tf.concat([borders, [[0, 0]]], 0))
    return padded + fill


def crop_boxes(
    boxes: tf.Tensor, labels: tf.Tensor, begin: tf.Tensor, size: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The boxes whose centres lie in a window, clipped, as shares of it.

    Args:
      boxes: [n, 4].
      labels: [n].
      begin: [2], left and top of the window, shares of the picture.
      size: [2], its width and height.
    """
    near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    centres = near + boxes[:, 2:] / 2.0
    inside = tf.reduce_all((centres >= begin) & (centres <= begin + size), 1)
    near = tf.maximum(near, begin)
    far = tf.minimum(far, begin + size)
    cropped = tf.concat([(near - begin) / size, (far - near) / size], 1)
    return tf.boolean_mask(cropped, inside), tf.boolean_mask(labels, inside)


def flip_boxes(boxes: tf.Tensor) -> tf.Tensor:
    """Boxes [n, 4] of the mirrored picture."""
    left, top, width, height = tf.unstack(boxes, axis=1)
    return tf.stack([1.0 - left - width, top, width, height], 1)


def drop_small(
    boxes: tf.Tensor, labels: tf.Tensor, image_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The boxes that keep SMALLEST pixels of height and width."""
    large = tf.reduce_all(boxes[:, 2:] >= SMALLEST / image_size, 1)
    return tf.boolean_mask(boxes, large), tf.boolean_mask(labels, large)


def random_window(
    boxes: tf.Tensor, size: tf.Tensor, draw: tf.Tensor, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Top-left corner and size [2] of a crop that covers enough of an object.

    How much is enough is drawn; where no try succeeds it is the whole.
    """
    near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    corners = tf.concat([near[:, ::-1], far[:, ::-1]], 1)
    choice = tf.cast(draw * len(COVERED), tf.int32)
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.concat([size, [3]], 0),
        # The sampler refuses what rounding has put outside of [0, 1].
        tf.clip_by_value(corners, 0.0, 1.0)[tf.newaxis],
        seed,
        min_object_covered=tf.gather(COVERED, choice),
        aspect_ratio_range=ASPECT,
        area_range=AREA,
        max_attempts=TRIES,
        use_image_if_no_bounding_boxes=True,
    )
    return begin[:2], extent[:2]


def zoom_and_crop(
    sample: Sample, draws: tf.Tensor, recipe: Recipe, seed: tf.Tensor
) -> Sample:
    """The reference's canvas and crop, as one cut out of the picture."""
    size = tf.shape(sample.image)[:2]
    zoom = between(draws[0], *ZOOM)
    zoom = tf.where(draws[1] < recipe.zoomout_prob, zoom, 1.0)
    room = (zoom - 1.0) * tf.cast(size, tf.float32)
    canvas = make_canvas(size, zoom, draws[2:4] * room)
    boxes = zoom_boxes(sample.boxes, canvas, size)
    whole = canvas.before + size + canvas.after
    begin, extent = random_window(boxes, whole, draws[4], seed)
    shares = tf.cast(tf.stack([begin, extent]), tf.float32)
    shares = (shares / tf.cast(whole, tf.float32))[:, ::-1]
    boxes, labels = crop_boxes(boxes, sample.labels, shares[0], shares[1])
    # Background around a picture that nobody labelled would be made up.
    unlabelled = tf.reduce_all(sample.mask == UNLABELLED)
    fill = tf.where(unlabelled & (not recipe.zero_canvas), UNLABELLED, 0)
    begin -= canvas.before
    return Sample(
        cut(sample.image, begin, extent, tf.constant(CANVAS_RGB)),
        cut(sample.mask, begin, extent, tf.cast([fill], tf.uint8)),
        boxes,
        labels,
    )


def flip(sample: Sample) -> Sample:
    """The mirrored sample."""
    return Sample(
        sample.image[:, ::-1],
        sample.mask[:, ::-1],
        flip_boxes(sample.boxes),
        sample.labels,
    )


def augment(sample: Sample, recipe: Recipe, seed: tf.Tensor) -> Sample:
    """Colours, canvas, crop and mirror of the reference, in its order.

    Args:
      sample: of any size.
      recipe: kind `none` leaves it as it is.
      seed: [2] int64, unique to the sample's position in the stream.
    """
    if recipe.kind == "none":
        return sample
    # At once: each call of a stateless generator costs more than its numbers.
    draws = tf.random.stateless_uniform([DRAWS], seed)
    image = change_colours(
        sample.image,
        tf.cast(draws[0] * len(ORDERS), tf.int32),
        between(draws[1], -BRIGHTNESS, BRIGHTNESS),
        between(draws[2], *SATURATION),
        between(draws[3], -HUE, HUE),
        between(draws[4], *CONTRAST),
    )
    sample = sample._replace(image=image)
    sample = zoom_and_crop(sample, draws[5:10], recipe, seed)
    return Sample(
        *tf.cond(
            draws[10] < MIRROR_SHARE,
            lambda: tuple(flip(sample)),
            lambda: tuple(sample),
        )
    )


def resize_image(image: tf.Tensor, side: int) -> tf.Tensor:
    """[h, w, 3] to what the network sees, [side, side, 3]."""
    resized = resize(image[tf.newaxis], [side, side], "bilinear")[0]
    return tf.ensure_shape(resized, [side, side, 3])


def finish_sample(
    sample: Sample, recipe: Recipe, prior_boxes: tf.Tensor
) -> dict[str, tf.Tensor]:
    """What the network and the losses take, static in shape.

    Returns:
      `image` [S, S, 3] in [0, 1]; `classes` [A] int32 and `boxes` [A, 4], see
      anchors.encode; `label` [h, h] int32 with 0 where it does not count, and
      `valid` [h, h] float32.
    """
    boxes, labels = drop_small(sample.boxes, sample.labels, recipe.image_size)
    classes, offsets = anchors.encode(boxes, labels, prior_boxes)
    size = [recipe.map_size] * 2
    # From the crop at once: by way of image_size others would be picked.
    label = resize(sample.mask[tf.newaxis], size, "nearest")[0, ..., 0]
    label = tf.ensure_shape(label, size)
    valid = label != UNLABELLED
    return {
        "image": resize_image(sample.image, recipe.image_size),
        "classes": tf.ensure_shape(classes, prior_boxes.shape[:1]),
        "boxes": tf.ensure_shape(offsets, prior_boxes.shape),
        "label": tf.where(valid, tf.cast(label, tf.int32), 0),
        "valid": tf.cast(valid, tf.float32),
    }
