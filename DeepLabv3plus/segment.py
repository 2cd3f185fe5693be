"""Pictures of any size to class probabilities.

A picture smaller than the crop is padded; over a larger one the crop slides,
and where windows overlap their probabilities are averaged. So the network
sees one size per scale, which an NPU needs and which keeps the memory small.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from DeepLabv3plus import augment
from DeepLabv3plus.augment import MEAN_PIXEL
from DeepLabv3plus.layers import resize_bilinear

# Our own choice: the reference takes no picture larger than its crop.
OVERLAP = 3  # neighbouring windows share at least a third of their sides


class Plan(NamedTuple):
    """How pictures are segmented.

    Attributes:
      crop: height and width that the network sees, pixels.
      stride: of the logits, see model.Shape.
      scales: of the crop, over which probabilities are averaged.
      mirrored: average over mirrored crops too.
      recipe: of training, which may bring pictures to a range of sizes.
    """

    crop: tuple[int, int]
    stride: int
    scales: tuple[float, ...]
    mirrored: bool
    recipe: augment.Recipe


def scale_side(side: int, scale: float) -> int:
    """A side at another scale such that corners stay on pixels."""
    # The reference's scale_dimension, which cuts off and does not round.
    return int((side - 1.0) * scale + 1.0)


def average_probabilities(
    network: tf.keras.Model, images: tf.Tensor, plan: Plan
) -> tf.Tensor:
    """Mean of the probabilities at all scales, [N, H, W, C], float32.

    `images` are [N, H, W, 3] in 0..255, of the plan's crop.
    """
    parts = []
    for scale in plan.scales:
        sides = [scale_side(side, scale) for side in plan.crop]
        scaled = resize_bilinear(images, sides)
        share = max(1.0, scale) / plan.stride
        sides = [scale_side(side, share) for side in plan.crop]
        for mirrored in (False, True)[: 1 + plan.mirrored]:
            seen = scaled[:, :, ::-1] if mirrored else scaled
            logits = network(seen, training=False)
            # In two steps where the scale is small, as the reference does.
            logits = resize_bilinear(logits, sides)
            logits = logits[:, :, ::-1] if mirrored else logits
            parts.append(tf.nn.softmax(resize_bilinear(logits, plan.crop)))
    # The reference takes another softmax of this mean, which flattens it.
    return tf.add_n(parts) / len(parts)


def window_starts(side: int, crop: int) -> list[int]:
    """Where windows of `crop` pixels begin that cover `side` pixels."""
    step = crop - crop // OVERLAP
    count = 1 + max(0, -(-(side - crop) // step))
    # Spread evenly, or the last window might nearly cover its neighbour.
    starts = np.linspace(0, max(side - crop, 0), count)
    return [int(round(start)) for start in starts]


class Segmenter:
    """A network that takes pictures of any size."""

    def __init__(self, network: tf.keras.Model, plan: Plan) -> None:
        self.network, self.plan = network, plan
        # One signature for all windows: any further one would be compiled.
        signature = [tf.TensorSpec((1, *plan.crop, 3), tf.float32)]
        # Not a decorator: an NPU replaces tf.function when it is opened.
        self.window = tf.function(self._window, signature, autograph=False)

    def _window(self, images: tf.Tensor) -> tf.Tensor:
        """One crop, [1, h, w, 3] to [1, h, w, C]."""
        return average_probabilities(self.network, images, self.plan)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Probabilities [h, w, C] of a picture [h, w, 3] in 0..255."""
        own = picture.shape[:2]
        size = augment.range_size(tf.constant(own), self.plan.recipe).numpy()
        if tuple(size) != own:
            picture = augment.resize_image(picture, size).numpy()
        probabilities = self._slide(picture)
        if tuple(size) != own:
            probabilities = augment.resize_image(probabilities, own).numpy()
        return probabilities

    def _slide(self, picture: np.ndarray) -> np.ndarray:
        """The same for a picture at the scale that the network is to see."""
        (height, width), (tall, wide) = picture.shape[:2], self.plan.crop
        missing = (max(tall - height, 0), max(wide - width, 0))
        padded = np.pad(
            picture.astype(np.float32),
            ((0, missing[0]), (0, missing[1]), (0, 0)),
            constant_values=MEAN_PIXEL,
        )
        # Memory grows with the picture: 12 megapixels of 21 classes are 1 GB
        # of sums.
        sums, counts = 0.0, np.zeros((*padded.shape[:2], 1), np.float32)
        for top in window_starts(padded.shape[0], tall):
            for left in window_starts(padded.shape[1], wide):
                rows, columns = (
                    slice(top, top + tall),
                    slice(left, left + wide),
                )
                part = self.window(padded[np.newaxis, rows, columns]).numpy()
                if not counts.any():
                    sums = np.zeros((*counts.shape[:2], part.shape[-1]), "f4")
                sums[rows, columns] += part[0]
                counts[rows, columns] += 1.0
        return (sums / counts)[:height, :width]
