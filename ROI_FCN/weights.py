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

from common.npu_config import UserError
from ROI_FCN import vgg16
from ROI_FCN.model import VGG_LAYERS

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
# The layers whose variables have names of their own in the reference.
SPECIAL_NAMES = {
    "valve": ("W0", "B0"),
    "conv6": ("W6", "b6"),
    "conv7": ("W7", "b7"),
    "conv8": ("W8", "b8"),
    "conv_t1": ("W_t1", "b_t1"),
    "conv_t2": ("W_t2", "b_t2"),
    "conv_t3": ("W_t3", "b_t3"),
}
# In the order of the TF1 graph.
LAYERS = (VGG_LAYERS[0], "valve", *VGG_LAYERS[1:], *list(SPECIAL_NAMES)[1:])
# Whose shapes depend on the classes: the decoder adds up class scores.
CLASSIFIER = ("W8", "b8", "W_t1", "W_t3", "b_t3")
# What an npz or a checkpoint can raise, by where it is damaged.
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    tf.errors.OpError,
)


def names_of(layer: str) -> tuple[str, str]:
    """TF1 names of a layer's kernel and bias."""
    if layer in SPECIAL_NAMES:
        return SPECIAL_NAMES[layer]
    return f"{layer}/filter_{layer}", f"{layer}/biases_{layer}"


def named_variables(network: tf.keras.Model) -> dict[str, tf.Variable]:
    """The network's variables by TF1 name, such as `W6`."""
    named = {}
    for name in LAYERS:
        layer = network.get_layer(name)
        named.update(zip(names_of(name), (layer.kernel, layer.bias)))
    return named


def vgg_kernels(network: tf.keras.Model) -> list[tf.Variable]:
    """The 13 kernels to which the reference's weight decay refers."""
    return [network.get_layer(name).kernel for name in VGG_LAYERS]


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
    left = []
    if new_classifier:
        left = [
            name
            for name in variables
            if name in CLASSIFIER
            and name in values
            and values[name].shape != tuple(variables[name].shape)
        ]
    wanted = {name: tuple(v.shape) for name, v in variables.items()}
    # All faults at once, and before the first assignment: a network with
    # half of its weights replaced helps nobody.
    missing = sorted(set(wanted) - set(values))
    extra = sorted(set(values) - set(wanted))
    wrong = [
        f"{name} {values[name].shape} for {shape}"
        for name, shape in wanted.items()
        if name in values and name not in left and values[name].shape != shape
    ]
    if missing or extra or wrong:
        raise UserError(
            f"{path} does not fit this network: missing {some(missing)}; "
            f"extra {some(extra)}; wrong shape {some(wrong)}; check "
            "--base_filters, --fc_channels, --labels, --num_classes, or the "
            "file"
        )
    for name, variable in variables.items():
        if name not in left:
            variable.assign(values[name])
    return left


def load_vgg16(
    network: tf.keras.Model, path: str, fully_connected: bool
) -> None:
    """Starts the convolutions (and conv6, conv7) from ImageNet's weights."""
    for name, arrays in vgg16.read(path, fully_connected).items():
        layer = network.get_layer(name)
        for variable, array in zip((layer.kernel, layer.bias), arrays):
            if tuple(variable.shape) != array.shape:
                raise UserError(
                    f"--vgg16={path}: {name} is {array.shape}, the network "
                    f"has {tuple(variable.shape)}; use --base_filters=64 and "
                    "--fc_channels=4096, or --vgg16=none"
                )
            variable.assign(array)


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
    names = [*named, "global_step"]
    tensors = [tf.convert_to_tensor(variable) for variable in named.values()]
    # The reference keeps no step; its Saver takes only what it asks for.
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[*tensors, tf.constant(step, tf.int64)],
    )
