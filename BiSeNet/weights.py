"""Weights by the TF1 reference's variable names: in, out, and to disk.

An npz keyed by these names moves between TensorFlow versions, and a TF1
checkpoint with them loads into the reference's own graph.
"""

import os
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

from BiSeNet.backbones import FRONTENDS
from BiSeNet.model import CombinePath
from common.npu_config import UserError

# What TF1 checkpoints hold beside weights: slots of optimisers and averages.
NOT_WEIGHTS = ("Momentum", "ExponentialMovingAverage", "RMSProp", "RMSProp_1")
NOT_LAYERS = ("global_step", "loss_scale", "good_steps", "bad_steps")
# The leaf of a variable's TF1 name, by the kind of layer and Keras' name.
LEAVES = {
    "Conv2D": {"kernel": "weights", "bias": "biases"},
    "DepthwiseConv2D": {
        # Keras 3, then Keras 2.6.
        "kernel": "depthwise_weights",
        "depthwise_kernel": "depthwise_weights",
    },
}
KERNELS = ("weights", "depthwise_weights", "pointwise_weights")
# Whose shapes depend on the classes.
CLASSIFIER = tuple(
    f"{CombinePath.scope}/{head}/weights"
    for head in ("logits", "supl1", "supl2")
)
# The auxiliary heads, which only training needs.
# Their numbers follow from the order of calls in create_model.
AUXILIARY = tuple(
    f"{CombinePath.scope}/{scope}/"
    for scope in (
        "supl1",
        "supl2",
        "Conv_10",
        "Conv_11",
        "BatchNorm_8",
        "BatchNorm_9",
    )
)
# What an npz says about itself, beside its variables.
FACTS = ("facts/frontend", "facts/compat")
# What an npz or a checkpoint can raise, by where it is damaged.
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    tf.errors.OpError,
)


def named_variables(model: tf.keras.Model) -> dict[str, tf.Variable]:
    """A model's variables by TF1 name, such as `spatial_net/Conv/weights`."""
    named = {}
    for layer in model.layers:
        for variable in layer.weights:
            # Keras 2.6 has `scope/kernel:0` where Keras 3 has `kernel`.
            leaf = variable.name.split("/")[-1].split(":")[0]
            leaf = LEAVES.get(type(layer).__name__, {}).get(leaf, leaf)
            scope = layer.name.replace(".", "/")
            # TF1's separable convolution is one scope of two kernels.
            if scope.endswith("/pointwise"):
                scope = scope[: -len("/pointwise")]
                leaf = f"pointwise_{leaf}"
            named[f"{scope}/{leaf}"] = variable
    return named


def decayed_kernels(
    model: tf.keras.Model, frontend: str, compat: str
) -> list[tf.Variable]:
    """The kernels on which L2 acts.

    Those of the frontend alone in the reference, all of them in the paper.
    """
    scope = FRONTENDS[frontend].scope + "/" if compat == "reference" else ""
    return [
        variable
        for name, variable in named_variables(model).items()
        if name.split("/")[-1] in KERNELS and name.startswith(scope)
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
            and name.split("/")[-1] not in NOT_LAYERS
        }
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); give an npz of "
            "plain arrays or a TF1 checkpoint"
        ) from None


def load(
    model: tf.keras.Model,
    path: str,
    new_classifier: bool = False,
    facts: Optional[tuple[str, str]] = None,
) -> list[str]:
    """Loads all weights from `path`, or raises UserError and loads none.

    Args:
      model: whose variables are assigned.
      path: see `find`.
      new_classifier: leave what depends on the classes as it is where its
        shape differs.
      facts: frontend and form of the model, which those of an npz must be.

    Returns:
      Names that were left as they are.
    """
    values, variables = read(path), named_variables(model)
    _check_facts(path, values, facts)
    shapes = {name: tuple(value.shape) for name, value in variables.items()}
    left = [
        name
        for name in CLASSIFIER
        if new_classifier
        and name in shapes
        and name in values
        and values[name].shape != shapes[name]
    ]
    # All faults at once, and before the first assignment: a network with
    # half of its weights replaced helps nobody.
    missing = sorted(set(shapes) - set(values))
    extra = [
        name
        for name in sorted(set(values) - set(shapes))
        if name not in FACTS and not name.startswith(AUXILIARY)
    ]
    wrong = [
        f"{name} {values[name].shape} for {shape}"
        for name, shape in shapes.items()
        if name in values and name not in left and values[name].shape != shape
    ]
    if missing or extra or wrong:
        raise UserError(
            f"{path} does not fit this network: missing {some(missing)}; "
            f"extra {some(extra)}; wrong shape {some(wrong)}; check "
            "--frontend, --compat, --num_classes, or the file"
        )
    for name, variable in variables.items():
        if name not in left:
            variable.assign(np.asarray(values[name], np.float32))
    return left


