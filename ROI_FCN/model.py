"""FCN-8s on VGG16 with a valve filter that steers it to a region.

The region of interest (ROI) enters in one place only: its convolution, the
valve, multiplies the features of the first convolution pixel by pixel. Layers
carry the names of the TF1 reference's operations; weights.py has its
variables' names.
"""

from collections.abc import Sequence
from typing import Optional

import tensorflow as tf

MEAN_RGB = (123.68, 116.779, 103.939)  # of the pictures VGG16 was trained on
PIXEL_SPREAD = 60.0  # standard deviation of their channels, about
# Convolutions and width of VGG16's blocks, in units of base_filters.
BLOCKS = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
VGG_LAYERS = tuple(
    f"conv{block}_{number}"
    for block, (count, _) in enumerate(BLOCKS, 1)
    for number in range(1, count + 1)
)
STRIDE = 32  # pixels of the picture per pixel of the deepest map


class Normalize(tf.keras.layers.Layer):
    """RGB in 0..255 to BGR without the mean, as VGG16's weights expect."""

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """[N, H, W, 3] to [N, H, W, 3]."""
        return (images - tf.constant(MEAN_RGB))[..., ::-1]


class Drop(tf.keras.layers.Layer):
    """Inverted dropout by one of the masks that come from outside."""

    def __init__(self, which: int, rate: float, **options) -> None:
        super().__init__(**options)
        self.which, self.rate = which, rate

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """[features [N, h, w, c], masks [N, 2, h, w, c]] to features."""
        features, masks = inputs
        mask = tf.cast(masks[:, self.which], features.dtype)
        return features * (mask / (1.0 - self.rate))

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """That of the features."""
        return input_shape[0]


