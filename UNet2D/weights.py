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
# The last of 19 convolutions; only its shape depends on the classes.
CLASSIFIER = "conv2d_18"
# What an npz or a checkpoint can raise, by where it is damaged.
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    tf.errors.OpError,
)


def _leaf_layers(model: tf.keras.Model) -> list[tf.keras.layers.Layer]:
    """All layers in creation order, those of nested models included."""
    layers = []
    # Order matters: it is that of the TF1 graph.
    for layer in model.layers:
        nested = isinstance(layer, tf.keras.Model)
        layers += _leaf_layers(layer) if nested else [layer]
    return layers


def named_variables(network: tf.keras.Model) -> dict[str, tf.Variable]:
    """The network's variables by TF1 name, such as `conv2d_3/kernel`."""
    named = {}
    for layer in _leaf_layers(network):
        for variable in layer.weights:
            # Keras 2.6 has `scope/kernel:0` where Keras 3 has `kernel`.
            leaf = variable.name.split("/")[-1].split(":")[0]
            named[f"{layer.name}/{leaf}"] = variable
    return named


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
      new_classifier: leave the last layer as it is where its shape differs.

    Returns:
      Names that were left as they are.
    """
    values, variables = read(path), named_variables(network)
    left = []
    if new_classifier:
        left = [
            name
            for name in variables
            if name.startswith(CLASSIFIER + "/")
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
            "--base_filters, --num_classes, --in_channels, or the file"
        )
    for name, variable in variables.items():
        if name not in left:
            variable.assign(values[name])
    return left


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
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[*tensors, tf.constant(step, tf.int64)],
    )
