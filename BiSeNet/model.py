"""BiSeNet: a spatial path and a context path, fused at 1/8 of the picture.

Layers carry the scopes of the TF1 reference (see layers.py), numbered in the
order in which it makes them. --compat=reference computes what the reference
does; --compat=paper mends what it got wrong against the paper.
"""

from typing import Optional

import tensorflow as tf

from BiSeNet.backbones import FRONTENDS
from BiSeNet.layers import (
    FORMS,
    Builder,
    CropLike,
    Normalize,
    PadToMultiple,
    relu,
)
from common.npu_config import Runtime

STRIDE = 32  # pixels of the picture per pixel of the deepest map
HEADS = ("main", "sup1", "sup2")  # of the trainer, in this order


class CombinePath:
    """The layers of scope combine_path, numbered as they are made."""

    # Checkpoints go by these numbers: a call moved up or down renames layers,
    # and weights.py leaves some of them out by name.
    scope = "combine_path"

    def __init__(self, make: Builder) -> None:
        self.make, self.convs, self.norms = make, 0, 0

    def _next_conv(self) -> str:
        """The scope of the next convolution."""
        suffix = f"_{self.convs}" if self.convs else ""
        self.convs += 1
        return f"{self.scope}.Conv{suffix}"

    def _next_norm(self) -> str:
        """The scope of the next batch norm."""
        suffix = f"_{self.norms}" if self.norms else ""
        self.norms += 1
        return f"{self.scope}.BatchNorm{suffix}"

    def block(self, features: tf.Tensor, filters: int, side: int) -> tf.Tensor:
        """Convolution, batch norm, ReLU."""
        return self.make.conv_norm_relu(
            features, self._next_conv(), self._next_norm(), filters, side
        )

    def attend(self, features: tf.Tensor) -> tf.Tensor:
        """Attention refinement: [N, h, w, c] to [N, h, w, 128]."""
        features = self.block(features, 128, 3)
        gate = self.make.conv(average(features), self._next_conv(), 128)
        # slim's convolution ends in a ReLU where nobody says otherwise.
        if self.make.form.stray_relu:
            gate = relu(gate)
        gate = self.make.batch_norm(gate, self._next_norm())
        return tf.keras.layers.Multiply()([features, sigmoid(gate)])

    def fuse(self, spatial: tf.Tensor, context: tf.Tensor) -> tf.Tensor:
        """Feature fusion: two maps of 128 channels to one of 256."""
        features = tf.keras.layers.Concatenate()([spatial, context])
        # 3x3 as in the reference; the authors' code has 1x1.
        features = self.block(features, 256, 3)
        gate = self.make.conv(average(features), self._next_conv(), 256)
        gate = self.make.conv(relu(gate), self._next_conv(), 256)
        # With it no gate falls below one half.
        if self.make.form.stray_relu:
            gate = relu(gate)
        gated = tf.keras.layers.Multiply()([features, sigmoid(gate)])
        return tf.keras.layers.Add()([features, gated])

    def deepen(self, features: tf.Tensor) -> tf.Tensor:
        """The dilated stage before the main logits, 64 channels."""
        # The authors' code has no such stage, nor have the reference's first
        # versions, whose checkpoints lack Conv_13.
        scope = self._next_conv()
        return self.make.conv_norm_relu(
            features, scope, f"{scope}.BatchNorm", 64, 3, dilation_rate=2
        )

    def logits(
        self, features: tf.Tensor, scope: str, classes: int, factor: int
    ) -> tf.Tensor:
        """Scores at the size of the picture, float32."""
        # Without a bias, as in the reference; the authors' code has one.
        scores = self.make.conv(features, f"{self.scope}.{scope}", classes)
        return self.make.upsample(scores, factor)


def average(features: tf.Tensor) -> tf.Tensor:
    """[N, h, w, c] to its means [N, 1, 1, c]."""
    # Float32, since bfloat16 cannot count that far.
    return tf.keras.layers.GlobalAveragePooling2D(
        keepdims=True, dtype="float32"
    )(features)


def sigmoid(features: tf.Tensor) -> tf.Tensor:
    """Numbers to shares."""
    return tf.keras.layers.Activation("sigmoid")(features)


def spatial_path(make: Builder, images: tf.Tensor) -> tf.Tensor:
    """[N, H, W, 3] to [N, H/8, W/8, 128]."""
    # The paper has three strided layers (section 3.1); sides, channels and
    # the 1x1 layer are the reference's and the authors' code's.
    features = images
    for number, (filters, side, stride) in enumerate(
        ((64, 7, 2), (64, 3, 2), (64, 3, 2), (128, 1, 1))
    ):
        suffix = f"_{number}" if number else ""
        features = make.conv_norm_relu(
            features,
            f"spatial_net.Conv{suffix}",
            f"spatial_net.BatchNorm{suffix}",
            filters,
            side,
            stride,
        )
    return features


def create_model(
    num_classes: int = 32,
    frontend: str = "Xception39",
    compat: str = "paper",
    input_size: tuple[Optional[int], Optional[int]] = (None, None),
    runtime: Optional[Runtime] = None,
) -> tuple[tf.keras.Model, tf.keras.Model]:
    """Builds the network and its twin for training, over the same weights.

    Args:
      num_classes: channels of the logits.
      frontend: a name of FRONTENDS.
      compat: a name of FORMS.
      input_size: height and width, or None for any size.
      runtime: of the ranks whose batch norms take one batch; None: of this
        rank alone.

    Returns:
      `network`: image [N, H, W, 3] in 0..255 to logits [N, H, W, num_classes],
      all float32. `trainer`: the same with the logits of the two auxiliary
      heads, in the order of HEADS.
    """
    images = tf.keras.Input((*input_size, 3), name="input_image")
    make = Builder(FORMS[compat], runtime=runtime)
    # Under a mixed policy too: bfloat16 would round the pixels.
    pixels = PadToMultiple(STRIDE, dtype="float32")(images)
    # After the padding, which is black thereby, as around small pictures in
    # training; zeros added here would be grey in the paper's form.
    pixels = Normalize(make.form.centred, dtype="float32")(pixels)
    spatial = spatial_path(make, pixels)
    pool4, pool5 = FRONTENDS[frontend].build(make, pixels)

    combine = CombinePath(make)
    overview = combine.block(average(pool5), 128, 1)
    attended5, attended4 = combine.attend(pool5), combine.attend(pool4)
    add = tf.keras.layers.Add
    # The means of the whole picture are added to each of its pixels.
    net5 = make.upsample(add()([attended5, overview]), 2)
    net5 = combine.block(net5, 128, 3)
    net4 = make.upsample(add()([attended4, net5]), 2)
    net4 = combine.block(net4, 128, 3)
    fused = combine.fuse(spatial, net4)
    body5, body4 = combine.block(net5, 128, 3), combine.block(net4, 128, 3)
    body = make.upsample(combine.block(fused, 64, 3), 2)
    body = combine.deepen(body)
    heads = [
        CropLike(dtype="float32")(
            [combine.logits(features, scope, num_classes, factor), images]
        )
        for features, scope, factor in (
            (body, "logits", 4),
            (body5, "supl1", 16),
            (body4, "supl2", 8),
        )
    ]
    return tf.keras.Model(images, heads[0]), tf.keras.Model(images, heads)