class MatrixConvolution(tf.keras.layers.Conv2D):
    """A SAME convolution as one product of matrices.

    conv6 has 25088 x 4096 weights and sees a hundred pixels: on a CPU
    oneDNN's convolution spends its time rearranging the weights.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[N, h, w, c] to [N, h, w, filters]."""
        shape, side = tf.shape(inputs), self.kernel_size[0]
        height, width = shape[1], shape[2]
        # For odd kernels; TensorFlow pads even ones more at the end.
        border = [side // 2, (side - 1) // 2]
        padded = tf.pad(inputs, [[0, 0], border, border, [0, 0]])
        # Shifted copies of the map, in the order of the kernel's weights.
        views = [
            padded[:, row : row + height, column : column + width]
            for row in range(side)
            for column in range(side)
        ]
        taps = side**2 * inputs.shape[-1]
        features = tf.matmul(
            tf.reshape(tf.concat(views, -1), [-1, taps]),
            tf.reshape(tf.convert_to_tensor(self.kernel), [taps, -1]),
        )
        features = tf.nn.bias_add(features, tf.convert_to_tensor(self.bias))
        return tf.reshape(
            self.activation(features), [-1, height, width, self.filters]
        )


class UpsampleTo(tf.keras.layers.Layer):
    """Transposed convolution to exactly the size of another map.

    Keras' own layer gives stride x size pixels, which is too many for maps of
    odd size. This one cuts as TF1 did: symmetrically, not at the end alone.
    """

    def __init__(self, filters: int, strides: int, **options) -> None:
        super().__init__(**options)
        self.filters, self.strides = filters, strides

    def build(self, input_shape: Sequence) -> None:
        """Makes the kernel [2 s, 2 s, filters, channels] and the bias."""
        # 4 and 16 pixels, as the reference has them.
        side = 2 * self.strides
        channels = input_shape[0][-1]
        self.kernel = self.add_weight(
            name="kernel",
            shape=(side, side, self.filters, channels),
            initializer=tf.keras.initializers.TruncatedNormal(stddev=0.02),
        )
        self.bias = self.add_weight(
            name="bias", shape=(self.filters,), initializer="zeros"
        )

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """[features [N, h, w, c], like [N, H, W, any]] to [N, H, W, f]."""
        features, like = inputs
        # At run time, for pictures of any size.
        shape = tf.shape(like)
        upsampled = tf.nn.conv2d_transpose(
            features,
            tf.convert_to_tensor(self.kernel),
            [shape[0], shape[1], shape[2], self.filters],
            self.strides,
            "SAME",
        )
        return tf.nn.bias_add(upsampled, tf.convert_to_tensor(self.bias))

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """The size of `like` with `filters` channels."""
        return (*input_shape[1][:3], self.filters)


def _convolution(
    name: str,
    filters: int,
    side: int,
    activation: Optional[str],
    start: str,
    kind: type = tf.keras.layers.Conv2D,
) -> tf.keras.layers.Conv2D:
    """A SAME convolution; `start` names the initialiser of its kernel."""
    # The reference always starts VGG16 from its file, and the layers after it
    # as `reference` does.
    initializers = {
        "he_normal": "he_normal",
        # Pixels are about PIXEL_SPREAD large; what follows should be about 1.
        "pixels": tf.keras.initializers.VarianceScaling(
            2.0 / PIXEL_SPREAD**2, distribution="truncated_normal"
        ),
        "reference": tf.keras.initializers.TruncatedNormal(stddev=0.02),
    }
    return kind(
        filters,
        side,
        padding="same",
        activation=activation,
        kernel_initializer=initializers[start],
        name=name,
    )


def _valve(filters: int, valve_init: str) -> tf.keras.layers.Conv2D:
    """The convolution of the ROI map [N, H, W, 1] to gates [N, H, W, f].

    `reference` starts with gates of about 0.01 and either sign; `identity`
    with gates of about 1, so that the network starts as plain VGG16.
    """
    small = tf.keras.initializers.TruncatedNormal(stddev=0.01)
    return tf.keras.layers.Conv2D(
        filters,
        3,
        padding="same",
        kernel_initializer=small,
        bias_initializer=small if valve_init == "reference" else "ones",
        name="valve",
    )


def _encode(
    images: tf.Tensor, roi: tf.Tensor, filters: int, valve_init: str
) -> list[tf.Tensor]:
    """VGG16's convolutions; returns its maps of stride 8, 16 and 32."""
    # Under a mixed policy too: bfloat16 would round the pixels.
    features = Normalize(dtype="float32", name="normalize")(images)
    # Gates of 0.01 bring pixels to about 1 by themselves.
    start = "he_normal" if valve_init == "reference" else "pixels"
    features = _convolution("conv1_1", filters, 3, None, start)(features)
    gates = _valve(filters, valve_init)(roi)
    features = tf.keras.layers.Multiply(name="gate")([features, gates])
    features = tf.keras.layers.ReLU(name="relu1_1")(features)
    pools = []
    for block, (count, width) in enumerate(BLOCKS, 1):
        for number in range(1, count + 1):
            name = f"conv{block}_{number}"
            if name != "conv1_1":
                features = _convolution(
                    name, filters * width, 3, "relu", "he_normal"
                )(features)
        # SAME: an odd size is rounded up.
        features = tf.keras.layers.MaxPool2D(
            padding="same", name=f"pool{block}"
        )(features)
        pools.append(features)
    return pools[2:]


def create_model(
    num_classes: int = 4,
    base_filters: int = 64,
    fc_channels: int = 4096,
    valve_init: str = "reference",
    dropout: float = 0.5,
    input_size: tuple[Optional[int], Optional[int]] = (None, None),
    for_cpu: bool = False,
) -> tuple[tf.keras.Model, tf.keras.Model]:
    """Builds the network and its twin for training, over the same weights.

    Args:
      num_classes: channels of the logits.
      base_filters: filters of the first convolution; VGG16 has 64.
      fc_channels: channels of conv6 and conv7; VGG16 has 4096.
      valve_init: see _valve.
      dropout: share of conv6's and conv7's outputs that the twin drops.
      input_size: height and width, or None for any size.
      for_cpu: compute conv6 in the way that suits a CPU; see
        MatrixConvolution. Weights and results are the same.

    Returns:
      `network`: [image [N, H, W, 3] in 0..255, ROI [N, H, W, 1] of 0 and 1]
      to logits [N, H, W, num_classes], all float32. `trainer`: the same from
      [image, ROI, masks], masks [N, 2, ceil(H/32), ceil(W/32), fc_channels]
      of 0 and 1 for conv6 and conv7. They come from the data stream rather
      than from a dropout layer, so that a sample is dropped the same way on
      whichever rank and after whichever resume it is seen.
    """
    images = tf.keras.Input((*input_size, 3), name="input_image")
    roi = tf.keras.Input((*input_size, 1), name="ROIMap")
    pool3, pool4, pool5 = _encode(images, roi, base_filters, valve_init)
    kind = MatrixConvolution if for_cpu else tf.keras.layers.Conv2D
    conv6 = _convolution("conv6", fc_channels, 7, "relu", "reference", kind)
    conv7 = _convolution("conv7", fc_channels, 1, "relu", "reference")
    conv8 = _convolution("conv8", num_classes, 1, None, "reference")
    up1 = UpsampleTo(pool4.shape[-1], 2, name="conv_t1")
    up2 = UpsampleTo(pool3.shape[-1], 2, name="conv_t2")
    # The logits are float32 under every precision policy.
    up3 = UpsampleTo(num_classes, 8, dtype="float32", name="conv_t3")
    add = tf.keras.layers.Add

    # Twice over the same layers, which is what makes the twin a twin.
    def decode(masks):
        features = conv6(pool5)
        if masks is not None:
            features = Drop(0, dropout)([features, masks])
        features = conv7(features)
        if masks is not None:
            features = Drop(1, dropout)([features, masks])
        # Raw poolings are added, without score layers or activations.
        fused = add()([up1([conv8(features), pool4]), pool4])
        fused = add()([up2([fused, pool3]), pool3])
        return up3([fused, images])

    mask_size = deepest_size(*input_size)
    masks = tf.keras.Input(
        (2, *mask_size, fc_channels), dtype="uint8", name="dropout_mask"
    )
    network = tf.keras.Model([images, roi], decode(None))
    trainer = tf.keras.Model([images, roi, masks], decode(masks))
    return network, trainer


def deepest_size(
    height: Optional[int], width: Optional[int]
) -> tuple[Optional[int], Optional[int]]:
    """Height and width of conv6's map for a picture's; None stays None."""
    return tuple(side and -(-side // STRIDE) for side in (height, width))
