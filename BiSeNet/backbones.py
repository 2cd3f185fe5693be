"""The frontends of the context path, down to 1/32 of the picture.

Scopes are the TF1 reference's, and those of slim's ImageNet checkpoints.
Each function gives the maps of stride 16 and 32.
"""

from typing import Callable, NamedTuple

import tensorflow as tf

from BiSeNet.layers import Builder, max_pool, relu

Maps = tuple[tf.Tensor, tf.Tensor]

# The reference's table. With it the network has 2.4 M parameters where the
# paper counts 5.8 M: figures of the one say little of the other.
XCEPTION_STAGES = ((4, 16), (8, 32), (4, 64))  # blocks and channels / 4
# Expansion, channels, blocks and first stride; slim's table, as far as used.
MOBILENET_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 1, 2),
)
MOBILENET_EPSILON = 1e-3  # slim's, which its checkpoints were trained with


def xception39(make: Builder, images: tf.Tensor) -> Maps:
    """Xception39: 128 channels of stride 16, 256 of stride 32."""
    scale, scope = make.form.gamma, "xception39"
    features = make.conv(images, f"{scope}.pool1", 8, 3, 2, "xavier")
    features = make.batch_norm(features, f"{scope}.pool1_bn1", scale=scale)
    features = max_pool(relu(features))
    outputs = []
    for stage, (blocks, channels) in enumerate(XCEPTION_STAGES, 1):
        for block in range(1, blocks + 1):
            name = f"{scope}.stage{stage}.block{block}"
            features = _xception_block(make, features, name, channels)
        outputs.append(features)
    # Detail of stride 8 is what the spatial path is for.
    return outputs[1], outputs[2]


def _xception_block(
    make: Builder, features: tf.Tensor, scope: str, channels: int
) -> tf.Tensor:
    """Three separable convolutions beside a shortcut."""
    count = 0

    def separable(inputs, filters, stride, start="ones"):
        nonlocal count
        suffix = f"_{count}" if count else ""
        count += 1
        name = f"{scope}.SeparableConv2d{suffix}"
        maps = make.depthwise(inputs, name, stride, "xavier")
        # Nothing comes between the two, unlike in MobileNetV2.
        maps = make.conv(maps, f"{name}.pointwise", filters, start="xavier")
        return make.batch_norm(
            maps,
            f"{scope}.BatchNorm{suffix}",
            scale=make.form.gamma,
            start=start,
        )

    # TF1 numbered layers as they were made: the shortcut has to stay first.
    first = scope.endswith("block1")
    stride = 2 if first else 1
    shortcut = features
    if first:
        shortcut = separable(features, 4 * channels, stride)
    residual = relu(separable(features, channels, stride))
    residual = relu(separable(residual, channels, 1))
    # With gamma 0 a block starts as its shortcut, which trains faster.
    residual = separable(residual, 4 * channels, 1, "zeros")
    return relu(tf.keras.layers.Add()([residual, shortcut]))


def resnet_v2(make: Builder, images: tf.Tensor, units: tuple, scope: str):
    """slim's ResNet v2: 512 channels of stride 16, 2048 of stride 32."""
    # No batch norm follows, since each unit begins with its own. Where none
    # follows, here and below, slim has a bias.
    features = _conv_same(make, images, f"{scope}.conv1", 64, 7, use_bias=True)
    features = max_pool(features)
    outputs = []
    for block, count in enumerate(units, 1):
        for unit in range(1, count + 1):
            # slim strides at the end of a block, not at its beginning.
            stride = 2 if unit == count and block < len(units) else 1
            name = f"{scope}.block{block}.unit_{unit}.bottleneck_v2"
            features = _bottleneck(make, features, name, 32 * 2**block, stride)
        outputs.append(features)
    last = relu(make.batch_norm(outputs[3], f"{scope}.postnorm"))
    # Not block 3, whose last unit strides: its map has stride 32 already.
    return outputs[1], last


def _bottleneck(
    make: Builder, features: tf.Tensor, scope: str, channels: int, stride: int
) -> tf.Tensor:
    """Batch norm and ReLU come first; what is added up has neither."""
    before = relu(make.batch_norm(features, f"{scope}.preact"))
    if features.shape[-1] == 4 * channels:
        shortcut = features
        if stride > 1:
            # slim's way to drop every other pixel; it has no weights.
            shortcut = tf.keras.layers.MaxPool2D(1, stride)(features)
    else:
        shortcut = make.conv(
            before, f"{scope}.shortcut", 4 * channels, 1, stride, use_bias=True
        )
    residual = make.conv_norm_relu(
        before, f"{scope}.conv1", f"{scope}.conv1.BatchNorm", channels, 1
    )
    residual = _conv_same(
        make, residual, f"{scope}.conv2", channels, 3, stride
    )
    residual = relu(make.batch_norm(residual, f"{scope}.conv2.BatchNorm"))
    residual = make.conv(
        residual, f"{scope}.conv3", 4 * channels, use_bias=True
    )
    return tf.keras.layers.Add()([shortcut, residual])


