"""From a data set on disk to tf.data batches.

The stream of samples is a pure function of (seed, step): integers decide
which picture comes when, and every draw of an augmentation is keyed by the
sample's position in the stream. So a run resumes where it stopped without
replaying anything, and rank r of n takes every n-th sample of one stream.
"""

import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from BlitzNet import augment, pictures
from BlitzNet.model import Architecture
from BlitzNet.pictures import Picture
from common.npu_config import data_options

LAST_EPOCH = 2**31  # a stream ends with the training loop, not by itself


def recipe_of(values: dict[str, object]) -> augment.Recipe:
    """The recipe that the flags of a run fix."""
    architecture = Architecture.of(values)
    return augment.Recipe(
        kind=values["augment"],
        image_size=architecture.image_size,
        map_size=architecture.map_sizes()[0],
        zoomout_prob=values["zoomout_prob"],
        zero_canvas=values["compat"] == "reference",
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
    """The pictures of a data set as graph tensors, decoded when asked for."""

    def __init__(self, pairs: Sequence[Picture]) -> None:
        paths = [pair.path for pair in pairs]
        ends = {path: os.path.getsize(path) for path in set(paths)}
        spans = [(*pair.span, ends[pair.path]) for pair in pairs]
        objects = [pair.objects for pair in pairs]
        self.paths = tf.constant(paths)
        self.spans = tf.constant(spans, tf.int64)
        self.kinds = tf.constant([pair.kind for pair in pairs])
        self.contents = tf.constant([pair.content for pair in pairs])
        self.masks = tf.constant([pair.mask for pair in pairs])
        self.sizes = tf.constant([pair.size for pair in pairs], tf.int32)
        # One after the other: pictures differ in how many objects they have.
        counts = [len(each.labels) for each in objects]
        self.starts = tf.constant(np.cumsum([0, *counts]))
        self.boxes = tf.constant(np.concatenate([e.boxes for e in objects]))
        self.labels = tf.constant(np.concatenate([e.labels for e in objects]))

    def read(self, index: tf.Tensor) -> augment.Sample:
        """A picture with what belongs to it, unaugmented."""
        shape = tf.concat([self.sizes[index], [3]], 0)
        # Read at every visit: decoded pictures would fill a small memory.
        image = tf.switch_case(
            self.kinds[index],
            {
                pictures.JPEG: lambda: tf.io.decode_jpeg(self._span(index), 3),
                pictures.RAW: lambda: _array(self._span(index), shape),
                pictures.PACKED: lambda: _array(
                    _inflate(self.contents[index]), shape
                ),
            },
        )
        part = slice(self.starts[index], self.starts[index + 1])
        return augment.Sample(
            tf.cast(image, tf.float32) / 255.0,
            self.read_mask(index),
            self.boxes[part],
            self.labels[part],
        )

    def read_mask(self, index: tf.Tensor) -> tf.Tensor:
        """The mask of a picture, [h, w, 1] uint8."""
        content, size = self.masks[index], self.sizes[index]
        shape = tf.concat([size, [1]], 0)
        missing = tf.cast(augment.UNLABELLED, tf.uint8)
        return tf.cond(
            tf.strings.length(content) > 0,
            lambda: _array(_inflate(content), shape),
            lambda: tf.fill(shape, missing),
        )

    def _span(self, index: tf.Tensor) -> tf.Tensor:
        """The bytes of a file in which a picture lies."""
        offset, length, end = tf.unstack(self.spans[index])
        # TFRecords hold many pictures, and TensorFlow reads whole files, but
        # for records of a fixed length after a header.
        return tf.data.FixedLengthRecordDataset(
            self.paths[index], length, offset, end - offset - length
        ).get_single_element()


def _inflate(content: tf.Tensor) -> tf.Tensor:
    """The bytes that pictures.pack has packed."""
    return tf.io.decode_compressed(content, "ZLIB")


def _array(content: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Bytes as an array of uint8."""
    return tf.reshape(tf.io.decode_raw(content, tf.uint8), shape)


def training_batches(
    pairs: Sequence[Picture],
    recipe: augment.Recipe,
    prior_boxes: np.ndarray,
    batch_size: int,
    seed: int,
    start: int,
    rank: int = 0,
    size: int = 1,
) -> tf.data.Dataset:
    """Endless batches for one rank, static in shape.

    Args:
      pairs: the training pictures.
      recipe: sizes and augmentation.
      prior_boxes: [A, 4]; see anchors.priors.
      batch_size: pictures per rank and step.
      seed: of order and augmentation.
      start: position in the stream of this step's first sample.
      rank: this process.
      size: number of processes.

    Returns:
      Dicts of augment.finish_sample.
    """
    files = Files(pairs)

    def load(position, index):
        key = tf.stack([tf.constant(seed, tf.int64), position])
        sample = augment.augment(files.read(index), recipe, key)
        return augment.finish_sample(sample, recipe, tf.constant(prior_boxes))

    stream = index_stream(len(pairs), seed, start, rank, size)
    # In order, whichever thread is ready first: positions make the steps.
    data = stream.map(load, tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(batch_size, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())


def evaluation_batches(
    pairs: Sequence[Picture], image_size: int, rank: int = 0, size: int = 1
) -> tf.data.Dataset:
    """Every picture once, alone in its batch; this rank's share.

    Returns:
      Dicts of `image` [1, S, S, 3] in [0, 1], `mask` [1, h, w] int32 at the
      picture's own size, augment.UNLABELLED where it does not count, and
      `index` [1] among the pairs.
    """
    files = Files(pairs)

    def load(index):
        sample = files.read(index)
        return {
            "image": augment.resize_image(sample.image, image_size),
            "mask": tf.cast(sample.mask[..., 0], tf.int32),
            "index": index,
        }

    # One at a time: pictures differ in size.
    data = tf.data.Dataset.range(len(pairs)).shard(size, rank)
    data = data.map(load, tf.data.AUTOTUNE).batch(1, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())
