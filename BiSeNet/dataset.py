"""From a data set on disk to tf.data batches.

The stream of samples is a pure function of (seed, step): integers decide
which picture comes when, and every draw of an augmentation is keyed by the
sample's position in the stream. So a run resumes where it stopped without
replaying anything, and rank r of n takes every n-th sample of one stream.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from BiSeNet import augment
from BiSeNet.layers import FORMS
from BiSeNet.pictures import Picture
from common.npu_config import UserError, data_options

LAST_EPOCH = 2**31  # a stream ends with the training loop, not by itself
# Limits of ours: one pixel of the deepest map, and no mistyped number.
MIN_SIDE, MAX_SIDE = 32, 4096  # pixels of a crop
STRIDE = 32  # a crop of other sides would be padded by the network


def parse_size(text: str, flag: str) -> tuple[int, int]:
    """Height and width from `352,480` or `352x480`."""
    parts = text.replace("x", ",").split(",")
    if len(parts) == 2 and all(part.strip().isdigit() for part in parts):
        height, width = int(parts[0]), int(parts[1])
        if MIN_SIDE <= min(height, width) <= max(height, width) <= MAX_SIDE:
            return height, width
    raise UserError(
        f"--{flag}={text}: height,width in pixels, each {MIN_SIDE}.."
        f"{MAX_SIDE}, such as 352,480"
    )


def fitted_crop(pairs: Sequence[Picture]) -> str:
    """The crop that fits pictures: their median size in whole strides."""
    sides = np.median([pair.size for pair in pairs], axis=0)
    fitted = np.clip(sides // STRIDE * STRIDE, MIN_SIDE, MAX_SIDE)
    return ",".join(str(int(side)) for side in fitted)


def recipe_of(values: dict[str, object]) -> augment.Recipe:
    """The recipe that the flags of a run fix."""
    height, width = parse_size(values["crop_size"], "crop_size")
    return augment.Recipe(
        kind=values["augment"],
        height=height,
        width=width,
        min_scale=values["min_scale"],
        max_scale=values["max_scale"],
        half_pixel=FORMS[values["compat"]].half_pixel,
    )


def index_stream(
    count: int, seed: int, start: int, rank: int, size: int
) -> tf.data.Dataset:
    """The endless stream of (position, index), both int64 scalars.

    Each epoch is a permutation of 0 .. count - 1 of its own.

    Args:
      count: number of pictures.
      seed: of the permutations.
      start: position of the first sample: steps done x pictures per step.
      rank: this process; takes start + rank, then every size-th.
      size: number of processes.
    """

    def epoch_order(epoch):
        # Not Dataset.shuffle, whose state a resumed run would not find again.
        keys = tf.random.stateless_uniform([count], [seed, epoch])
        positions = epoch * count + tf.range(count, dtype=tf.int64)
        order = tf.cast(tf.argsort(keys), tf.int64)
        return tf.data.Dataset.from_tensor_slices((positions, order))

    # Only integers are skipped: no picture is read to be thrown away.
    epochs = tf.data.Dataset.range(start // count, LAST_EPOCH)
    # Dealt out last, since `start` counts the samples of all ranks.
    return epochs.flat_map(epoch_order).skip(start % count).shard(size, rank)


class Files:
    """The pictures of a data set as graph tensors."""

    def __init__(self, pairs: Sequence[Picture]) -> None:
        self.names = tf.constant([pair.name for pair in pairs])
        self.contents = tf.constant([pair.content for pair in pairs])
        self.labels = tf.constant([pair.label for pair in pairs])
        self.sizes = tf.constant([pair.size for pair in pairs])

    def read(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Image [h, w, 3] and label [h, w, 1] of a picture, uint8."""
        content, size = self.contents[index], self.sizes[index]
        image = tf.cond(
            tf.strings.length(content) > 0,
            lambda: tf.reshape(
                tf.io.decode_raw(content, tf.uint8), tf.concat([size, [3]], 0)
            ),
            lambda: tf.io.decode_image(
                tf.io.read_file(self.names[index]), 3, expand_animations=False
            ),
        )
        raw = tf.io.decode_compressed(self.labels[index], "ZLIB")
        label = tf.io.decode_raw(raw, tf.uint8)
        return image, tf.reshape(label, tf.concat([size, [1]], 0))


def training_batches(
    pairs: Sequence[Picture],
    recipe: augment.Recipe,
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    start: int,
    rank: int = 0,
    size: int = 1,
) -> tf.data.Dataset:
    """Endless batches for one rank, static in shape.

    Args:
      pairs: the training pictures.
      recipe: crop and augmentation.
      weights: of the 256 label values in the loss.
      batch_size: pictures per rank and step.
      seed: of order and augmentation.
      start: position in the stream of this step's first sample.
      rank: this process.
      size: number of processes.

    Returns:
      Dicts of `image` [N, H, W, 3] and `label` [N, H, W], see
      augment.augment, and `weight` [N, H, W], float32, of the pixels.
    """
    files, table = Files(pairs), tf.constant(weights, tf.float32)

    def load(position, index):
        # By position, so that a picture comes in another form every epoch.
        key = tf.stack([tf.constant(seed, tf.int64), position])
        sample = augment.augment(*files.read(index), recipe, key)
        sample["weight"] = tf.gather(table, sample["label"])
        return sample

    stream = index_stream(len(pairs), seed, start, rank, size)
    # In order, whichever thread is ready first: positions make the steps.
    data = stream.map(load, tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(batch_size, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())


def evaluation_batches(
    pairs: Sequence[Picture], rank: int = 0, size: int = 1
) -> tf.data.Dataset:
    """Every picture once at its own size, alone in its batch; this rank's."""
    files = Files(pairs)

    def load(index):
        image, label = files.read(index)
        return {
            "image": tf.cast(image, tf.float32),
            "label": tf.cast(label[..., 0], tf.int32),
        }

    # One at a time: pictures may differ in size.
    data = tf.data.Dataset.range(len(pairs)).shard(size, rank)
    data = data.map(load, tf.data.AUTOTUNE).batch(1, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())
