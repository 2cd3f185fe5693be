"""BlitzNet: a ResNet-50 that goes down to 1x1 and up again, with two heads.

Detection and segmentation read the same maps of the way up. Layers carry the
TF1 reference's scopes with dots for slashes: weights.py needs no table.
"""

from typing import NamedTuple, Optional

import tensorflow as tf
from absl import flags

from BlitzNet.layers import (
    ConvolutionNorm,
    DetectionHead,
    Norm,
    Prepare,
    ResizeTo,
    SegmentationHead,
    Subsample,
)

# Units of the four blocks of a trunk, then of each block that goes on down.
TRUNKS = {"resnet50": (3, 4, 6, 3, 2), "resnet14": (1, 1, 1, 1, 1)}
# Of the same blocks, in base_filters. That the last ones have 2048 channels is
# the reference's code; the paper says 512.
WIDTHS = (1, 2, 4, 8, 8)
EXPANSION = 4  # output channels of a unit per channel of its 3x3
# The reference knows 300 and 512 alone; what is smaller is built as 300 is.
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
    trunk: str = "resnet50"

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
        # Halves are rounded up, as SAME padding does. The last block's map is
        # left out: the way up starts from it, but no head reads it.
        side = -(-self.image_size // 2)
        sides = []
        for _ in range(self.blocks() - 1):
            side = -(-side // 2)
            sides.append(side)
        return [*sides[self.first_map() - 1 :], 1]

    def segmentation_scope(self) -> str:
        """Scope of the convolution that gives the segmentation's logits."""
        # TF-Slim numbers scopes as they are made: one for each map, then this.
        return f"ssd/Conv_{len(self.map_sizes())}"


TRAINED = Norm()
DEFAULT = Architecture()


def define_flags() -> None:
    """Defines the flags that fix the network's variables."""
    whole = flags.DEFINE_integer
    # The original's VGG16 finds no masks, and the port has left it out;
    # ResNet-14 is ours, and ImageNet's weights do not fit it.
    flags.DEFINE_enum(
        "trunk", DEFAULT.trunk, list(TRUNKS), "resnet14: to try things out."
    )
    whole("image_size", DEFAULT.image_size, "Side of inputs: 300, 512.", 64)
    flags.DEFINE_bool("x4", DEFAULT.x4, "Heads from stride 4 on, else 8.")
    flags.DEFINE_bool("detect", None, "Find boxes; none: unless only segment.")
    flags.DEFINE_bool("segment", None, "Find masks; none: unless only detect.")
    whole("base_filters", DEFAULT.base_filters, "Of the first convolution.", 1)
    whole("top_fm", None, "Channels going up; none: 8 base_filters.", 4)
    whole(
        "n_base_channels",
        DEFAULT.n_base_channels,
        "Channels of a map in the segmentation head.",
        1,
    )
    whole(
        "seg_filter_size",
        DEFAULT.seg_filter_size,
        "Side of the segmentation head's convolutions.",
        1,
    )
    flags.DEFINE_enum(
        "head",
        DEFAULT.head,
        ["nonshared", "shared"],
        "Detection weights for each map, or for all.",
    )
    flags.DEFINE_enum(
        "resize",
        DEFAULT.resize,
        ["bilinear", "nearest"],
        "How maps grow on the way up.",
    )


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
    # SAME pads an even side behind only, as the reference does; Keras'
    # ResNet50, whose weights load too, pads both sides.
    features = tf.keras.layers.MaxPool2D(3, 2, "same", name="pool1")(features)
    maps = []
    for block in range(1, architecture.blocks() + 1):
        # All blocks below the trunk are of the last kind.
        kind = min(block, len(WIDTHS)) - 1
        root = "resnet_v1_50" if block < len(WIDTHS) else "ssd"
        width = WIDTHS[kind] * filters
        for unit in range(1, TRUNKS[architecture.trunk][kind] + 1):
            scope = f"{root}.block{block}.unit_{unit}.bottleneck_v1"
            strides = 2 if unit == 1 and block > 1 else 1
            features = _unit(scope, features, width, strides, norm)
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
        # The order matters to checkpoints: upsampled first, skip second.
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
        # A quarter is the reference's 128 of 512.
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
        # Under a mixed policy the layer would round the logits to 16 bits.
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
    # A linear activation does nothing but end in float32 under any policy.
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
