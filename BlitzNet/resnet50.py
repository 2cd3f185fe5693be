"""ResNet-50's ImageNet weights from the files in which people have them.

A TF1 checkpoint with the trunk's names (resnet50_full.ckpt) and the weight
files of Keras' ResNet50. Both come from the same Caffe model: BGR without the
mean, and the stride in the first 1x1 of a block.
"""

import os
from typing import Callable

import numpy as np

from common.npu_config import UserError

SCOPE = "resnet_v1_50/"
CHECKPOINT = "resnet50_full.ckpt"  # where the seed looks for it: in a folder
# What a damaged HDF5 file can raise.
UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError)
KERAS_UNITS = {"0": "shortcut", "1": "conv1", "2": "conv2", "3": "conv3"}
# Tells files apart: a TF1 checkpoint may be a single file as well.
HDF5_START = b"\x89HDF\r\n\x1a\n"


def _scope_of(name: str) -> str:
    """`conv2_block1_0_conv` is block1/unit_1/bottleneck_v1/shortcut."""
    parts = name.split("_")
    if name.startswith("conv1_"):
        return f"{SCOPE}conv1"
    block = int(parts[0][len("conv") :]) - 1
    unit = parts[1][len("block") :]
    place = KERAS_UNITS[parts[2]]
    return f"{SCOPE}block{block}/unit_{unit}/bottleneck_v1/{place}"


def _read_keras(path: str) -> dict[str, np.ndarray]:
    """The trunk's variables by TF1 name from a Keras ResNet50 file.

    Keras' convolutions have a bias. What follows is batch norm, so that it
    can be taken off the moving mean.
    """
    # TensorFlow brings it; only these files need it.
    import h5py

    values, biases = {}, {}
    with h5py.File(path, "r") as archive:
        # Whole models keep their weights a level deeper than weight files.
        root = archive.get("model_weights", archive)
        for name, group in root.items():
            kind = name.rsplit("_", 1)[-1]
            if not name.startswith("conv") or kind not in ("conv", "bn"):
                continue
            # In the attribute's order: the group would sort them by name.
            arrays = [
                np.asarray(group[each], np.float32)
                for each in group.attrs["weight_names"]
            ]
            scope = _scope_of(name)
            if kind == "conv":
                values[f"{scope}/weights"], biases[scope] = arrays
                continue
            for leaf, array in zip(
                ("gamma", "beta", "moving_mean", "moving_variance"), arrays
            ):
                values[f"{scope}/BatchNorm/{leaf}"] = array
    for scope, bias in biases.items():
        mean = f"{scope}/BatchNorm/moving_mean"
        values[mean] = values[mean] - bias
    return values


def _find(path: str) -> str:
    """The file meant by a folder, if it is one."""
    if not os.path.isdir(path):
        return path
    keras = sorted(name for name in os.listdir(path) if name.endswith(".h5"))
    if os.path.exists(os.path.join(path, CHECKPOINT + ".index")):
        return os.path.join(path, CHECKPOINT)
    # The first version of TF1's checkpoints was a single file.
    if os.path.exists(os.path.join(path, CHECKPOINT)):
        return os.path.join(path, CHECKPOINT)
    return os.path.join(path, keras[0]) if keras else path


def read(
    path: str, read_checkpoint: Callable[[str], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The trunk's 265 variables by TF1 name.

    Args:
      path: a TF1 checkpoint's prefix, an .h5 file of Keras' ResNet50, or a
        folder with either.
      read_checkpoint: reads anything else; see weights.read.
    """
    path = _find(path)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            hdf5 = file.read(len(HDF5_START)) == HDF5_START
        if hdf5:
            return _read_hdf5(path)
    values = read_checkpoint(path)
    return {
        name: value for name, value in values.items() if name.startswith(SCOPE)
    }


def _read_hdf5(path: str) -> dict[str, np.ndarray]:
    """As _read_keras; raises UserError for a file that is something else."""
    try:
        return _read_keras(path)
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--weights_path={path}: cannot be read ({reason}); give "
            f"{CHECKPOINT} or the .h5 file of Keras' ResNet50, or "
            "--random_trunk_init"
        ) from None
