"""From a data set on disk to tf.data batches.

The stream of samples is a pure function of (seed, step): integers decide
which picture comes when, and every draw of an augmentation is keyed by the
sample's position in the stream. So a run resumes where it stopped without
replaying anything, and rank r of n takes every n-th sample of one stream.
"""

from collections.abc import Sequence

import tensorflow as tf

from common.npu_config import UserError, data_options
from DeepLabv3plus import augment
from DeepLabv3plus.pictures import JPEG_START, Picture

LAST_EPOCH = 2**31  # a stream ends with the training loop, not by itself
# Our own bounds, against slips of the keyboard; both are 16 k + 1, the sides
# at which corners stay on corners through all strides.
MIN_SIDE, MAX_SIDE = 33, 4097  # pixels of a crop


def parse_size(text: str, flag: str) -> tuple[int, int]:
    """Height and width from `513,513` or `513x513`."""
    parts = text.replace("x", ",").split(",")
    if len(parts) == 2 and all(part.strip().isdigit() for part in parts):
        height, width = int(parts[0]), int(parts[1])
        if MIN_SIDE <= min(height, width) <= max(height, width) <= MAX_SIDE:
            return height, width
    raise UserError(
        f"--{flag}={text}: height,width in pixels, each {MIN_SIDE}.."
        f"{MAX_SIDE}, such as 513,513"
    )


def recipe_of(values: dict[str, object]) -> augment.Recipe:
    """The recipe that the flags of a run fix."""
    return augment.Recipe(
        values["augment"],
        *parse_size(values["train_crop_size"], "train_crop_size"),
        values["ignore_label"],
        values["min_scale_factor"],
        values["max_scale_factor"],
        values["scale_factor_step_size"],
        values["min_resize_value"],
        values["max_resize_value"],
        values["resize_factor"],
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
        # What is made here is an input of the graphs that use it; made inside
        # a mapped function it would count towards GraphDef's limit of 2 GB.
        self.names = tf.constant([pair.name for pair in pairs])
        self.contents = tf.constant([pair.content for pair in pairs])
        self.labels = tf.constant([pair.label for pair in pairs])
        self.sizes = tf.constant([pair.size for pair in pairs])

    def read(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Image [h, w, 3] and label [h, w, 1] of a picture, uint8."""
        content, size = self.contents[index], self.sizes[index]
        # Read at every visit: decoded pictures would fill a small memory.
        content = tf.cond(
            tf.strings.length(content) > 0,
            lambda: content,
            lambda: tf.io.read_file(self.names[index]),
        )
        image = tf.cond(
            tf.strings.substr(content, 0, len(JPEG_START)) == JPEG_START,
            lambda: tf.io.decode_jpeg(content, 3),
            lambda: _unpack(content, tf.concat([size, [3]], 0)),
        )
        label = _unpack(self.labels[index], tf.concat([size, [1]], 0))
        return tf.ensure_shape(image, [None, None, 3]), label


def _unpack(content: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """The array of uint8 that pictures.pack has packed."""
    raw = tf.io.decode_compressed(content, "ZLIB")
    return tf.reshape(tf.io.decode_raw(raw, tf.uint8), shape)


def training_batches(
    pairs: Sequence[Picture],
    recipe: augment.Recipe,
    mask_shape: Sequence[int],
    dropout: float,
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
      mask_shape: [h, w, c] of the dropout mask of a sample.
      dropout: share that it drops.
      batch_size: pictures per rank and step.
      seed: of order, augmentation and dropout.
      start: position in the stream of this step's first sample.
      rank: this process.
      size: number of processes.

    Returns:
      Dicts of `image`, `label`, `valid` (see augment.finish_sample) and
      `dropout_mask` [N, h, w, c], uint8 of 0 and 1.
    """
    files = Files(pairs)

    def load(position, index):
        key = tf.stack([tf.constant(seed, tf.int64), position])
        sample = augment.augment(*files.read(index), recipe, key)
        # Dropout is drawn here, by position too: the network has no state of
        # its own that a resumed run would have to find again.
        # By the key turned round, or it would begin with augment's draws.
        keep = tf.random.stateless_uniform(mask_shape, key[::-1]) >= dropout
        sample["dropout_mask"] = tf.cast(keep, tf.uint8)
        return sample

    stream = index_stream(len(pairs), seed, start, rank, size)
    # In order, whichever thread is ready first: positions make the steps.
    data = stream.map(load, tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(batch_size, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())


def evaluation_batches(
    pairs: Sequence[Picture],
    ignore_label: int,
    rank: int = 0,
    size: int = 1,
) -> tf.data.Dataset:
    """Every picture once, alone in its batch, at its own size.

    This rank's share; see augment.finish_sample for what a batch holds.
    """
    files = Files(pairs)

    def load(index):
        image, label = files.read(index)
        valid = augment.counted(label, ignore_label)
        image = tf.cast(image, tf.float32)
        return augment.finish_sample(image, label, valid)

    # One at a time: pictures differ in size.
    data = tf.data.Dataset.range(len(pairs)).shard(size, rank)
    data = data.map(load, tf.data.AUTOTUNE).batch(1, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())
