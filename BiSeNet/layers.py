"""The layers that BiSeNet's parts are made of, named by TF1 scopes.

A layer's name is its scope in the TF1 reference with dots for slashes;
weights.py makes the names of variables from it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import tensorflow as tf

from common.npu_config import Runtime

EPSILON = 1.001e-5  # TF1's fused kernel raises the reference's 1e-5 to this
MAX_PIXEL = 255.0
# Kernel initialisers.
# Keras makes up for the spread that a truncated normal loses, as TF1 did by
# 1.3 times the variance: the two differ by 0.6 per cent.
STARTS = {
    "kaiming": ("fan_in", "truncated_normal", 2.0),
    "xavier": ("fan_avg", "uniform", 1.0),
}


class Form(NamedTuple):
    """What --compat decides.

    Attributes:
      half_pixel: resizes keep the centre of the picture where it is, instead
        of TF1's shift to the upper left.
      stray_relu: gates pass a ReLU before their sigmoid.
      gamma: batch norms of Xception39 have a scale.
      centred: pixels come as -1..1 instead of 0..1.
    """

    half_pixel: bool
    stray_relu: bool
    gamma: bool
    centred: bool


FORMS = {
    "paper": Form(True, False, True, True),
    "reference": Form(False, True, False, False),
}


def sides_of(maps: tf.Tensor) -> list:
    """Height and width: numbers where they are known, else scalars."""
    # Numbers keep a graph of one size free of operations on shapes.
    dynamic = tf.unstack(tf.shape(maps)[1:3])
    return [
        scalar if side is None else side
        for side, scalar in zip(maps.shape[1:3], dynamic)
    ]


class Normalize(tf.keras.layers.Layer):
    """RGB in 0..255 to the range that the form of the network takes."""

    def __init__(self, centred: bool, **options) -> None:
        super().__init__(**options)
        self.centred = centred

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """[N, H, W, 3] to [N, H, W, 3]."""
        # The range that slim's ImageNet networks were trained on.
        if self.centred:
            return images * (2.0 / MAX_PIXEL) - 1.0
        return images / MAX_PIXEL

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """That of the input."""
        return tuple(input_shape)


class PadToMultiple(tf.keras.layers.Layer):
    """Adds zeros below and to the right up to a multiple of `side`."""

    def __init__(self, side: int, **options) -> None:
        super().__init__(**options)
        self.side = side

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """[N, h, w, c] to [N, H, W, c]."""
        height, width = (-side % self.side for side in sides_of(images))
        border = [[0, 0], [0, height], [0, width], [0, 0]]
        return tf.pad(images, border)

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """The next multiples; None stays None."""
        count, *sides, channels = input_shape
        sides = [side and side + -side % self.side for side in sides]
        return (count, *sides, channels)


class CropLike(tf.keras.layers.Layer):
    """Cuts off what PadToMultiple has added."""

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """[maps [N, H, W, c], like [N, h, w, any]] to [N, h, w, c]."""
        maps, like = inputs
        height, width = sides_of(like)
        return maps[:, :height, :width]

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """The size of `like` with the channels of the maps."""
        maps, like = input_shape
        return (*like[:3], maps[-1])


class Upsample(tf.keras.layers.Layer):
    """Bilinear resize by a whole factor, with TF1's pixel grid or today's."""

    def __init__(self, factor: int, half_pixel: bool, **options) -> None:
        super().__init__(**options)
        self.factor, self.half_pixel = factor, half_pixel

    def call(self, maps: tf.Tensor) -> tf.Tensor:
        """[N, h, w, c] to [N, factor * h, factor * w, c], float32."""
        # The raw op: tf.image.resize has today's grid only.
        return tf.raw_ops.ResizeBilinear(
            images=maps,
            size=self.factor * tf.shape(maps)[1:3],
            half_pixel_centers=self.half_pixel,
        )

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """Both sides times the factor; None stays None."""
        count, *sides, channels = input_shape
        sides = [side and side * self.factor for side in sides]
        return (count, *sides, channels)


class BatchNorm(tf.keras.layers.Layer):
    """Batch norm by TensorFlow's fused kernel, its averages as in TF1.

    Keras 3 writes batch norm out in single operations, which costs a tenth
    of a training step. Under several ranks the moments are those of the whole
    batch.
    """

    def __init__(
        self,
        scale: bool = True,
        start: str = "ones",
        # The reference's decay and epsilon; those of Keras are 0.99 and 1e-3.
        decay: float = 0.9,
        epsilon: float = EPSILON,
        runtime: Optional[Runtime] = None,
        **options,
    ) -> None:
        """`start`: initialiser of gamma; `runtime`: of ranks to join."""
        # Statistics stay float32 while the features come as they are.
        super().__init__(dtype="float32", autocast=False, **options)
        self.scale, self.start = scale, start
        self.decay, self.epsilon = decay, epsilon
        self.runtime = runtime

    def build(self, input_shape: Sequence) -> None:
        """Makes gamma (if `scale`), beta and the moving moments, all [c]."""
        shape = (input_shape[-1],)
        self.gamma = None
        if self.scale:
            self.gamma = self.add_weight(
                name="gamma", shape=shape, initializer=self.start
            )
        self.beta = self.add_weight(
            name="beta", shape=shape, initializer="zeros"
        )
        self.moving_mean, self.moving_variance = (
            self.add_weight(
                name=name, shape=shape, initializer=start, trainable=False
            )
            for name, start in (
                ("moving_mean", "zeros"),
                ("moving_variance", "ones"),
            )
        )

    def call(
        self, features: tf.Tensor, training: Optional[bool] = None
    ) -> tf.Tensor:
        """[N, h, w, c] to the same; in training by the batch's moments."""
        beta = tf.convert_to_tensor(self.beta)
        # The kernel asks for a gamma also where the layer has none.
        gamma = tf.ones_like(beta)
        if self.gamma is not None:
            gamma = tf.convert_to_tensor(self.gamma)
        if not training:
            return tf.compat.v1.nn.fused_batch_norm(
                features,
                gamma,
                beta,
                tf.convert_to_tensor(self.moving_mean),
                tf.convert_to_tensor(self.moving_variance),
                self.epsilon,
                is_training=False,
            )[0]
        # This variance is the unbiased one, which TF1 averages as well; the
        # features are normalised by the biased one.
        if self.runtime:
            features, mean, variance = self.runtime.batch_norm(
                features, gamma, beta, self.moving_mean, self.epsilon
            )
        else:
            features, mean, variance = tf.compat.v1.nn.fused_batch_norm(
                features, gamma, beta, epsilon=self.epsilon
            )
        self._remember(mean, variance)
        return features

    def _remember(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Moves the averages that inference uses towards a batch's."""
        for average, new in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            before = tf.convert_to_tensor(average)
            average.assign(before + (1.0 - self.decay) * (new - before))

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """That of the input."""
        return tuple(input_shape)


class Builder:
    """Adds layers to a network by their TF1 scopes.

    Attributes:
      form: what --compat decides.
      norm: options of every batch norm, such as its decay.
    """

    def __init__(self, form: Form, **norm) -> None:
        self.form, self.norm = form, norm

    def conv(
        self,
        features: tf.Tensor,
        scope: str,
        filters: int,
        side: int = 1,
        stride: int = 1,
        start: str = "kaiming",
        **options,
    ) -> tf.Tensor:
        """A SAME convolution without bias, unless `options` say otherwise."""
        mode, distribution, scale = STARTS[start]
        options = {"padding": "same", "use_bias": False, **options}
        # An initialiser for each layer: one that is reused draws the same
        # numbers again in Keras 3.
        return tf.keras.layers.Conv2D(
            filters,
            side,
            stride,
            kernel_initializer=tf.keras.initializers.VarianceScaling(
                scale, mode, distribution
            ),
            name=scope,
            **options,
        )(features)

    def depthwise(
        self, features: tf.Tensor, scope: str, stride: int, start: str
    ) -> tf.Tensor:
        """A SAME 3x3 convolution of each channel by itself, without bias."""
        # The fan counts 9 numbers of every channel, as it did in TF1, though
        # each output is a sum of 9.
        mode, distribution, scale = STARTS[start]
        return tf.keras.layers.DepthwiseConv2D(
            3,
            stride,
            padding="same",
            use_bias=False,
            depthwise_initializer=tf.keras.initializers.VarianceScaling(
                scale, mode, distribution
            ),
            name=scope,
        )(features)

    def batch_norm(
        self, features: tf.Tensor, scope: str, **options
    ) -> tf.Tensor:
        """Batch norm with this network's options, or `options` instead."""
        return BatchNorm(name=scope, **{**self.norm, **options})(features)

    def conv_norm_relu(
        self,
        features: tf.Tensor,
        scope: str,
        norm: str,
        filters: int,
        side: int,
        stride: int = 1,
        **options,
    ) -> tf.Tensor:
        """Convolution, batch norm of scope `norm`, ReLU."""
        features = self.conv(features, scope, filters, side, stride, **options)
        return relu(self.batch_norm(features, norm))

    def upsample(self, features: tf.Tensor, factor: int) -> tf.Tensor:
        """Bilinear, in the form's pixel grid."""
        # Float32 under every policy: logits pass here last.
        layer = Upsample(factor, self.form.half_pixel, dtype="float32")
        return layer(features)


def relu(features: tf.Tensor, top: Optional[float] = None) -> tf.Tensor:
    """The part above 0, and below `top` if there is one."""
    return tf.keras.layers.ReLU(top)(features)


def max_pool(features: tf.Tensor) -> tf.Tensor:
    """Half the size, by 3x3 maxima."""
    return tf.keras.layers.MaxPool2D(3, 2, padding="same")(features)
