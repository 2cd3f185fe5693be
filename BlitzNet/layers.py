"""The layers of BlitzNet that Keras has not.

They cast by themselves where float32 is needed under every precision policy,
and tell their output's shape, since Keras would trace them to find it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import tensorflow as tf

from common import npu_config

# The reference's mean; ImageNet's usual one is 103.939, 116.779, 123.68.
MEAN_BGR = (103.062623801, 115.902882574, 123.151630838)
# Of batch norm, as in the reference; Keras has 1e-3 unless told.
EPSILON = 1e-5
# As anchors.priors makes them: one for each of its aspects, and a square.
PRIORS = 6  # boxes of a cell of a map


class Norm(NamedTuple):
    """How batch norm is done.

    Attributes:
      decay: share of the moving statistics that a step keeps.
      frozen: use them in training too, and leave gamma and beta alone.
      runtime: of the ranks whose batches are taken as one; None for the
        statistics of each rank's own batch.
    """

    decay: float = 0.9
    frozen: bool = False
    runtime: Optional[npu_config.Runtime] = None


class Prepare(tf.keras.layers.Layer):
    """RGB in [0, 1] to BGR in 0..255 without the mean, 3 zeros around it."""

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """[N, H, W, 3] to [N, H + 6, W + 6, 3]."""
        centred = images[..., ::-1] * 255.0 - tf.constant(MEAN_BGR)
        # Padded last, so that the border has the mean's colour.
        return tf.pad(centred, [[0, 0], [3, 3], [3, 3], [0, 0]])

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """Six more rows and columns."""
        count, height, width, channels = input_shape
        return count, height + 6, width + 6, channels


def arithmetic() -> str:
    """The dtype in which layers compute that cast by themselves."""
    return tf.keras.mixed_precision.global_policy().compute_dtype


class ConvolutionNorm(tf.keras.layers.Layer):
    """Convolution without bias, batch norm and, unless linear, ReLU.

    One layer, since Keras takes its time for each. It casts by itself: its
    statistics are float32 under every precision policy.
    """

    def __init__(
        self,
        filters: int,
        side: int,
        norm: Norm,
        strides: int = 1,
        padding: str = "SAME",
        relu: bool = True,
        **options,
    ) -> None:
        # With autocast Keras would widen bfloat16 maps on their way in.
        super().__init__(dtype="float32", autocast=False, **options)
        self.arithmetic = arithmetic()
        self.filters, self.side, self.norm = filters, side, norm
        self.strides, self.padding, self.relu = strides, padding, relu

    def build(self, input_shape: Sequence) -> None:
        """Makes the kernel [k, k, c, filters] and four vectors [filters]."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.side, self.side, input_shape[-1], self.filters),
            # TF-Slim's for the reference: truncated normal by fan-in.
            initializer=tf.keras.initializers.VarianceScaling(2.0),
        )
        for name, start, trained in (
            ("gamma", "ones", not self.norm.frozen),
            ("beta", "zeros", not self.norm.frozen),
            ("moving_mean", "zeros", False),
            ("moving_variance", "ones", False),
        ):
            variable = self.add_weight(
                name=name,
                shape=(self.filters,),
                initializer=start,
                trainable=trained,
            )
            setattr(self, name, variable)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """[N, h, w, c] to [N, h / strides, w / strides, filters]."""
        features = tf.cast(inputs, self.arithmetic)
        kernel = tf.convert_to_tensor(self.kernel)
        if training and not self.norm.frozen:
            features = self._normalize(self._convolve(features, kernel))
        else:
            # Folded into the kernel: one pass over the map less.
            scale = self.gamma * tf.math.rsqrt(self.moving_variance + EPSILON)
            shift = self.beta - self.moving_mean * scale
            features = self._convolve(features, kernel * scale)
            features = tf.nn.bias_add(features, tf.cast(shift, features.dtype))
        return tf.nn.relu(features) if self.relu else features

    def _convolve(self, features: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Convolves in the dtype of the features."""
        kernel = tf.cast(kernel, features.dtype)
        return tf.nn.conv2d(features, kernel, self.strides, self.padding)

    def _normalize(self, features: tf.Tensor) -> tf.Tensor:
        """Normalises by the batch's statistics, and remembers them."""
        # The kernel takes these in float32 alone, for maps of 16 bits too.
        gamma, beta = map(tf.convert_to_tensor, (self.gamma, self.beta))
        # The moving variance is that of TF1: over N - 1.
        if self.norm.runtime:
            outputs, mean, variance = self.norm.runtime.batch_norm(
                features, gamma, beta, self.moving_mean, EPSILON
            )
        else:
            outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
                features, gamma, beta, epsilon=EPSILON
            )
        for moving, batch in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            kept = self.norm.decay * tf.convert_to_tensor(moving)
            moving.assign(kept + (1.0 - self.norm.decay) * batch)
        return outputs

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """[N, h, w, filters]."""
        count, height, width, _ = input_shape
        border = 0 if self.padding == "SAME" else self.side - 1
        return (
            count,
            -(-(height - border) // self.strides),
            -(-(width - border) // self.strides),
            self.filters,
        )


class Subsample(tf.keras.layers.Layer):
    """Every second pixel, which is all that a 1x1 of stride 2 sees."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[N, h, w, c] to [N, ceil(h / 2), ceil(w / 2), c]."""
        return inputs[:, ::2, ::2]

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """Half the sides, rounded up."""
        count, height, width, channels = input_shape
        return count, -(-height // 2), -(-width // 2), channels


def resize(pixels: tf.Tensor, size: Sequence, method: str) -> tf.Tensor:
    """[N, h, w, c] to [N, *size, c], as TF1's resize_images did.

    It takes pixel i of n from i * h / n: the pictures shift by half a pixel,
    and weights that were trained so need it so.
    """
    # tf.image.resize of TF2 samples at pixel centres and has no way back.
    kernel = {
        "bilinear": tf.raw_ops.ResizeBilinear,
        "nearest": tf.raw_ops.ResizeNearestNeighbor,
    }[method]
    return kernel(images=pixels, size=size)


class ResizeTo(tf.keras.layers.Layer):
    """Resizes maps to a fixed side; see `resize`."""

    def __init__(self, side: int, method: str, **options) -> None:
        super().__init__(**options)
        self.side, self.method = side, method

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[N, h, w, c] to [N, side, side, c]."""
        # The kernels' gradients know no bfloat16.
        values = tf.cast(inputs, tf.float32)
        resized = resize(values, [self.side, self.side], self.method)
        return tf.cast(resized, inputs.dtype)

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """The side given, for height and width."""
        return input_shape[0], self.side, self.side, input_shape[3]


class DetectionHead(tf.keras.layers.Layer):
    """Class and place of the PRIORS boxes of each cell of a map.

    Both 3x3 convolutions as one: they read the same map.
    """

    def __init__(self, num_classes: int, **options) -> None:
        super().__init__(dtype="float32", autocast=False, **options)
        self.arithmetic = arithmetic()
        self.num_classes = num_classes

    def build(self, input_shape: Sequence) -> None:
        """Makes kernels [3, 3, c, 6 * 4] and [3, 3, c, 6 * C], and biases."""
        for name, values in (
            ("location", 4),
            ("confidence", self.num_classes),
        ):
            kernel = self.add_weight(
                name=f"{name}_kernel",
                shape=(3, 3, input_shape[-1], PRIORS * values),
                # The reference's factor for these heads; elsewhere it is 2.
                initializer=tf.keras.initializers.VarianceScaling(0.1),
            )
            bias = self.add_weight(
                name=f"{name}_bias",
                shape=(PRIORS * values,),
                initializer="zeros",
            )
            setattr(self, f"{name}_kernel", kernel)
            setattr(self, f"{name}_bias", bias)

    def call(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """[N, h, w, c] to confidence [N, A, C] and location [N, A, 4]."""
        features = tf.cast(inputs, self.arithmetic)
        kernel = tf.concat([self.location_kernel, self.confidence_kernel], -1)
        bias = tf.concat([self.location_bias, self.confidence_bias], -1)
        kernel = tf.cast(kernel, features.dtype)
        both = tf.nn.conv2d(features, kernel, 1, "SAME")
        both = tf.cast(both, tf.float32) + bias
        split = PRIORS * 4
        boxes = inputs.shape[1] * inputs.shape[2] * PRIORS
        # By row, column and prior: the order of anchors.priors.
        return (
            tf.reshape(both[..., split:], [-1, boxes, self.num_classes]),
            tf.reshape(both[..., :split], [-1, boxes, 4]),
        )

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """The shapes of both."""
        count, height, width, _ = input_shape
        boxes = height * width * PRIORS
        return (count, boxes, self.num_classes), (count, boxes, 4)


class SegmentationHead(tf.keras.layers.Conv2D):
    """A SAME convolution with bias, of the segmentation head."""

    def __init__(self, filters: int, side: int, **options) -> None:
        # Keras' own initialiser, Glorot's uniform, is the reference's here.
        super().__init__(filters, side, padding="same", **options)
