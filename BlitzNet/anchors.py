"""Prior boxes, the targets that they give, and boxes from predictions.

Boxes are shares of the picture's sides. Priors and ground truth are (left,
top, width, height); what is decoded is (top, left, bottom, right).
"""

import numpy as np
import tensorflow as tf

from BlitzNet.model import LARGE, Architecture

# Smallest scale, and the range of the others, by (large picture, x4).
# They are the reference's; the paper reports the first and the third.
SCALES = {
    (False, True): (0.04, 0.1, 0.95),
    (False, False): (0.1, 0.2, 0.95),
    (True, False): (0.04, 0.1, 0.95),
    (True, True): (0.02, 0.08, 0.95),
}
# SSD's aspects, in the order of the heads' channels in checkpoints.
ASPECTS = (1.0, 2.0, 1 / 2, 3.0, 1 / 3)  # width by height
# SSD's values, which the reference keeps.
VARIANCES = (0.1, 0.2)  # of centres and of sizes
MATCHED = 0.5  # overlap from which on a prior stands for an object


def scales_of(architecture: Architecture) -> list[float]:
    """Sides of the square priors of each map, and one more."""
    large = architecture.image_size >= LARGE
    smallest, low, high = SCALES[large, architecture.x4]
    maps = len(architecture.map_sizes())
    step = (high - low) / (maps - 2)
    # The last may exceed the picture: only its mean with the one before it is
    # used, for the larger square.
    return [smallest, *(low + number * step for number in range(maps))]


def priors(architecture: Architecture) -> np.ndarray:
    """The prior boxes [A, 4]: by map, row, column and kind; unclipped.

    float32 throughout, as the reference computes them, to the last bit: which
    of two priors overlaps a thin box more can hang on it.
    """
    scales = np.array(scales_of(architecture), np.float32)
    roots = np.sqrt(np.array(ASPECTS, np.float32))
    boxes = []
    for number, cells in enumerate(architecture.map_sizes()):
        scale, larger = scales[number : number + 2]
        between = np.sqrt(scale * larger)
        widths = np.append(scale * roots, between)
        heights = np.append(scale / roots, between)
        centres = _centres(cells)
        shape = (cells, cells, len(widths))
        left = centres[np.newaxis, :, np.newaxis] - widths / np.float32(2)
        top = centres[:, np.newaxis, np.newaxis] - heights / np.float32(2)
        columns = (left, top, widths, heights)
        stacked = np.stack(
            [np.broadcast_to(column, shape) for column in columns], -1
        )
        boxes.append(stacked.reshape(-1, 4))
    return np.concatenate(boxes)


def _centres(cells: int) -> np.ndarray:
    """Centres of the cells of a side, [cells] float32."""
    # In equal steps, as TF1 spaced them; (number + 0.5) / cells rounds else.
    first, last = np.float32([0.5 / cells, 1.0 - 0.5 / cells])
    step = (last - first) / np.float32(max(cells - 1, 1))
    return first + step * np.arange(cells, dtype=np.float32)


def overlaps(boxes: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """Intersection over union [n, m] of boxes [n, 4] with others [m, 4].

    float32 in this order of operations: thin boxes tie, and another rounding
    would match another prior than the reference.
    """
    boxes = boxes[:, tf.newaxis]
    corner = tf.maximum(boxes[..., :2], others[..., :2])
    ends = tf.minimum(
        boxes[..., :2] + boxes[..., 2:], others[..., :2] + others[..., 2:]
    )
    sides = tf.maximum(ends - corner, 0.0)
    shared = sides[..., 0] * sides[..., 1]
    areas = boxes[..., 2] * boxes[..., 3] + others[..., 2] * others[..., 3]
    return shared / (areas - shared)


def encode(
    boxes: tf.Tensor, labels: tf.Tensor, prior_boxes: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The targets of a picture.

    A prior stands for the object that it overlaps most, if by MATCHED; and
    each object has the prior that overlaps it most. Of objects that want the
    same prior the first gets it; of equal overlaps the first counts.

    Args:
      boxes: [n, 4], n may be 0.
      labels: [n], from 1 on.
      prior_boxes: [A, 4].

    Returns:
      Classes [A] int32, 0 for none, and encoded boxes [A, 4].
    """
    count = tf.shape(boxes)[0]
    # A last object that overlaps nothing keeps an empty picture legal.
    boxes = tf.concat([boxes, tf.ones([1, 4])], 0)
    labels = tf.concat([tf.cast(labels, tf.int32), [0]], 0)
    table = overlaps(boxes[:count], prior_boxes)
    table = tf.concat([table, tf.zeros_like(prior_boxes[tf.newaxis, :, 0])], 0)
    chosen = _first_largest(table, 0)
    # Below MATCHED a prior is background: no zone in between is left out.
    matched = tf.reduce_max(table, 0) >= MATCHED
    chosen = tf.where(matched, chosen, count)
    best = _first_largest(table[:count], 1)
    # Of several objects the smallest number stays.
    forced = tf.math.unsorted_segment_min(
        tf.range(count), best, tf.shape(prior_boxes)[0]
    )
    # Priors that no object wants come out as int32's largest number.
    chosen = tf.where(forced < count, forced, chosen)
    return tf.gather(labels, chosen), offsets(
        tf.gather(boxes, chosen), prior_boxes
    )


def _first_largest(table: tf.Tensor, axis: int) -> tf.Tensor:
    """Indices of the largest values of [n, m] along an axis, int32.

    The first of equal ones, which tf.argmax does not promise.
    """
    size = tf.shape(table)[axis]
    places = tf.range(size)[:, tf.newaxis] if axis == 0 else tf.range(size)
    largest = tf.reduce_max(table, axis, keepdims=True)
    return tf.reduce_min(tf.where(table == largest, places, size), axis)


def offsets(boxes: tf.Tensor, prior_boxes: tf.Tensor) -> tf.Tensor:
    """Where boxes [A, 4] lie relative to their priors, [A, 4]."""
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    own = prior_boxes[:, :2] + prior_boxes[:, 2:] / 2
    shift = (centres - own) / prior_boxes[:, 2:] / VARIANCES[0]
    growth = tf.math.log(boxes[:, 2:] / prior_boxes[:, 2:]) / VARIANCES[1]
    return tf.concat([shift, growth], 1)


def decode(location: tf.Tensor, prior_boxes: tf.Tensor) -> tf.Tensor:
    """Boxes (top, left, bottom, right) within the picture, [..., 4].

    What is cut off at 0 is added at the far side, as the reference has it:
    its scores were measured so.

    Args:
      location: [..., 4], encoded.
      prior_boxes: [..., 4], of the same shape.
    """
    size = prior_boxes[..., 2:]
    centres = prior_boxes[..., :2] + size / 2
    centres += VARIANCES[0] * location[..., :2] * size
    # Unbounded, as in the reference: even infinity ends at the edges.
    size *= tf.exp(VARIANCES[1] * location[..., 2:])
    near = tf.maximum(centres - size / 2, 0.0)
    far = tf.minimum(near + size, 1.0)
    return tf.concat([near[..., ::-1], far[..., ::-1]], -1)
