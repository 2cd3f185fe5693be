"""The 2015 U-Net with valid convolutions, as NVIDIA's UNet_Medical builds it.

An n x n input gives n - 184 logits: every 3x3 convolution eats its border, so
that only the up-convolutions feel where a tile ends. Layers carry the names of
the TF1 reference, which makes the checkpoint table of weights.py trivial.
"""

from collections.abc import Sequence
from typing import Optional

import tensorflow as tf

from common.npu_config import UserError

MARGIN = 92  # pixels that the network eats on each side
STRIDE = 16  # four poolings: legal sides are 16 k + 60
# Cropping of each skip connection, deepest first: sums of the borders eaten
# below it, the same for every legal input size.
SKIP_CROPS = (4, 16, 40, 88)


def check_input_side(side: int, what: str) -> None:
    """Raises UserError unless `side` pixels is 16 k + 60 with k >= 8."""
    lower = max((side - 60) // STRIDE, 8) * STRIDE + 60
    if side != lower:
        nearest = (
            f"{lower}" if side < lower else f"{lower} or {lower + STRIDE}"
        )
        raise UserError(
            f"{what} is {side}: the network takes 16 k + 60 pixels, "
            f"at least 188; the nearest legal size is {nearest}"
        )


def covering_side(output_side: int) -> int:
    """The smallest legal input side whose output covers `output_side`."""
    return -(-max(output_side - 4, 0) // STRIDE) * STRIDE + 4 + 2 * MARGIN


class _Namer:
    """Numbers layers in creation order, as TF1's tf.layers did."""

    def __init__(self, initializer: str) -> None:
        self.initializer = initializer
        self.counts = {}

    def __call__(self, base: str) -> str:
        count = self.counts.get(base, 0)
        self.counts[base] = count + 1
        return f"{base}_{count}" if count else base

    def convolutions(self, features: tf.Tensor, filters: int) -> tf.Tensor:
        """Two valid 3x3 convolutions: [N, h, w, c] to [N, h-4, w-4, f]."""
        for _ in range(2):
            # Valid padding: the border is eaten rather than made up.
            features = tf.keras.layers.Conv2D(
                filters,
                3,
                activation="relu",
                kernel_initializer=self.initializer,
                name=self("conv2d"),
            )(features)
        return features

    def upsample(self, features: tf.Tensor, filters: int) -> tf.Tensor:
        """Doubles the map: [N, h, w, c] to [N, 2h, 2w, filters]."""
        # 3x3 with ReLU as NVIDIA has it; the paper has 2x2 without.
        return tf.keras.layers.Conv2DTranspose(
            filters,
            3,
            strides=2,
            padding="same",
            activation="relu",
            kernel_initializer=self.initializer,
            name=self("conv2d_transpose"),
        )(features)


def _encode(
    images: tf.Tensor, filters: int, namer: _Namer
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Returns the bottleneck [N, h, w, 16 f] and four skips, deepest first."""
    features, skips = images, []
    for level in range(4):
        features = namer.convolutions(features, filters << level)
        skips.insert(0, features)
        features = tf.keras.layers.MaxPool2D(2)(features)
    return namer.convolutions(features, filters << 4), skips


def _create_decoder(
    bottleneck: tf.Tensor,
    skips: Sequence[tf.Tensor],
    filters: int,
    num_classes: int,
    namer: _Namer,
) -> tf.keras.Model:
    """A model from [bottleneck, skips...] to logits [N, H, W, classes]."""
    inputs = [
        tf.keras.Input(tensor.shape[1:]) for tensor in [bottleneck, *skips]
    ]
    features = inputs[0]
    for level, (skip, crop) in enumerate(zip(inputs[1:], SKIP_CROPS)):
        width = filters << (3 - level)
        features = namer.upsample(features, width)
        cropped = tf.keras.layers.Cropping2D(crop)(skip)
        # The order matters to checkpoints: upsampled first, skip second.
        features = tf.keras.layers.Concatenate()([features, cropped])
        features = namer.convolutions(features, width)
    # The logits are float32 under every precision policy.
    logits = tf.keras.layers.Conv2D(
        num_classes,
        1,
        kernel_initializer=namer.initializer,
        dtype="float32",
        name=namer("conv2d"),
    )(features)
    return tf.keras.Model(inputs, logits, name="decoder")


def create_model(
    num_classes: int = 2,
    in_channels: int = 1,
    base_filters: int = 64,
    initializer: str = "glorot_uniform",
    input_size: tuple[Optional[int], Optional[int]] = (None, None),
) -> tuple[tf.keras.Model, tf.keras.Model]:
    """Builds the network and its twin for training, over the same weights.

    Args:
      num_classes: channels of the logits.
      in_channels: channels of the images.
      base_filters: filters of the first level; they double at each level.
      initializer: of the kernels; `glorot_uniform` is the reference's,
        `he_normal` the paper's.
      input_size: height and width, or None for any legal size.

    Returns:
      `network`: images [N, H, W, in_channels] in [-1, 1] to logits
      [N, H - 184, W - 184, num_classes], float32. `trainer`: the same from
      [images, dropout_mask], where the mask [N, H/16 - 7.75, ...] multiplies
      the bottleneck. It comes from the data stream rather than from a
      dropout layer, so that a sample is dropped the same way on whichever
      rank and after whichever resume it is seen.
    """
    # The decoder is a model of its own because it is used twice: after the
    # bottleneck as it is, and after the bottleneck with the mask.
    namer = _Namer(initializer)
    images = tf.keras.Input((*input_size, in_channels), name="images")
    bottleneck, skips = _encode(images, base_filters, namer)
    decoder = _create_decoder(
        bottleneck, skips, base_filters, num_classes, namer
    )
    mask = tf.keras.Input(bottleneck.shape[1:], name="dropout_mask")
    dropped = tf.keras.layers.Multiply()([bottleneck, mask])
    network = tf.keras.Model(images, decoder([bottleneck, *skips]))
    trainer = tf.keras.Model([images, mask], decoder([dropped, *skips]))
    return network, trainer


def bottleneck_shape(image_size: int, base_filters: int) -> tuple[int, ...]:
    """Height, width and channels of the dropout mask of one sample."""
    side = (image_size - 60) // STRIDE - 4
    return side, side, base_filters << 4
