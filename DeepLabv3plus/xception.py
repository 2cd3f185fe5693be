"""Xception as DeepLab changed it: with strided convolutions, and deeper.

Layers carry the TF1 reference's variable scopes, with dots for slashes.
"""

from typing import NamedTuple, Optional

import tensorflow as tf

from DeepLabv3plus.layers import BatchNorm, Convolution

# Units of the middle flow: DeepLab's number, and that of the first Xception.
MIDDLE_UNITS = {"xception_65": 16, "xception_41": 8}


class Block(NamedTuple):
    """Units of three separable convolutions each.

    Attributes:
      name: its scope.
      units: how many.
      depths: filters of the three.
      stride: of the last unit's last convolution.
      skip: "conv", "sum" or "none".
      inner: activations after each convolution instead of before each pair.
    """

    name: str
    units: int
    depths: tuple[int, int, int]
    stride: int
    skip: str
    inner: bool = False


# Where the decoder takes its features from: the second convolution of the
# block that ends at the next larger stride, before any activation.
DECODER_BLOCKS = {
    4: "entry_flow/block2",
    8: "entry_flow/block3",
    16: "exit_flow/block1",
}


def blocks_of(variant: str) -> tuple[Block, ...]:
    """The blocks of a variant, as in figure 4 of the paper."""
    units = MIDDLE_UNITS[variant]
    return (
        Block("entry_flow/block1", 1, (128, 128, 128), 2, "conv"),
        Block("entry_flow/block2", 1, (256, 256, 256), 2, "conv"),
        Block("entry_flow/block3", 1, (728, 728, 728), 2, "conv"),
        Block("middle_flow/block1", units, (728, 728, 728), 1, "sum"),
        Block("exit_flow/block1", 1, (728, 1024, 1024), 2, "conv"),
        Block("exit_flow/block2", 1, (1536, 1536, 2048), 1, "none", True),
    )


def scaled_filters(filters: int, multiplier: float) -> int:
    """A width times the depth multiplier, a multiple of 8."""
    return max(8, 8 * round(filters * multiplier / 8))


class Builder:
    """Makes layers of one scope, width, initialisation and batch norm."""

    def __init__(
        self,
        variant: str,
        multiplier: float,
        initializer: str,
        norm: BatchNorm,
    ) -> None:
        self.variant, self.norm = variant, norm
        self.multiplier, self.initializer = multiplier, initializer

    def convolve(
        self,
        features: tf.Tensor,
        name: str,
        filters: Optional[int],
        side: int,
        **options,
    ) -> tf.Tensor:
        """A convolution with batch norm; depthwise if `filters` is None."""
        if filters:
            filters = scaled_filters(filters, self.multiplier)
        return Convolution(
            filters,
            side,
            self.norm,
            kernel_initializer(self.initializer, filters, side, 0.09),
            name=f"{self.variant}/{name}".replace("/", "."),
            **options,
        )(features)

    def unit(
        self,
        inputs: tf.Tensor,
        name: str,
        block: Block,
        stride: int,
        rate: int,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One unit; also returns its second convolution's output."""
        name = f"{name}/xception_module"
        after = tf.nn.relu if block.inner else None
        before = None if block.inner else tf.nn.relu
        features, taps, skip = inputs, [], inputs
        if block.skip == "conv":
            # From the bare input: the shortcut sees no ReLU.
            skip = self.convolve(
                inputs, f"{name}/shortcut", block.depths[-1], 1, strides=stride
            )
        for number, depth in enumerate(block.depths, 1):
            last = number == len(block.depths)
            scope = f"{name}/separable_conv{number}"
            features = self.convolve(
                features,
                f"{scope}_depthwise",
                None,
                3,
                # The stride lives in the last one.
                strides=stride if last else 1,
                rate=rate,
                before=before,
                after=after,
            )
            if last and block.skip != "none":
                features = [features, skip]
            features = self.convolve(
                features, f"{scope}_pointwise", depth, 1, after=after
            )
            taps.append(features)
        return features, taps[1]


def kernel_initializer(
    kind: str, filters: Optional[int], side: int, spread: float
) -> tf.keras.initializers.Initializer:
    """Of a kernel: the reference's truncated normal, or He's by its inputs.

    Args:
      kind: "reference" or "fan_in".
      filters: None for a depthwise kernel, each of which sees one channel.
      side: of the kernel, pixels.
      spread: the reference's standard deviation; 0 means Glorot's uniform.
    """
    initializers = tf.keras.initializers
    if kind == "fan_in" and filters:
        return initializers.VarianceScaling(2.0)
    if kind == "fan_in":
        # Keras would take the channels of a depthwise kernel for inputs too.
        return initializers.TruncatedNormal(stddev=(2.0 / side**2) ** 0.5)
    if spread:
        return initializers.TruncatedNormal(stddev=spread)
    return initializers.GlorotUniform()


def xception(
    images: tf.Tensor, builder: Builder, output_stride: int
) -> tuple[tf.Tensor, dict[int, tf.Tensor]]:
    """Normalised images [N, H, W, 3] to features [N, H/os, W/os, 2048].

    Also returns the features that the decoder may take, by their stride.
    """
    relu = tf.nn.relu
    features = builder.convolve(
        images, "entry_flow/conv1_1", 32, 3, strides=2, after=relu
    )
    features = builder.convolve(
        features, "entry_flow/conv1_2", 64, 3, after=relu
    )
    stride, rate, taps = 2, 1, {}
    for block in blocks_of(builder.variant):
        # Past the output stride, holes in the kernels replace strides.
        dilated = stride == output_stride
        own_stride, own_rate = (1, rate) if dilated else (block.stride, 1)
        for number in range(1, block.units + 1):
            features, tap = builder.unit(
                features,
                f"{block.name}/unit_{number}",
                block,
                own_stride,
                own_rate,
            )
        if dilated:
            rate *= block.stride
        else:
            stride *= block.stride
        taps[block.name] = tap
    return features, {
        stride: taps[name] for stride, name in DECODER_BLOCKS.items()
    }
