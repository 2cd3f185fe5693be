"""BlitzNet: a ResNet-50 that goes down to 1x1 and up again, with two heads.

Detection and segmentation read the same maps of the way up. Layers carry the
TF1 reference's scopes with dots for slashes, so that weights.py needs no table.
"""

from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

import tensorflow as tf

MEAN_BGR = (103.062623801, 115.902882574, 123.151630838)
EPSILON = 1e-5
PRIORS = 6  # boxes of a cell of a map
# Units and width of ResNet-50's blocks; widths in units of base_filters.
TRUNK = ((3, 1), (4, 2), (6, 4), (3, 8))
EXTRA_UNITS, EXTRA_WIDTH = 2, 8  # of the blocks that go on down
EXPANSION = 4  # output channels of a unit per channel of its 3x3
LARGE = 512  # pixels of side from which on there is an eighth block


class Architecture(NamedTuple):
    """What fixes the variables; see the flags of train.py.

    The defaults are BlitzNet300 x4. `top_fm` of None is 8 base_filters.
    """

    image_size: int = 300
    x4: bool = True
    num_classes: int = 21
    base_filters: int = 64
    top_fm: Optional[int] = None
    n_base_channels: int = 64
    seg_filter_size: int = 1
    head: str = "nonshared"
    resize: str = "bilinear"
    detect: bool = True
    segment: bool = True

    @classmethod
    def of(cls, values: dict[str, object]) -> "Architecture":
        """The architecture that the flags of a run fix."""
        return cls(**{name: values[name] for name in cls._fields})

    def blocks(self) -> int:
        """Number of blocks on the way down."""
        return 8 if self.image_size >= LARGE else 7

    def first_map(self) -> int:
        """The block whose size the finest map of the heads has."""
        return 1 if self.x4 else 2

    def map_sizes(self) -> list[int]:
        """Sides of the heads' maps, finest first; the last is pooled."""
        side = -(-self.image_size // 2)
        sides = []
        for _ in range(self.blocks() - 1):
            side = -(-side // 2)
            sides.append(side)
        return [*sides[self.first_map() - 1 :], 1]

    def segmentation_scope(self) -> str:
        """Scope of the convolution that gives the segmentation's logits."""
        return f"ssd/Conv_{len(self.map_sizes())}"


class Norm(NamedTuple):
    """How batch norm is done.

    Attributes:
      decay: share of the moving statistics that a step keeps.
      frozen: use them in training too, and leave gamma and beta alone.
      mean: means of a list of tensors over the ranks; None for the
        statistics of each rank's own batch.
      ranks: number of ranks.
    """

    decay: float = 0.9
    frozen: bool = False
    mean: Optional[Callable[[list], list]] = None
    ranks: int = 1


TRAINED = Norm()


class Prepare(tf.keras.layers.Layer):
    """RGB in [0, 1] to BGR in 0..255 without the mean, 3 zeros around it."""

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """[N, H, W, 3] to [N, H + 6, W + 6, 3]."""
        centred = images[..., ::-1] * 255.0 - tf.constant(MEAN_BGR)
        return tf.pad(centred, [[0, 0], [3, 3], [3, 3], [0, 0]])

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        """Six more rows and columns."""
        count, height, width, channels = input_shape
        return count, height + 6, width + 6, channels


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
        super().__init__(autocast=False, **options)
        self.filters, self.side, self.norm = filters, side, norm
        self.strides, self.padding, self.relu = strides, padding, relu

    def build(self, input_shape: Sequence) -> None:
        """Makes the kernel [k, k, c, filters] and four vectors [filters]."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.side, self.side, input_shape[-1], self.filters),
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
        features = tf.cast(inputs, self.compute_dtype)
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
        gamma, beta = map(tf.convert_to_tensor, (self.gamma, self.beta))
        if self.norm.mean:
            outputs, mean, variance = self._over_ranks(features, gamma, beta)
        else:
            # The fused kernel's variance is that of TF1: over N - 1.
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

    def _over_ranks(
        self, features: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """As the fused kernel, with the statistics of all ranks' batches."""
        over = _differentiable(self.norm.mean)
        values = tf.cast(features, tf.float32)
        mean = over(tf.reduce_mean(values, [0, 1, 2]))
        centred = values - mean
        # In two passes: mean squares less squared means lose their digits.
        variance = over(tf.reduce_mean(tf.square(centred), [0, 1, 2]))
        scale = gamma * tf.math.rsqrt(variance + EPSILON)
        outputs = tf.cast(centred * scale + beta, features.dtype)
        count = tf.cast(tf.size(values[..., 0]) * self.norm.ranks, tf.float32)
        return outputs, mean, variance * count / tf.maximum(count - 1.0, 1.0)

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


def _differentiable(mean: Callable[[list], list]) -> Callable:
    """The mean over ranks of a tensor, with its gradient.

    Not every adapter has a gradient for its collectives; that of a mean over
    ranks is the mean over ranks of what comes back.
    """

    @tf.custom_gradient
    def over_ranks(tensor):
        return mean([tensor])[0], lambda upstream: mean([upstream])[0]

    return over_ranks


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
        super().__init__(autocast=False, **options)
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
        """[N, h, w, c] to confidence [N, h * w * 6, C] and location [.., 4]."""
        features = tf.cast(inputs, self.compute_dtype)
        kernel = tf.concat([self.location_kernel, self.confidence_kernel], -1)
        bias = tf.concat([self.location_bias, self.confidence_bias], -1)
        kernel = tf.cast(kernel, features.dtype)
        both = tf.nn.conv2d(features, kernel, 1, "SAME")
        both = tf.cast(both, tf.float32) + bias
        split = PRIORS * 4
        boxes = inputs.shape[1] * inputs.shape[2] * PRIORS
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
        super().__init__(filters, side, padding="same", **options)


def _unit(
    scope: str,
    features: tf.Tensor,
    width: int,
    strides: int,
    norm: Norm,
) -> tf.Tensor:
    """A bottleneck unit [N, h, w, c] to [N, h / s, w / s, 4 width].

    The stride sits in the first 1x1, as in Caffe's ResNet-50.
    """
    if strides == 2:
        # Once for the convolution and the shortcut.
        features = Subsample(name=f"{scope}.subsample")(features)
    return _residual(scope, features, features, width, EXPANSION * width, norm)


def _residual(
    scope: str,
    features: tf.Tensor,
    residual: tf.Tensor,
    width: int,
    depth: int,
    norm: Norm,
) -> tf.Tensor:
    """relu(shortcut(features) + bottleneck(residual)), `depth` channels."""
    if features.shape[-1] != depth:
        features = ConvolutionNorm(
            depth, 1, norm, relu=False, name=f"{scope}.shortcut"
        )(features)
    for number, (filters, side) in enumerate(
        ((width, 1), (width, 3), (depth, 1)), 1
    ):
        residual = ConvolutionNorm(
            filters, side, norm, relu=number < 3, name=f"{scope}.conv{number}"
        )(residual)
    total = tf.keras.layers.Add(name=f"{scope}.add")([features, residual])
    return tf.keras.layers.ReLU(name=f"{scope}.relu")(total)


def _down(
    images: tf.Tensor, architecture: Architecture, norm: Norm
) -> list[tf.Tensor]:
    """The maps of blocks 1 to 7 or 8, each half as large as the one before."""
    filters = architecture.base_filters
    # Under a mixed policy too: bfloat16 would round the pixels.
    padded = Prepare(dtype="float32", name="prepare")(images)
    features = ConvolutionNorm(
        filters, 7, norm, 2, "VALID", name="resnet_v1_50.conv1"
    )(padded)
    features = tf.keras.layers.MaxPool2D(3, 2, "same", name="pool1")(features)
    extra = [(EXTRA_UNITS, EXTRA_WIDTH)] * (architecture.blocks() - len(TRUNK))
    maps = []
    for block, (units, width) in enumerate((*TRUNK, *extra), 1):
        root = "resnet_v1_50" if block <= len(TRUNK) else "ssd"
        for unit in range(1, units + 1):
            scope = f"{root}.block{block}.unit_{unit}.bottleneck_v1"
            strides = 2 if unit == 1 and block > 1 else 1
            features = _unit(scope, features, width * filters, strides, norm)
        maps.append(features)
    return maps


def _up(
    maps: list[tf.Tensor], architecture: Architecture, norm: Norm
) -> dict[str, tf.Tensor]:
    """The heads' maps by scope, finest first, from those of `_down`."""
    depth = architecture.top_fm or 8 * architecture.base_filters
    features = maps[-1]
    outputs = {}
    for block in range(len(maps) - 1, architecture.first_map() - 1, -1):
        scope, skip = f"ssd_back.block_rev{block}", maps[block - 1]
        features = ResizeTo(
            skip.shape[1], architecture.resize, name=f"{scope}.resize"
        )(features)
        both = tf.keras.layers.Concatenate(name=f"{scope}.concat")(
            [features, skip]
        )
        if not outputs:
            features = ConvolutionNorm(
                depth, 1, norm, relu=False, name=f"{scope}.shortcut"
            )(features)
            # The reference pools this projection, not the block's output.
            outputs["ssd.pool6"] = tf.keras.layers.GlobalAveragePooling2D(
                name="ssd.pool6"
            )(features)
        features = _residual(scope, features, both, depth // 4, depth, norm)
        outputs[scope] = features
    pooled = tf.keras.layers.Reshape((1, 1, depth), name="ssd.pool6.map")(
        outputs.pop("ssd.pool6")
    )
    return {**dict(reversed(list(outputs.items()))), "ssd.pool6": pooled}


def _detect(
    maps: dict[str, tf.Tensor], architecture: Architecture
) -> dict[str, tf.Tensor]:
    """Confidence [N, A, C] and location [N, A, 4] of all maps."""
    shared = DetectionHead(architecture.num_classes, name="ssd.detection")
    both = []
    for scope, features in maps.items():
        head = shared
        if architecture.head == "nonshared":
            head = DetectionHead(
                architecture.num_classes, name=f"ssd.detection.{scope}"
            )
        both.append(head(features))
    return {
        name: tf.keras.layers.Concatenate(1, dtype="float32", name=name)(parts)
        for name, parts in zip(("confidence", "location"), zip(*both))
    }


def _segment(
    maps: dict[str, tf.Tensor], architecture: Architecture
) -> tf.Tensor:
    """Logits [N, h, h, C] at the size of the finest map."""
    finest = architecture.map_sizes()[0]
    parts = []
    for number, features in enumerate(maps.values()):
        name = f"ssd.Conv_{number}" if number else "ssd.Conv"
        reduced = SegmentationHead(
            architecture.n_base_channels,
            architecture.seg_filter_size,
            activation="relu",
            name=name,
        )(features)
        parts.append(
            ResizeTo(finest, "nearest", name=f"{name}.resize")(reduced)
        )
    logits = SegmentationHead(
        architecture.num_classes,
        3,
        name=architecture.segmentation_scope().replace("/", "."),
    )(tf.keras.layers.Concatenate(name="ssd.concat")(parts))
    return tf.keras.layers.Activation(
        "linear", dtype="float32", name="segmentation"
    )(logits)


def create_model(
    architecture: Architecture, norm: Norm = TRAINED
) -> tf.keras.Model:
    """Builds the network.

    Args:
      architecture: see there.
      norm: how batch norm behaves when training=True.

    Returns:
      RGB [N, S, S, 3] in [0, 1] to a dictionary of what is asked for, float32:
      `confidence` [N, A, C] logits and `location` [N, A, 4] encoded, over the
      A boxes of anchors.priors; `segmentation` [N, h, h, C] logits, h the
      side of the finest map.
    """
    side = architecture.image_size
    images = tf.keras.Input((side, side, 3), name="image")
    maps = _up(_down(images, architecture, norm), architecture, norm)
    outputs = {}
    if architecture.detect:
        outputs.update(_detect(maps, architecture))
    if architecture.segment:
        outputs["segmentation"] = _segment(maps, architecture)
    return tf.keras.Model(images, outputs)
