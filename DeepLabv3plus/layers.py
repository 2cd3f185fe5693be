"""The few kinds of layers of which the networks are built.

A convolution and its batch norm are one layer here, as they are one variable
scope in the TF1 reference. It holds float32 variables under every precision
policy and computes in the precision of what comes in.
"""

from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

import tensorflow as tf

from common import npu_config


def ceil_div(size: Optional[int], stride: int) -> Optional[int]:
    """Pixels of a map of `size` after a stride; an unknown size stays so."""
    return None if size is None else -(-size // stride)


def first_of(inputs: object) -> object:
    """The first of several inputs, or of their shapes; one alone is itself."""
    several = isinstance(inputs, (list, tuple))
    return inputs[0] if several and not _is_shape(inputs) else inputs


def _is_shape(value: Sequence) -> bool:
    """True for the shape of one map, such as (None, 65, 65, 32)."""
    return all(side is None or isinstance(side, int) for side in value)


def own_size(features: tf.Tensor) -> list:
    """Height and width of a map: numbers where they are known."""
    dynamic = tf.shape(features)
    return [
        dynamic[axis] if side is None else side
        for axis, side in enumerate(features.shape)
        if axis in (1, 2)
    ]


def resize_bilinear(images: tf.Tensor, size: Sequence) -> tf.Tensor:
    """[N, h, w, c] to [N, *size, c], corners on corners, in its own type."""
    known = not tf.is_tensor(size) and not any(map(tf.is_tensor, size))
    if known and tuple(images.shape[1:3]) == tuple(size):
        return images
    # tf.image.resize, like Keras' layers, puts centres on centres instead:
    # upsampled logits would be off by a quarter of their maximum.
    resized = tf.raw_ops.ResizeBilinear(
        images=images, size=size, align_corners=True
    )
    # The op gives float32 whatever it takes.
    return tf.cast(resized, images.dtype)


def resize_nearest(ids: tf.Tensor, size: Sequence) -> tf.Tensor:
    """[N, h, w, c] to [N, *size, c]; no value is made up."""
    return tf.raw_ops.ResizeNearestNeighbor(
        images=ids, size=size, align_corners=True
    )


class OwnPrecision(tf.keras.layers.Layer):
    """A layer that reads its variables in float32 and casts by itself.

    Keras would read them in the policy's precision, and a batch norm's
    statistics lose too much in bfloat16.
    """

    def __init__(self, **options) -> None:
        # With autocast Keras would cast what comes in to float32 as well.
        super().__init__(dtype="float32", autocast=False, **options)


class Normalize(OwnPrecision):
    """Pixels in 0..255 to -1..1, in the policy's precision."""

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """[N, H, W, 3] to [N, H, W, 3]."""
        policy = tf.keras.mixed_precision.global_policy()
        # The reference's formula: padding of 127.5 becomes exactly 0.
        return tf.cast((2.0 / 255.0) * images - 1.0, policy.compute_dtype)

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """The shape of the images."""
        return tuple(input_shape)


class BatchNorm(NamedTuple):
    """How the batch norms of a network work.

    Attributes:
      trained: use and collect the batch's statistics in training; otherwise
        the stored ones are used and never move.
      decay: of the collected statistics, per step.
      runtime: of the ranks whose batches are taken as one; None for the
        statistics of each rank's own batch.
    """

    trained: bool = False
    # The reference's: statistics follow over some 3300 steps, which is too
    # slow for short runs from random weights.
    decay: float = 0.9997
    runtime: Optional[npu_config.Runtime] = None


class Convolution(OwnPrecision):
    """Convolution, batch norm and activation; dense or depthwise.

    Frozen batch norm is folded into the kernel: scaling weights is cheaper
    than scaling maps, in both directions. Strides of 3x3 kernels pad one
    pixel on each side, which TensorFlow's SAME does for odd sizes alone,
    unless `same` asks for the latter.
    """

    def __init__(
        self,
        filters: Optional[int],
        side: int,
        norm: BatchNorm,
        initializer: tf.keras.initializers.Initializer,
        epsilon: float = 1e-3,
        strides: int = 1,
        rate: int = 1,
        before: Optional[Callable[[tf.Tensor], tf.Tensor]] = None,
        after: Optional[Callable[[tf.Tensor], tf.Tensor]] = None,
        same: bool = False,
        **options,
    ) -> None:
        """`filters` is None for a depthwise convolution.

        `before` and `after` are activations of what comes in and goes out.
        """
        super().__init__(**options)
        self.filters, self.side, self.norm = filters, side, norm
        self.initializer, self.epsilon = initializer, epsilon
        self.strides, self.rate = strides, rate
        self.before, self.after, self.same = before, after, same

    def build(self, input_shape: Sequence) -> None:
        """Makes the kernel and the four variables of the batch norm."""
        channels = first_of(input_shape)[-1]
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.side, self.side, channels, self.filters or 1),
            initializer=self.initializer,
        )
        for name, start, trainable in (
            ("gamma", "ones", True),
            ("beta", "zeros", True),
            ("moving_mean", "zeros", False),
            ("moving_variance", "ones", False),
        ):
            variable = self.add_weight(
                name=name,
                shape=(self.filters or channels,),
                initializer=start,
                trainable=trainable,
            )
            setattr(self, name, variable)

    def call(
        self, inputs: tf.Tensor, training: Optional[bool] = None
    ) -> tf.Tensor:
        """[N, h, w, c] to [N, h / strides, w / strides, filters].

        A second input, a skip connection, is added to what comes out.
        """
        features, skip = first_of(inputs), None
        if features is not inputs:
            skip = inputs[1]
        if self.before is not None:
            features = self.before(features)
        kernel = tf.convert_to_tensor(self.kernel)
        # Keras 2.6 hands over a placeholder while it builds the model.
        if self.norm.trained and training is True:
            features = self._normalize(self._convolve(features, kernel))
            features = features if skip is None else features + skip
        else:
            # Frozen ones get here whatever `training` says: in Keras 3 a whole
            # model's value replaces the one that its layers were built with.
            gamma, beta, mean, variance = map(
                tf.convert_to_tensor,
                (
                    self.gamma,
                    self.beta,
                    self.moving_mean,
                    self.moving_variance,
                ),
            )
            scale = gamma * tf.math.rsqrt(variance + self.epsilon)
            offset = beta - mean * scale
            # A depthwise kernel has its channels in the last axis but one.
            factors = scale if self.filters else scale[:, tf.newaxis]
            features = self._convolve(features, kernel * factors)
            # Before the offset: TensorFlow 2.18 fails to fuse the other order
            # and then fuses nothing in the whole graph.
            features = features if skip is None else features + skip
            features = tf.nn.bias_add(
                features, tf.cast(offset, features.dtype)
            )
        return features if self.after is None else self.after(features)

    def _convolve(self, features: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """The bare convolution, in the precision of the features."""
        kernel = tf.cast(kernel, features.dtype)
        padding = "SAME"
        # TensorFlow refuses strides together with holes, and no network here
        # has both, so that the border needs no rate.
        if self.strides > 1 and self.side > 1 and not self.same:
            border = [self.side // 2] * 2
            features = tf.pad(features, [[0, 0], border, border, [0, 0]])
            padding = "VALID"
        if self.filters:
            return tf.nn.conv2d(
                features, kernel, self.strides, padding, dilations=self.rate
            )
        return tf.nn.depthwise_conv2d(
            features,
            kernel,
            [1, self.strides, self.strides, 1],
            padding,
            dilations=[self.rate, self.rate],
        )

    def _normalize(self, features: tf.Tensor) -> tf.Tensor:
        """Batch norm by the batch's statistics, which are collected."""
        gamma, beta = map(tf.convert_to_tensor, (self.gamma, self.beta))
        if self.norm.runtime:
            features, mean, variance = self.norm.runtime.batch_norm(
                features, gamma, beta, self.moving_mean, self.epsilon
            )
        else:
            # TF1's kernel: it collects the reference's variance, and Keras 3
            # has many small ops in its place.
            features, mean, variance = tf.compat.v1.nn.fused_batch_norm(
                features, gamma, beta, epsilon=self.epsilon
            )
        share = 1.0 - self.norm.decay
        for collected, new in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            old = tf.convert_to_tensor(collected)
            collected.assign_add(share * (tf.stop_gradient(new) - old))
        return features

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """Sizes are rounded up."""
        batch, height, width, channels = first_of(input_shape)
        return (
            batch,
            ceil_div(height, self.strides),
            ceil_div(width, self.strides),
            self.filters or channels,
        )


class Resize(OwnPrecision):
    """Bilinear, corners on corners, to the size of another map or picture.

    With a `stride` the size is that of the picture divided by it, rounded up.
    """

    def __init__(self, stride: int = 1, **options) -> None:
        super().__init__(**options)
        self.stride = stride

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """[features [N, h, w, c], like [N, H, W, any]] to [N, H', W', c]."""
        features, like = inputs
        size = [-(-side // self.stride) for side in own_size(like)]
        return resize_bilinear(features, size)

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """The size of `like` by the stride, the channels of the features."""
        (batch, *_, channels), like = input_shape
        sizes = (ceil_div(side, self.stride) for side in like[1:3])
        return (batch, *sizes, channels)


class GlobalMean(OwnPrecision):
    """The mean over a map, as a map of one pixel."""

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """[N, h, w, c] to [N, 1, 1, c]."""
        wide = tf.cast(features, tf.float32)
        # The reference pools over its crop, which is the same for pictures of
        # that size; eight bits of bfloat16 are too few for such a sum.
        mean = tf.reduce_mean(wide, [1, 2], keepdims=True)
        return tf.cast(mean, features.dtype)

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """One pixel."""
        return (input_shape[0], 1, 1, input_shape[-1])


class Drop(OwnPrecision):
    """Inverted dropout by a mask that comes from outside."""

    def __init__(self, rate: float, **options) -> None:
        super().__init__(**options)
        self.rate = rate

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """[features [N, h, w, c], mask [N, h, w, c]] to features."""
        features, mask = inputs
        return features * (tf.cast(mask, features.dtype) / (1.0 - self.rate))

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """That of the features."""
        return tuple(input_shape[0])


class Classifier(OwnPrecision):
    """A 1x1 convolution with a bias; its logits are float32 always."""

    def __init__(self, classes: int, **options) -> None:
        super().__init__(**options)
        self.classes = classes

    def build(self, input_shape: Sequence) -> None:
        """Makes the kernel [1, 1, c, classes] and the bias."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=(1, 1, input_shape[-1], self.classes),
            initializer=tf.keras.initializers.TruncatedNormal(stddev=0.01),
        )
        self.bias = self.add_weight(
            name="bias", shape=(self.classes,), initializer="zeros"
        )

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """[N, h, w, c] to [N, h, w, classes]."""
        kernel = tf.cast(tf.convert_to_tensor(self.kernel), features.dtype)
        # In the precision of the features, which is faster; what follows, the
        # bias and the losses, is float32.
        logits = tf.nn.conv2d(features, kernel, 1, "SAME")
        bias = tf.convert_to_tensor(self.bias)
        return tf.cast(logits, tf.float32) + bias

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """As many channels as classes."""
        return (*input_shape[:-1], self.classes)
