"""DeepLabv3+: a backbone, atrous spatial pyramid pooling and a decoder.

Layers carry the TF1 reference's variable scopes, with dots for slashes, which
makes the checkpoint table of weights.py trivial.
"""

from typing import NamedTuple, Optional

import tensorflow as tf

from common.npu_config import UserError
from DeepLabv3plus import mobilenet_v2, xception
from DeepLabv3plus.layers import (
    BatchNorm,
    Classifier,
    Convolution,
    Drop,
    GlobalMean,
    Normalize,
    Resize,
    ceil_div,
)

# The reference's values: exchanged, they move logits by 0.2 to 4 %.
HEAD_EPSILON = 1e-5  # of batch norm after the backbone, which has 1e-3
# The best in table 1 of the paper, and the reference's.
DECODER_DEPTH = 48  # channels of the projected low-level features
BACKBONES = {
    **dict.fromkeys(
        xception.MIDDLE_UNITS, (xception.Builder, xception.xception)
    ),
    "mobilenet_v2": (mobilenet_v2.Builder, mobilenet_v2.mobilenet_v2),
}


class Shape(NamedTuple):
    """What fixes a network's variables and what it computes with them.

    Attributes:
      variant: of BACKBONES.
      num_classes: channels of the logits.
      output_stride: pixels of the picture per pixel of the features, 8 or 16.
      atrous_rates: of the pyramid's dilated convolutions; empty: none.
      decoder_stride: of the logits, 4, 8 or 16; 0: no decoder.
      depth_multiplier: of the backbone's widths; the reference has 1.
      aspp_filters: channels of each branch of the pyramid.
      decoder_filters: channels of the decoder.
      initializer: "reference" or "fan_in", see xception.kernel_initializer.
    """

    variant: str = "xception_65"
    num_classes: int = 21
    output_stride: int = 16
    atrous_rates: tuple[int, ...] = (6, 12, 18)
    decoder_stride: int = 4
    depth_multiplier: float = 1.0
    aspp_filters: int = 256
    decoder_filters: int = 256
    initializer: str = "reference"

    @property
    def logits_stride(self) -> int:
        """Pixels of the picture per pixel of the logits."""
        return self.decoder_stride or self.output_stride


