"""The flags of network, loss and augmentation.

Those of the reference's code have its names and defaults. --helpfull lists
them all, --help the usual ones.
"""

from collections.abc import Sequence
from typing import Optional

from absl import flags

from common.npu_config import UserError
from DeepLabv3plus.model import Shape, features_size

FLAGS = flags.FLAGS
SMALL_BATCH = 8  # pictures; the reference trains batch norm with 16 and more
USUAL = (
    "model_variant",
    "output_stride",
    "depth_multiplier",
    "initializer",
    "label_weights",
    "top_k_percent_pixels",
)


def define_flags() -> None:
    """Defines the flags of network, loss and augmentation."""
    text, whole, real = (
        flags.DEFINE_string,
        flags.DEFINE_integer,
        flags.DEFINE_float,
    )
    flags.DEFINE_enum(
        "model_variant",
        # The seed's command names it; the reference has the others too.
        "xception_65",
        ["xception_65", "xception_41", "mobilenet_v2"],
        "The backbone.",
    )
    whole("output_stride", 16, "Of the features, 8 or 16.")
    real("depth_multiplier", 1.0, "Of the backbone's widths.", 0.01)
    flags.DEFINE_enum(
        "initializer",
        "reference",
        ["reference", "fan_in"],
        "Of kernels; fan_in suits training from scratch.",
    )
    # The reference repeats such flags for each number; a list is easier typed.
    flags.DEFINE_multi_string("label_weights", None, "Of the classes, 1,2,1.")
    real("top_k_percent_pixels", 1.0, "Share with most loss.", 0.0, 1.0)
    flags.DEFINE_multi_string(
        "atrous_rates", None, "6,12,18, or the flag thrice; or none."
    )
    whole("decoder_output_stride", None, "Of the logits; 0: no decoder.")
    whole("aspp_convs_filters", 256, "Channels of a pyramid's branch.", 8)
    whole("decoder_filters", 256, "Channels of the decoder.", 8)
    # The reference keeps 0.9, whether batch norm is frozen or not.
    real("dropout", 0.1, "Share of the pyramid's outputs.", 0.0, 0.99)
    flags.DEFINE_bool(
        "sync_batch_norm", True, "One batch norm over the batch of all ranks."
    )
    real("momentum", 0.9, "Share of the velocity kept.", 0.0, 1.0)
    real("learning_power", 0.9, "Of --schedule=poly.", 0.0)
    real("last_layer_gradient_multiplier", 1.0, "Beyond backbone.", 0.0)
    whole("hard_example_mining_step", 0, "Steps to full mining.", 0)
    flags.DEFINE_bool(
        "last_layers_contain_logits_only",
        False,
        "Last layers are logits/ alone, not all after the backbone.",
    )
    flags.DEFINE_bool("upsample_logits", True, "Else labels are made small.")
    real("min_scale_factor", 0.5, "Smallest scale of pictures.", 0.1)
    real("max_scale_factor", 2.0, "Largest scale of pictures.", 0.1)
    real("scale_factor_step_size", 0.25, "Step of scales; 0: any.", 0.0)
    whole("min_resize_value", None, "Short side of all pictures.", 1)
    whole("max_resize_value", None, "Limit of the long side.", 1)
    whole("resize_factor", None, "Sides are k times this plus 1.", 1)
    text("dataset", "pascal_voc_seg", "Ignored: --data_path tells.")


def check_flags() -> None:
    """Refuses values and combinations that could only fail later."""
    for name, allowed in (
        ("output_stride", (8, 16)),
        ("decoder_output_stride", (None, 0, 4, 8, 16)),
    ):
        if FLAGS[name].value not in allowed:
            shown = ", ".join(
                str(each) for each in allowed if each is not None
            )
            raise UserError(f"--{name}={FLAGS[name].value}: give {shown}")
    if FLAGS.min_scale_factor > FLAGS.max_scale_factor:
        raise UserError(
            f"--min_scale_factor={FLAGS.min_scale_factor}: at most "
            f"--max_scale_factor, {FLAGS.max_scale_factor}"
        )


def check_label_weights(classes: int) -> None:
    """Refuses --label_weights that are not one for each class."""
    if FLAGS.label_weights is None:
        return
    given = numbers(FLAGS.label_weights, "label_weights")
    if len(given) != classes:
        raise UserError(
            f"--label_weights has {len(given)} weights, the data "
            f"{classes} classes: give one for each"
        )


def warnings(
    values: dict[str, object], batch: int, size: tuple[int, int], shape: Shape
) -> list[str]:
    """What seldom works, a sentence each.

    Args:
      values: flags of the run.
      batch: pictures of a step, of all ranks.
      size: height and width of the training crop, pixels.
      shape: of the network.
    """
    told, trained = [], values["fine_tune_batch_norm"]
    if trained and batch < SMALL_BATCH:
        told.append(
            f"batch norm is trained on {batch} pictures a step: below "
            f"{SMALL_BATCH} its statistics are noisy"
        )
    if not trained and not values["init_checkpoint"]:
        told.append(
            "batch norm is frozen, which learns next to nothing from random "
            "weights: give --init_checkpoint, or --fine_tune_batch_norm"
        )
    height, width, _ = features_size(*size, shape)
    rates = [rate for rate in shape.atrous_rates if rate >= min(height, width)]
    if trained and rates and values["eval_crop_size"]:
        # All taps but the middle one of such a kernel see padding alone. They
        # stay as they were drawn, and a larger crop would then show them.
        told.append(
            f"rates {rates} of the pyramid reach beyond the {height}x{width} "
            "features of a training crop, so most of their kernels learn "
            "nothing: leave --eval_crop_size out, or lower --atrous_rates"
        )
    return told


def numbers(given: Optional[Sequence[str]], flag: str) -> list[float]:
    """Numbers from values such as `1,2,1`, given once or several times."""
    try:
        parts = ",".join(map(str, given or ())).split(",")
        return [float(part) for part in parts if part]
    except ValueError:
        raise UserError(
            f"--{flag}={','.join(given)}: give numbers such as 1,2.5,1"
        ) from None