def _check_facts(
    path: str,
    values: dict[str, np.ndarray],
    facts: Optional[tuple[str, str]],
) -> None:
    """Raises UserError for weights of another frontend or form."""
    for name, wanted in zip(FACTS, facts or ()):
        # A TF1 checkpoint says nothing; its names and shapes have to do.
        held = str(values.get(name, wanted))
        if held != wanted:
            flag = name.split("/")[-1]
            raise UserError(
                f"{path} holds a network of --{flag}={held}, this one has "
                f"--{flag}={wanted}; give --{flag}={held}, or other weights"
            )


def load_frontend(model: tf.keras.Model, path: str, frontend: str) -> None:
    """Starts the frontend from slim's ImageNet checkpoint or an npz.

    Of the file only the frontend's scope is read: the rest of it are the
    ImageNet classifier and whatever else its training needed.
    """
    scope = FRONTENDS[frontend].scope + "/"
    values = read(path)
    variables = {
        name: variable
        for name, variable in named_variables(model).items()
        if name.startswith(scope)
    }
    unfit = [
        name
        for name, variable in variables.items()
        if name not in values or values[name].shape != tuple(variable.shape)
    ]
    if unfit:
        raise UserError(
            f"--frontend_checkpoint={path}: missing or of another shape "
            f"{some(unfit)}; give slim's checkpoint of --frontend={frontend}"
        )
    for name, variable in variables.items():
        variable.assign(np.asarray(values[name], np.float32))


def some(names: Sequence[str]) -> str:
    """The first few of a list, and how many there are."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "none"


def save_npz(
    model: tf.keras.Model,
    path: str,
    facts: tuple[str, str],
    dtype: type = np.float32,
) -> None:
    """Writes all weights; a reader sees the old file or the new one.

    Args:
      model: whose variables are written.
      path: of the npz.
      facts: frontend and form of the model.
      dtype: of the kernels in the file; what batch norm has is small, and
        needs its digits.
    """
    # In the same folder: renaming is atomic within one file system only.
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.NamedTemporaryFile(
        dir=folder, suffix=".part", delete=False
    ) as file:
        try:
            # As np.savez writes it, but holding one array at a time.
            with zipfile.ZipFile(file, "w") as archive:
                for name, fact in zip(FACTS, facts):
                    _write_member(archive, name, np.array(fact))
                for name, variable in named_variables(model).items():
                    array = variable.numpy()
                    if name.split("/")[-1] in KERNELS:
                        array = array.astype(dtype)
                    _write_member(archive, name, array)
            file.flush()
            # Temporary files are private; a run is to be read by others too.
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _write_member(
    archive: zipfile.ZipFile, name: str, array: np.ndarray
) -> None:
    """Adds one array to an npz."""
    with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, array)


def save_tf1(model: tf.keras.Model, prefix: str, step: int) -> None:
    """Writes a checkpoint that the TF1 reference restores by name."""
    # The raw op writes exactly these names; tf.train.Checkpoint would wrap
    # them in paths of Python attributes.
    named = named_variables(model)
    # The step is an int32 in the reference's graph.
    names = [*named, "train/global_step"]
    tensors = [tf.convert_to_tensor(variable) for variable in named.values()]
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[*tensors, tf.constant(step, tf.int32)],
    )
