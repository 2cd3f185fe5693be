"""From a data set on disk to tf.data batches.

The stream of samples is a pure function of (seed, step): integers decide
which picture comes when, and every draw of an augmentation is keyed by the
sample's position in the stream. So a run resumes where it stopped without
replaying anything, and rank r of n takes every n-th sample of one stream.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from common.npu_config import UserError, data_options
from UNet2D import augment
from UNet2D.model import MARGIN
from UNet2D.pictures import Picture

# NVIDIA's number; its published Dice is the mean over them.
FOLDS = 5
LAST_EPOCH = 2**31  # a stream ends with the training loop, not by itself


class Geometry(NamedTuple):
    """What fixes the shapes of a sample; see the flags of train.py."""

    image_size: int
    channels: int
    num_classes: int
    border: str
    resize_rule: str
    ignore_label: int

    @property
    def output_size(self) -> int:
        """Side of the network's output, pixels."""
        return self.image_size - 2 * MARGIN


def geometry_of(values: dict[str, object]) -> Geometry:
    """The geometry that the flags of a run fix."""
    return Geometry(
        image_size=values["image_size"],
        channels=values["in_channels"],
        num_classes=values["num_classes"],
        border=values["border"],
        resize_rule=values["resize_rule"],
        ignore_label=values["ignore_label"],
    )


def fold_runs(fold: str, path: str) -> list[tuple[str, str]]:
    """The folds that --fold means, each with its run folder."""
    folds = [str(number) for number in range(FOLDS)]
    if fold == "all":
        return [(each, os.path.join(path, f"fold{each}")) for each in folds]
    if fold not in [*folds, "none"]:
        raise UserError(f"--fold={fold}: one of {', '.join(folds)}, all, none")
    return [(fold, path)]


def split_fold(
    count: int, fold: str, split: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation pictures.

    Args:
      count: number of pictures.
      fold: "0" .. "4", or "none" to train on all and validate on nothing.
      split: `partition`: five disjoint parts that cover all pictures;
        `reference`: NVIDIA's published split, whose parts overlap because
        int((1 - 0.8) * 30) is 5 where 6 was meant.
      seed: of the shuffle.
    """
    order = np.arange(count)
    if fold == "none":
        return order, order[:0]
    if count < FOLDS:
        raise UserError(
            f"{count} labelled pictures: {FOLDS} folds need at least "
            f"{FOLDS}; add pictures or train on all with --fold=none"
        )
    fold = int(fold)
    np.random.RandomState(seed).shuffle(order)
    if split == "reference":
        order = np.roll(order, fold * int((1.0 - 0.8) * count))
        return np.split(order, [int(0.8 * count)])
    # Unlike equal slices, these cover all pictures for any count.
    parts = np.array_split(order, FOLDS)
    return np.concatenate(parts[:fold] + parts[fold + 1 :]), parts[fold]


def prepare_pictures(
    pairs: Sequence[Picture], geometry: Geometry
) -> dict[str, tf.Tensor]:
    """Scales all pictures to the output size, once.

    Returns:
      `image` [n, side, side, channels] float32, `label` and `valid`
      [n, side, side] uint8: 6 bytes per output pixel and picture.
    """
    # As bytes, since pictures of different sizes make no array.
    pixels = tf.constant([pair.pixels.tobytes() for pair in pairs])
    labels = tf.constant([pair.label.tobytes() for pair in pairs])
    sizes = tf.constant([pair.label.shape for pair in pairs], tf.int32)
    side, channels = geometry.output_size, geometry.channels

    def prepare(pixels, label, size):
        picture = tf.reshape(
            tf.io.decode_raw(pixels, tf.uint8),
            tf.concat([size, [channels]], 0),
        )
        return augment.prepare(
            picture,
            tf.reshape(tf.io.decode_raw(label, tf.uint8), size),
            side,
            geometry.num_classes,
            geometry.resize_rule,
            geometry.ignore_label,
        )

    data = tf.data.Dataset.from_tensor_slices((pixels, labels, sizes))
    data = data.map(prepare, tf.data.AUTOTUNE).batch(len(pairs))
    return dict(zip(("image", "label", "valid"), next(iter(data))))


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


def _bordered_sample(
    prepared: dict[str, tf.Tensor], index: tf.Tensor, geometry: Geometry
) -> tf.Tensor:
    """Picture number `index` as one map of the network's input size."""
    sample = augment.stack_sample(
        prepared["image"][index],
        prepared["label"][index],
        prepared["valid"][index],
        geometry.num_classes,
    )
    side = geometry.output_size
    maps = geometry.channels + geometry.num_classes + 1
    sample = tf.ensure_shape(sample, [side, side, maps])
    return augment.add_border(sample, MARGIN, geometry.border)


def training_batches(
    prepared: dict[str, tf.Tensor],
    geometry: Geometry,
    augmentation: str,
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
      prepared: of prepare_pictures.
      geometry: shapes.
      augmentation: see augment.augment.
      mask_shape: [h, w, c] of the dropout mask.
      dropout: share of the bottleneck that is dropped.
      batch_size: pictures per rank and step.
      seed: of order, augmentation and dropout.
      start: position in the stream of this step's first sample.
      rank: this process.
      size: number of processes.

    Returns:
      Dicts of `image`, `label`, `valid` (see augment.split_sample) and
      `dropout_mask` [N, h, w, c] of 0 and 1 / (1 - dropout).
    """
    count = int(prepared["image"].shape[0])

    def load(position, index):
        sample = _bordered_sample(prepared, index, geometry)
        key = tf.stack([tf.constant(seed, tf.int64), position])
        sample = augment.augment(sample, geometry.channels, augmentation, key)
        # Dropout is drawn here, by position too: the network has no state of
        # its own that a resumed run would have to find again.
        keep = tf.random.stateless_uniform(mask_shape, key) >= dropout
        parts = augment.split_sample(sample, geometry.num_classes, MARGIN)
        parts["dropout_mask"] = tf.cast(keep, tf.float32) / (1.0 - dropout)
        return parts

    stream = index_stream(count, seed, start, rank, size)
    # In order, whichever thread is ready first: positions make the steps.
    data = stream.map(load, tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(batch_size, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())


def evaluation_batches(
    prepared: dict[str, tf.Tensor],
    geometry: Geometry,
    rank: int = 0,
    size: int = 1,
) -> tf.data.Dataset:
    """Every picture once, alone in its batch; this rank's share."""
    count = int(prepared["image"].shape[0])

    def load(index):
        sample = _bordered_sample(prepared, index, geometry)
        return augment.split_sample(sample, geometry.num_classes, MARGIN)

    # One at a time: no last batch is short, and shapes stay static.
    data = tf.data.Dataset.range(count).shard(size, rank)
    data = data.map(load, tf.data.AUTOTUNE).batch(1, drop_remainder=True)
    return data.prefetch(tf.data.AUTOTUNE).with_options(data_options())
