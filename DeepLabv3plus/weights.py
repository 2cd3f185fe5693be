"""Weights by the TF1 reference's variable names: in, out, and to disk.

An npz keyed by these names moves between TensorFlow versions, and a TF1
checkpoint with them loads into the reference's own graph.
"""

import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

from common.npu_config import UserError
from DeepLabv3plus import xception
from DeepLabv3plus.layers import Classifier, Convolution

# What TF1 checkpoints hold beside weights: slots of optimisers and averages.
NOT_WEIGHTS = ("Momentum", "Adam", "Adam_1", "ExponentialMovingAverage")
NOT_LAYERS = (
    "global_step",
    "beta1_power",
    "beta2_power",
    "loss_scale",
    "good_steps",
    "bad_steps",
)
STATISTICS = ("gamma", "beta", "moving_mean", "moving_variance")
CLASSIFIER = "logits/"  # alone depends on the classes
# The reference's; only the classifier has a bias here.
BIAS_MULTIPLIER = 2.0  # of gradients
# What comes after the backbone: the reference's "last layers".
LAST_LAYERS = (
    CLASSIFIER,
    "image_pooling/",
    "aspp",
    "concat_projection/",
    "decoder/",
)
XCEPTION_SCOPES = (
    "entry_flow/conv",
    "entry_flow/",
    "middle_flow/",
    "exit_flow/",
)
# In the order of the TF1 graph.
# The first that fits is taken, so longer beginnings come before shorter ones.
SCOPES = (
    *(
        f"{variant}/{place}"
        for variant in xception.MIDDLE_UNITS
        for place in XCEPTION_SCOPES
    ),
    "MobilenetV2/Conv",
    "MobilenetV2/",
    "image_pooling",
    "aspp",
    "concat_projection",
    "decoder/feature_projection",
    "decoder/",
    "logits/",
)
# What an npz or a checkpoint can raise, by where it is damaged.
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    tf.errors.OpError,
)


def _graph_order(scope: str) -> tuple:
    """Sorts scopes as the TF1 graph makes them."""
    place = next(
        n for n, start in enumerate(SCOPES) if scope.startswith(start)
    )
    parts = re.split(r"(\d+)", scope)
    # By value: unit_10 comes after unit_9.
    return place, [int(part) if part.isdigit() else part for part in parts]


def named_variables(network: tf.keras.Model) -> dict[str, tf.Variable]:
    """The network's variables by TF1 name, such as `aspp0/weights`."""
    named = {}
    layers = {
        layer.name.replace(".", "/"): layer
        for layer in network.layers
        if isinstance(layer, (Classifier, Convolution))
    }
    for scope in sorted(layers, key=_graph_order):
        layer = layers[scope]
        if isinstance(layer, Classifier):
            named[f"{scope}/weights"] = layer.kernel
            named[f"{scope}/biases"] = layer.bias
        else:
            depthwise = "" if layer.filters else "depthwise_"
            named[f"{scope}/{depthwise}weights"] = layer.kernel
            for name in STATISTICS:
                named[f"{scope}/BatchNorm/{name}"] = getattr(layer, name)
    return named


def trainable_variables(network: tf.keras.Model) -> dict[str, tf.Variable]:
    """Those of named_variables that gradients change."""
    return {
        name: variable
        for name, variable in named_variables(network).items()
        if "/moving_" not in name
    }


def decayed(names: Iterable[str]) -> list[str]:
    """Those to which the reference's weight decay refers: dense kernels."""
    # With the slash, or depthwise_weights would be among them.
    return [name for name in names if name.endswith("/weights")]


def last_layers(logits_only: bool) -> tuple[str, ...]:
    """Beginnings of the names of what the flags call last layers."""
    return (CLASSIFIER,) if logits_only else LAST_LAYERS


def gradient_multipliers(
    names: Iterable[str],
    last_layer: float = 1.0,
    last: tuple[str, ...] = LAST_LAYERS,
) -> list[float]:
    """What the reference multiplies the gradients of variables by.

    Args:
      names: of the variables, in TF1.
      last_layer: factor of the variables whose names begin as `last` says.
      last: see last_layers.
    """
    multipliers = []
    for name in names:
        multiplier = BIAS_MULTIPLIER if name.endswith("/biases") else 1.0
        if name.startswith(last):
            multiplier *= last_layer
        multipliers.append(multiplier)
    return multipliers


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
    network: tf.keras.Model,
    path: str,
    new_layers: Optional[Sequence[str]] = None,
) -> tuple[list[str], list[str]]:
    """Loads all weights from `path`, or raises UserError and loads none.

    Args:
      network: whose variables are assigned.
      path: see `find`.
      new_layers: to start from the file rather than to restore it: beginnings
        of names that it need not give. The classifier is left as it is where
        it is missing or of another shape, and what is not of this network,
        such as a classifier of ImageNet's, is passed over.

    Returns:
      Names that were left as they are, and names that were passed over.
    """
    values, variables = read(path), named_variables(network)
    wanted = {name: tuple(v.shape) for name, v in variables.items()}
    left = []
    if new_layers is not None:
        left = _not_given(values, wanted, (*new_layers, CLASSIFIER))
    # All faults at once, and before the first assignment: a network with
    # half of its weights replaced helps nobody.
    missing = sorted(set(wanted) - set(values) - set(left))
    extra = sorted(set(values) - set(wanted))
    wrong = [
        f"{name} {values[name].shape} for {shape}"
        for name, shape in wanted.items()
        if name in values and name not in left and values[name].shape != shape
    ]
    if missing or wrong or (extra and new_layers is None):
        raise UserError(
            f"{path} does not fit this network: missing {some(missing)}; "
            f"extra {some(extra)}; wrong shape {some(wrong)}; check "
            "--model_variant, --depth_multiplier, --num_classes, or the "
            "file; --initialize_last_layer=False takes the backbone alone"
        )
    for name, variable in variables.items():
        if name not in left:
            variable.assign(values[name])
    return left, extra


def _not_given(
    values: dict[str, np.ndarray],
    wanted: dict[str, tuple],
    new_layers: Sequence[str],
) -> list[str]:
    """Names that a file to start from does not give.

    `new_layers` are left out altogether, but for the classifier, the last of
    them, which is given where all of it fits.
    """
    *excluded, classifier = new_layers
    names = [name for name in wanted if name.startswith(classifier)]
    fits = all(
        name in values and values[name].shape == wanted[name] for name in names
    )
    if not fits:
        excluded.append(classifier)
    return sorted(n for n in wanted if n.startswith(tuple(excluded)))


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
