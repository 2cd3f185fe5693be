"""MobileNetV2 up to its last bottleneck, for small machines.

As DeepLab uses it: without the 1280 features before ImageNet's classifier.
Layers carry the TF1 reference's variable scopes, with dots for slashes.
"""

from typing import Optional

import tensorflow as tf

from DeepLabv3plus.layers import BatchNorm, Convolution
from DeepLabv3plus.xception import kernel_initializer

SCOPE = "MobilenetV2"
EXPANSION = 6  # of all bottlenecks but the first, which has none
# Filters and stride of the bottlenecks.
# As in table 2 of the paper, arXiv 1801.04381.
BOTTLENECKS = (
    (16, 1),
    *((24, 2), (24, 1)),
    *((32, 2), (32, 1), (32, 1)),
    *((64, 2), (64, 1), (64, 1), (64, 1)),
    *((96, 1), (96, 1), (96, 1)),
    *((160, 2), (160, 1), (160, 1)),
    (320, 1),
)


class Builder:
    """Makes layers of one width, initialisation and batch norm."""

    def __init__(
        self, _: str, multiplier: float, initializer: str, norm: BatchNorm
    ) -> None:
        """Takes what xception.Builder takes; there is one variant only."""
        self.multiplier, self.initializer = multiplier, initializer
        self.norm = norm

    def width(self, filters: int) -> int:
        """A width times the depth multiplier."""
        return max(1, int(filters * self.multiplier + 0.5))

    def convolve(
        self,
        features: tf.Tensor,
        name: str,
        filters: Optional[int],
        side: int,
        **options,
    ) -> tf.Tensor:
        """A convolution with batch norm; depthwise if `filters` is None."""
        return Convolution(
            filters,
            side,
            self.norm,
            kernel_initializer(self.initializer, filters, side, 0.09),
            # TensorFlow's own padding here, unlike Xception's.
            same=True,
            name=f"{SCOPE}/{name}".replace("/", "."),
            **options,
        )(features)

    def bottleneck(
        self,
        inputs: tf.Tensor,
        number: int,
        filters: int,
        stride: int,
        rate: int,
    ) -> tf.Tensor:
        """Expansion, depthwise convolution, linear projection, shortcut."""
        name = f"expanded_conv_{number}" if number else "expanded_conv"
        features, relu6 = inputs, tf.nn.relu6
        if number:
            features = self.convolve(
                features,
                f"{name}/expand",
                EXPANSION * inputs.shape[-1],
                1,
                after=relu6,
            )
        features = self.convolve(
            features,
            f"{name}/depthwise",
            None,
            3,
            strides=stride,
            rate=rate,
            after=relu6,
        )
        filters = self.width(filters)
        if stride == 1 and filters == inputs.shape[-1]:
            features = [features, inputs]
        # Without activation: the paper's linear bottleneck.
        return self.convolve(features, f"{name}/project", filters, 1)


def mobilenet_v2(
    images: tf.Tensor, builder: Builder, output_stride: int
) -> tuple[tf.Tensor, dict[int, tf.Tensor]]:
    """Normalised images [N, H, W, 3] to features [N, H/os, W/os, 320].

    Also returns the features that the decoder may take: none.
    """
    features = builder.convolve(
        images, "Conv", builder.width(32), 3, strides=2, after=tf.nn.relu6
    )
    stride, rate = 2, 1
    for number, (filters, own_stride) in enumerate(BOTTLENECKS):
        # Past the output stride, holes in the kernels replace strides.
        if stride == output_stride:
            features = builder.bottleneck(features, number, filters, 1, rate)
            rate *= own_stride
        else:
            features = builder.bottleneck(
                features, number, filters, own_stride, 1
            )
            stride *= own_stride
    return features, {}