def shape_of(values: dict[str, object]) -> Shape:
    """The shape that the flags of a run fix."""
    variant, stride = values["model_variant"], values["output_stride"]
    is_xception = variant in xception.MIDDLE_UNITS
    decoder_stride = values["decoder_output_stride"]
    # As the model zoo's checkpoints are: those of MobileNetV2 have neither
    # decoder nor dilated branches.
    if decoder_stride is None:
        decoder_stride = 4 if is_xception else 0
    if decoder_stride and not is_xception:
        raise UserError(
            f"--decoder_output_stride={decoder_stride}: mobilenet_v2 has no "
            "decoder; leave it out, or take --model_variant=xception_65"
        )
    # One text of several rates or several texts of one: the seed's commands
    # repeat the flag.
    given = ",".join(map(str, values["atrous_rates"] or ()))
    if given:
        rates = _parse_rates(given)
    else:
        # In pixels of the features, of which stride 8 has twice as many.
        default = tuple(rate * 16 // stride for rate in (6, 12, 18))
        rates = default if is_xception else ()
    return Shape(
        variant,
        values["num_classes"],
        stride,
        rates,
        decoder_stride,
        values["depth_multiplier"],
        values["aspp_convs_filters"],
        values["decoder_filters"],
        values["initializer"],
    )


def _parse_rates(given: str) -> tuple[int, ...]:
    """Rates from `6,12,18`; `none` means no dilated convolutions."""
    if given == "none":
        return ()
    try:
        rates = tuple(int(part) for part in given.split(","))
    except ValueError:
        rates = (0,)
    if min(rates) < 1:
        raise UserError(
            f"--atrous_rates={given}: whole numbers from 1 such as 6,12,18, "
            "or none"
        )
    return rates


def features_size(
    height: int, width: int, shape: Shape
) -> tuple[int, int, int]:
    """Height, width and channels of the map that dropout is applied to."""
    sides = (ceil_div(side, shape.output_stride) for side in (height, width))
    return (*sides, shape.aspp_filters)


class _Head:
    """The layers after the backbone; each is made once, by its name.

    The network and its twin for training both go through them.
    """

    def __init__(self, shape: Shape, norm: BatchNorm) -> None:
        self.shape, self.norm, self.layers = shape, norm, {}

    def once(
        self, name: str, kind: type, *arguments, **options
    ) -> tf.keras.layers.Layer:
        """The layer of this name."""
        name = name.replace("/", ".")
        if name not in self.layers:
            self.layers[name] = kind(*arguments, name=name, **options)
        return self.layers[name]

    def convolve(
        self,
        features: tf.Tensor,
        name: str,
        filters: Optional[int],
        side: int = 1,
        spread: float = 0.0,
        rate: int = 1,
    ) -> tf.Tensor:
        """Convolution, batch norm and ReLU; see xception.Builder."""
        initializer = xception.kernel_initializer(
            self.shape.initializer, filters, side, spread
        )
        return self.once(
            name,
            Convolution,
            filters,
            side,
            self.norm,
            initializer,
            HEAD_EPSILON,
            rate=rate,
            after=tf.nn.relu,
        )(features)

    def separable(
        self, features: tf.Tensor, name: str, filters: int, rate: int = 1
    ) -> tf.Tensor:
        """Depthwise 3x3, then pointwise: [N, h, w, c] to [N, h, w, f]."""
        # The reference's spreads for separable convolutions of the head.
        features = self.convolve(
            features, f"{name}_depthwise", None, 3, 0.33, rate
        )
        return self.convolve(features, f"{name}_pointwise", filters, 1, 0.06)

    def pyramid(self, features: tf.Tensor) -> tf.Tensor:
        """Atrous spatial pyramid pooling: [N, h, w, c] to [N, h, w, f]."""
        filters = self.shape.aspp_filters
        pooled = GlobalMean(name="image_pooling_mean")(features)
        pooled = self.convolve(pooled, "image_pooling", filters)
        # Order matters to checkpoints: concat_projection's kernel rests on it.
        branches = [
            Resize(name="image_pooling_resize")([pooled, features]),
            self.convolve(features, "aspp0", filters),
        ]
        for number, rate in enumerate(self.shape.atrous_rates, 1):
            branches.append(
                self.separable(features, f"aspp{number}", filters, rate)
            )
        merged = tf.keras.layers.Concatenate(name="aspp")(branches)
        return self.convolve(merged, "concat_projection", filters)

    def decode(
        self,
        features: tf.Tensor,
        low_level: Optional[tf.Tensor],
        images: tf.Tensor,
    ) -> tf.Tensor:
        """The pyramid's features to logits, sharpened by low-level ones."""
        if low_level is not None:
            filters = self.shape.decoder_filters
            stride = self.shape.decoder_stride
            low_level = self.convolve(
                low_level, "decoder/feature_projection0", DECODER_DEPTH
            )
            # Order matters to checkpoints: pyramid first, projection second.
            both = [
                self.once(name, Resize, stride)([each, images])
                for name, each in (
                    ("decoder/resize", features),
                    ("decoder/resize_projection", low_level),
                )
            ]
            concatenate = tf.keras.layers.Concatenate
            features = self.once("decoder/concat", concatenate)(both)
            # Two, which table 2 of the paper finds best.
            for number in range(2):
                features = self.separable(
                    features, f"decoder/decoder_conv{number}", filters
                )
        classes = self.shape.num_classes
        return self.once("logits/semantic", Classifier, classes)(features)


def create_model(
    shape: Shape,
    norm: BatchNorm,
    dropout: float = 0.1,
    input_size: tuple[Optional[int], Optional[int]] = (None, None),
) -> tuple[tf.keras.Model, tf.keras.Model]:
    """Builds the network and its twin for training, over the same weights.

    Args:
      shape: of the network.
      norm: whether batch norm is trained, and how.
      dropout: share of the pyramid's outputs that the twin drops.
      input_size: height and width, or None for any size.

    Returns:
      `network`: images [N, H, W, 3] in 0..255 to logits [N, ceil(H/s),
      ceil(W/s), num_classes], all float32; s is `shape.logits_stride`.
      `trainer`: the same from [images, masks], masks [N, h, w, aspp_filters]
      of 0 and 1 as features_size has it. They come from the data stream
      rather than from a dropout layer, so that a sample is dropped the same
      way on whichever rank and after whichever resume it is seen.
    """
    # Layers only from here on: Keras 3 refuses bare ops on its inputs.
    images = tf.keras.Input((*input_size, 3), name="ImageTensor")
    builder, backbone = BACKBONES[shape.variant]
    features, low_level = backbone(
        Normalize(name="normalize")(images),
        builder(
            shape.variant, shape.depth_multiplier, shape.initializer, norm
        ),
        shape.output_stride,
    )
    low_level = low_level.get(shape.decoder_stride)
    head = _Head(shape, norm)
    # Called once: the twins share all that comes before dropout.
    features = head.pyramid(features)
    masks = tf.keras.Input(
        tuple(features.shape[1:]), dtype="uint8", name="dropout_mask"
    )
    dropped = Drop(dropout, name="dropout")([features, masks])
    return (
        tf.keras.Model(images, head.decode(features, low_level, images)),
        tf.keras.Model(
            [images, masks], head.decode(dropped, low_level, images)
        ),
    )
