"""Weights by the TF1 reference's variable names: in, out, and to disk.

An npz keyed by these names moves between TensorFlow versions, and a TF1
checkpoint with them loads into the reference's own graph.
"""

import os
import tempfile
import zipfile
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from BlitzNet import resnet50
from BlitzNet.layers import (
    PRIORS,
    ConvolutionNorm,
    DetectionHead,
    SegmentationHead,
)
from common.npu_config import UserError

# What TF1 checkpoints hold beside weights: slots of optimisers and averages.
NOT_WEIGHTS = ("Adam", "Adam_1", "Momentum", "ExponentialMovingAverage")
NOT_LAYERS = (
    "global_step",
    "beta1_power",
    "beta2_power",
    "loss_scale",
    "good_steps",
    "bad_steps",
)
# TF1's names of what a layer of either kind holds.
NAMES_OF_NORM = {
    "kernel": "weights",
    "gamma": "BatchNorm/gamma",
    "beta": "BatchNorm/beta",
    "moving_mean": "BatchNorm/moving_mean",
    "moving_variance": "BatchNorm/moving_variance",
}
NAMES_OF_BIAS = {"kernel": "weights", "bias": "biases"}
DETECTION = "ssd/detection"  # our layer for location and confidence
# What an npz or a checkpoint can raise, by where it is damaged.
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    tf.errors.OpError,
)


def named_variables(network: tf.keras.Model) -> dict[str, tf.Variable]:
    """The network's variables by TF1 name, such as `ssd/Conv_7/weights`."""
    named = {}
    # By attribute, since Keras 2 and 3 name variables in different ways.
    for layer in network.layers:
        scope = layer.name.replace(".", "/")
        if isinstance(layer, ConvolutionNorm):
            for attribute, name in NAMES_OF_NORM.items():
                named[f"{scope}/{name}"] = getattr(layer, attribute)
        elif isinstance(layer, SegmentationHead):
            for attribute, name in NAMES_OF_BIAS.items():
                named[f"{scope}/{name}"] = getattr(layer, attribute)
        elif isinstance(layer, DetectionHead):
            for head in ("location", "confidence"):
                # The map's own scope follows: ssd/location/ssd/pool6.
                place = scope.replace(DETECTION, f"ssd/{head}")
                for attribute, name in NAMES_OF_BIAS.items():
                    variable = getattr(layer, f"{head}_{attribute}")
                    named[f"{place}/{name}"] = variable
    return named


def kernels(network: tf.keras.Model) -> list[tf.Variable]:
    """The kernels to which the reference's weight decay refers: all."""
    return [
        variable
        for name, variable in named_variables(network).items()
        if name.endswith("/weights")
    ]


def find(path: str) -> str:
    """The npz or TF1 checkpoint prefix meant by a path or a run folder."""
    for name in ("best/weights.npz", "weights.npz"):
        if os.path.exists(os.path.join(path, name)):
            return os.path.join(path, name)
    if os.path.isdir(path):
        latest = tf.train.latest_checkpoint(path)
        if latest is None:
            raise UserError(
                f"{path}: a folder without weights.npz or a TF1 checkpoint; "
                "give a run folder, an npz or a checkpoint prefix"
            )
        return latest
    if os.path.exists(path) or os.path.exists(path + ".index"):
        return path
    raise UserError(
        f"{path}: no such file; give a run folder, an npz or a TF1 "
        "checkpoint prefix (the path without .index)"
    )


def read(path: str) -> dict[str, np.ndarray]:
    """Reads an npz (never pickles) or the weights of a TF1 checkpoint."""
    path = find(path)
    try:
        if path.endswith(".npz"):
            with open(path, "rb") as file:
                archive = np.load(file, allow_pickle=False)
                return {name: archive[name] for name in archive.files}
        # People give the index file's name; TensorFlow wants the prefix.
        reader = tf.train.load_checkpoint(path.removesuffix(".index"))
        return {
            name: reader.get_tensor(name)
            for name in reader.get_variable_to_shape_map()
            if name.split("/")[-1] not in NOT_WEIGHTS
            and name not in NOT_LAYERS
        }
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); give an npz of "
            "plain arrays or a TF1 checkpoint"
        ) from None


def load(
    network: tf.keras.Model, path: str, new_classifier: bool = False
) -> list[str]:
    """Loads all weights from `path`, or raises UserError and loads none.

    Args:
      network: whose variables are assigned.
      path: see `find`.
      new_classifier: leave what depends on the classes as it is where its
        shape differs.

    Returns:
      Names that were left as they are.
    """
    values, variables = read(path), named_variables(network)
    wanted = {name: tuple(v.shape) for name, v in variables.items()}
    given = {name: value.shape for name, value in values.items()}
    left = []
    if new_classifier:
        # Only shapes can tell: as many other classes go unnoticed.
        left = [
            name
            for name in class_names_of(network)
            if name in given and given[name] != wanted[name]
        ]
    # All faults at once, and before the first assignment: a network with
    # half of its weights replaced helps nobody.
    missing = sorted(set(wanted) - set(given))
    extra = sorted(set(given) - set(wanted))
    wrong = [
        f"{name} {given[name]} for {shape}"
        for name, shape in wanted.items()
        if name in given and name not in left and given[name] != shape
    ]
    if missing or extra or wrong:
        raise UserError(
            f"{path} does not fit this network: missing {some(missing)}; "
            f"extra {some(extra)}; wrong shape {some(wrong)}; "
            f"{_remedy(given)}"
        )
    for name, variable in variables.items():
        if name not in left:
            variable.assign(values[name])
    return left


