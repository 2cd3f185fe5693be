"""VGG16's ImageNet weights from the files in which people have them.

vgg16.npy (a pickled dictionary, as the reference takes it) and the weight
files of Keras' VGG16. Both come from the same Caffe model, so their kernels
expect BGR pictures without the mean, as the network here makes them.
"""

import io
import pickle
from typing import Any, BinaryIO

import numpy as np

from common.npu_config import UserError
from ROI_FCN.model import VGG_LAYERS

# What else a vgg16.npy or an HDF5 file can raise, by where it is damaged.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    MemoryError,
    pickle.UnpicklingError,
)


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes in the old pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


# The functions that a pickled numpy array calls, by the names that numpy 1
# and 2 give them. Nothing else may be called by a file.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1_bytes,
}


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The function behind a name in the file, if it is harmless."""
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return ADMITTED[module, name]


def _read_pickled(file: BinaryIO) -> dict[str, list[np.ndarray]]:
    """The dictionary inside a .npy file that holds one object."""
    # numpy writes later versions only where a header is long or not latin1.
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"an array {shape} of {dtype}, not a dictionary")
    # Python 2 wrote the file: its strings are bytes of latin1.
    content = ArrayUnpickler(file, encoding="latin1").load()
    if isinstance(content, np.ndarray):
        content = content.item()
    return {name: list(content[name]) for name in content}


def _read_keras(file: BinaryIO) -> dict[str, list[np.ndarray]]:
    """The layers of a Keras VGG16 file by the names that vgg16.npy uses."""
    # TensorFlow brings it; only these files need it.
    import h5py

    layers = {}
    with h5py.File(io.BytesIO(file.read()), "r") as archive:
        root = archive.get("model_weights", archive)
        for name, group in root.items():
            names = group.attrs.get("weight_names", [])
            arrays = [np.asarray(group[each]) for each in names]
            if arrays:
                layers[_vgg_name(name)] = arrays
    return layers


def _vgg_name(name: str) -> str:
    """Keras' block1_conv2 is conv1_2; its fully connected ones are fc6..8."""
    names = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"}
    if name.startswith("block"):
        block, layer = name[len("block") :].split("_")
        return f"{layer[:-1]}{block}_{layer[-1]}"
    return names.get(name, name)


def read(path: str, fully_connected: bool) -> dict[str, list[np.ndarray]]:
    """Kernel and bias by layer name of this project's network.

    Args:
      path: vgg16.npy, or an .h5 file of Keras' VGG16.
      fully_connected: conv6 and conv7 too, from fc6 and fc7.

    Returns:
      conv1_1 .. conv5_3 (and conv6, conv7): [kernel HWIO, bias].
    """
    try:
        with open(path, "rb") as file:
            hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
            file.seek(0)
            content = (_read_keras if hdf5 else _read_pickled)(file)
        wanted = {name: name for name in VGG_LAYERS}
        if fully_connected:
            wanted.update(conv6="fc6", conv7="fc7")
        missing = [name for name in wanted.values() if name not in content]
        if missing:
            raise ValueError(f"no {', '.join(missing[:4])} in it")
        layers = {
            name: [np.asarray(each, np.float32) for each in content[source]]
            for name, source in wanted.items()
        }
        if fully_connected:
            # A matrix over the flattened 7x7 map is a 7x7 convolution.
            # Both kinds of file flatten it by row, column, channel.
            layers["conv6"][0] = layers["conv6"][0].reshape(7, 7, 512, -1)
            layers["conv7"][0] = layers["conv7"][0][np.newaxis, np.newaxis]
        return layers
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--vgg16={path}: cannot be read ({reason}); give vgg16.npy or "
            "the .h5 file of Keras' VGG16, or none"
        ) from None