def _conv_same(
    make: Builder,
    features: tf.Tensor,
    scope: str,
    filters: int,
    side: int,
    stride: int = 2,
    **options,
) -> tf.Tensor:
    """slim's conv2d_same: padded alike on all sides where it strides."""
    if stride > 1:
        # SAME would give an even side a pixel less before than after, and
        # slim's kernels would see everything shifted.
        features = tf.keras.layers.ZeroPadding2D(side // 2)(features)
        options["padding"] = "valid"
    return make.conv(features, scope, filters, side, stride, **options)


def resnet18(make: Builder, images: tf.Tensor) -> Maps:
    """The paper's ResNet18: 256 channels of stride 16, 512 of stride 32."""
    # A name of ours: neither the reference nor slim has this depth, so no
    # frontend checkpoint is to be found for it.
    scope = "resnet_18"
    features = make.conv_norm_relu(
        images, f"{scope}.conv1", f"{scope}.conv1.BatchNorm", 64, 7, 2
    )
    features = max_pool(features)
    outputs = []
    for block in range(1, 5):
        for unit in (1, 2):
            stride = 2 if unit == 1 and block > 1 else 1
            name = f"{scope}.block{block}.unit_{unit}"
            features = _basic_block(
                make, features, name, 32 * 2**block, stride
            )
        outputs.append(features)
    # Unlike slim's, its blocks stride where they begin.
    return outputs[2], outputs[3]


def _basic_block(
    make: Builder, features: tf.Tensor, scope: str, channels: int, stride: int
) -> tf.Tensor:
    """Two 3x3 convolutions beside a shortcut."""
    shortcut = features
    if stride > 1:
        shortcut = make.batch_norm(
            make.conv(features, f"{scope}.shortcut", channels, 1, stride),
            f"{scope}.shortcut.BatchNorm",
        )
    name = f"{scope}.conv1"
    residual = make.conv_norm_relu(
        features, name, f"{name}.BatchNorm", channels, 3, stride
    )
    residual = make.conv(residual, f"{scope}.conv2", channels, 3)
    residual = make.batch_norm(
        residual, f"{scope}.conv2.BatchNorm", start="zeros"
    )
    return relu(tf.keras.layers.Add()([residual, shortcut]))


def mobilenet_v2(make: Builder, images: tf.Tensor) -> Maps:
    """slim's MobileNetV2 1.0: 64 channels of stride 16, 160 of stride 32.

    As the reference has it: the first block of each stride, not the last.
    """
    # slim's scope; the reference looks for mobilenet_v2, which no checkpoint
    # of slim's has.
    scope = "MobilenetV2"
    features = _conv_norm(make, images, f"{scope}.Conv", 32, 3, 2)
    features = relu(features, 6.0)
    number, firsts = 0, []
    for expansion, channels, count, first_stride in MOBILENET_BLOCKS:
        for block in range(count):
            stride = 1 if block else first_stride
            name = f"{scope}.expanded_conv" + f"_{number}" * (number > 0)
            features = _inverted_residual(
                make, features, name, expansion, channels, stride
            )
            if stride > 1:
                firsts.append(features)
            number += 1
    return firsts[-2], firsts[-1]


def _conv_norm(
    make: Builder,
    features: tf.Tensor,
    scope: str,
    filters: int,
    side: int = 1,
    stride: int = 1,
) -> tf.Tensor:
    """Convolution and batch norm of MobileNetV2."""
    features = make.conv(features, scope, filters, side, stride)
    return make.batch_norm(
        features, f"{scope}.BatchNorm", epsilon=MOBILENET_EPSILON
    )


def _inverted_residual(
    make: Builder,
    features: tf.Tensor,
    scope: str,
    expansion: int,
    channels: int,
    stride: int,
) -> tf.Tensor:
    """Wide in the middle, where the convolution is depthwise."""
    inputs, width = features, features.shape[-1]
    if expansion > 1:
        features = _conv_norm(
            make, features, f"{scope}.expand", expansion * width
        )
        features = relu(features, 6.0)
    name = f"{scope}.depthwise"
    features = make.depthwise(features, name, stride, "kaiming")
    features = make.batch_norm(
        features, f"{name}.BatchNorm", epsilon=MOBILENET_EPSILON
    )
    features = relu(features, 6.0)
    # Linear, since a ReLU would destroy what the narrow map holds.
    features = _conv_norm(make, features, f"{scope}.project", channels)
    if stride > 1 or width != channels:
        return features
    return tf.keras.layers.Add()([features, inputs])


class Frontend(NamedTuple):
    """A frontend: its function, its TF1 scope and the reference's L2."""

    build: Callable[[Builder, tf.Tensor], Maps]
    scope: str
    weight_decay: float


def _resnet(depth: int, units: tuple[int, ...]) -> Frontend:
    """slim's ResNet v2 of a depth."""
    scope = f"resnet_v2_{depth}"

    def build(make: Builder, images: tf.Tensor) -> Maps:
        return resnet_v2(make, images, units, scope)

    return Frontend(build, scope, 1e-4)


# The reference lacks ResNet18, which takes the L2 of the other ResNets.
FRONTENDS = {
    "Xception39": Frontend(xception39, "xception39", 1e-5),
    "ResNet18": Frontend(resnet18, "resnet_18", 1e-4),
    "ResNet50": _resnet(50, (3, 4, 6, 3)),
    "ResNet101": _resnet(101, (3, 4, 23, 3)),
    "ResNet152": _resnet(152, (3, 8, 36, 3)),
    "MobileNetV2": Frontend(mobilenet_v2, "MobilenetV2", 4e-5),
}