def class_names_of(network: tf.keras.Model) -> list[str]:
    """Names of the variables whose shapes follow from the classes."""
    named = named_variables(network)
    numbered = [name for name in named if name.startswith("ssd/Conv")]
    # Convolutions are numbered; the last one gives the logits.
    last = max(numbered, key=_number, default="")
    return [
        name
        for name in named
        if name.startswith("ssd/confidence/")
        or _number(name) == _number(last) >= 0
    ]


def _number(name: str) -> int:
    """The 7 of ssd/Conv_7/weights, 0 for ssd/Conv, -1 for others."""
    layer = name.split("/")[1] if name.startswith("ssd/Conv") else ""
    if not layer:
        return -1
    return int(layer.partition("_")[2] or 0)


def _remedy(given: dict[str, tuple]) -> str:
    """The flags that would fit what a file holds, as far as names tell."""
    if "resnet_v1_50/conv1/weights" not in given:
        return "it is no BlitzNet; check the file"
    if not any(name.startswith(("ssd/", "ssd_back/")) for name in given):
        return "it holds the trunk alone: give it as --weights_path"
    flags = ["--x4" if any("block_rev1/" in n for n in given) else "--nox4"]
    # A size leaves no trace in weights but for the eighth block.
    large = any("block8/" in name for name in given)
    flags.append(f"--image_size={512 if large else 300}")
    heads = [name for name in given if name.startswith("ssd/confidence/")]
    shared = "ssd/confidence/weights" in given
    if heads:
        flags.append(f"--head={'shared' if shared else 'nonshared'}")
        biases = next(given[n] for n in heads if n.endswith("/biases"))
        flags.append(f"--num_classes={biases[0] // PRIORS}")
    flags.append("--detect" if heads else "--nodetect")
    kernel = given.get("ssd/Conv/weights")
    flags.append("--segment" if kernel else "--nosegment")
    if kernel:
        flags.append(f"--seg_filter_size={kernel[0]}")
        flags.append(f"--n_base_channels={kernel[-1]}")
    filters = given["resnet_v1_50/conv1/weights"][-1]
    flags.append(f"--base_filters={filters}")
    deep = any("block1/unit_2/" in name for name in given)
    flags.append(f"--trunk={'resnet50' if deep else 'resnet14'}")
    return f"it was made with {' '.join(flags)}"


def load_trunk(network: tf.keras.Model, path: str) -> None:
    """Starts ResNet-50 from ImageNet's weights; see resnet50.read."""
    variables = {
        name: variable
        for name, variable in named_variables(network).items()
        if name.startswith(resnet50.SCOPE)
    }
    values = resnet50.read(path, read)
    missing = sorted(set(variables) - set(values))
    # Half of a trunk would load as well, and be no start.
    extra = sorted(
        name for name in values if "/block" in name and name not in variables
    )
    wrong = [
        f"{name} {values[name].shape} for {tuple(variable.shape)}"
        for name, variable in variables.items()
        if name in values and values[name].shape != tuple(variable.shape)
    ]
    if missing or extra or wrong:
        raise UserError(
            f"--weights_path={path}: missing {some(missing)}; extra "
            f"{some(extra)}; wrong shape {some(wrong)}; ImageNet's "
            "weights need --trunk=resnet50 --base_filters=64, or give "
            "--random_trunk_init"
        )
    for name, variable in variables.items():
        variable.assign(values[name])


def some(names: Sequence[str]) -> str:
    """The first few of a list, and how many there are."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "none"


def save_npz(network: tf.keras.Model, path: str) -> None:
    """Writes all weights; a reader sees the old file or the new one."""
    # In the same folder: renaming is atomic within one file system only.
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.NamedTemporaryFile(
        dir=folder, suffix=".part", delete=False
    ) as file:
        try:
            # As np.savez writes it, but holding one array at a time.
            with zipfile.ZipFile(file, "w") as archive:
                for name, variable in named_variables(network).items():
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, variable.numpy())
            file.flush()
            # Temporary files are private; a run is to be read by others too.
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def save_tf1(network: tf.keras.Model, prefix: str, step: int) -> None:
    """Writes a checkpoint that the TF1 reference restores by name."""
    # The raw op writes exactly these names; tf.train.Checkpoint would wrap
    # them in paths of Python attributes.
    named = named_variables(network)
    # Without Adam's slots: the reference can evaluate it, but not resume.
    names = [*named, "global_step"]
    tensors = [tf.convert_to_tensor(variable) for variable in named.values()]
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[*tensors, tf.constant(step, tf.int64)],
    )
