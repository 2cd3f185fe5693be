"""ImageNet weights from people's files, and files that would run code."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import UserError
from ROI_FCN import vgg16, weights
from ROI_FCN.model import BLOCKS, VGG_LAYERS, create_model

WIDTH = 2  # filters of a narrow VGG16


def layers(width: int = WIDTH) -> dict[str, list[np.ndarray]]:
    """Kernels and biases of a narrow VGG16, as vgg16.npy holds them."""
    rng = np.random.RandomState(0)
    content, channels = {}, 3
    for block, (count, factor) in enumerate(BLOCKS, 1):
        for number in range(1, count + 1):
            shape = (3, 3, channels, channels := factor * width)
            kernel = rng.normal(size=shape).astype(np.float32)
            bias = rng.normal(size=shape[-1:]).astype(np.float32)
            content[f"conv{block}_{number}"] = [kernel, bias]
    return content


def save_as_python2(path: Path, content: dict) -> None:
    """As numpy under Python 2 wrote it: protocol 2 and strings of bytes."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": ()}
        )
        holder = np.empty((), object)
        holder[()] = content
        pickle.dump(holder, file, protocol=2)


def test_vgg16_npy_starts_the_convolutions(tmp_path: Path) -> None:
    """All 13 layers, and nothing else of the network."""
    path = tmp_path / "vgg16.npy"
    save_as_python2(path, layers())
    network, _ = create_model(4, WIDTH, 8)
    before = network.get_layer("conv6").kernel.numpy()
    weights.load_vgg16(network, str(path), False)
    for name, (kernel, bias) in layers().items():
        layer = network.get_layer(name)
        np.testing.assert_array_equal(layer.kernel.numpy(), kernel)
        np.testing.assert_array_equal(layer.bias.numpy(), bias)
    after = network.get_layer("conv6").kernel.numpy()
    np.testing.assert_array_equal(before, after)


def test_numpy_s_own_files_load(tmp_path: Path) -> None:
    """What np.save writes today, with today's protocol."""
    path = tmp_path / "vgg16.npy"
    np.save(path, np.array(layers(), dtype=object), allow_pickle=True)
    content = vgg16.read(str(path), False)
    assert list(content) == list(VGG_LAYERS)
    np.testing.assert_array_equal(
        content["conv5_3"][0], layers()["conv5_3"][0]
    )


def test_fully_connected_layers_become_convolutions(tmp_path: Path) -> None:
    """fc6 over the flattened 7x7x512 map is a 7x7 kernel, fc7 a 1x1 one."""
    content = layers()
    rng = np.random.RandomState(1)
    matrix = rng.normal(size=(7 * 7 * 512, 3)).astype(np.float32)
    content["fc6"] = [matrix, np.zeros(3, np.float32)]
    content["fc7"] = [np.eye(3, dtype=np.float32), np.ones(3, np.float32)]
    path = tmp_path / "vgg16.npy"
    save_as_python2(path, content)
    read = vgg16.read(str(path), True)
    features = rng.normal(size=(7, 7, 512)).astype(np.float32)
    by_matrix = features.reshape(-1) @ matrix
    by_kernel = np.einsum("hwc,hwco->o", features, read["conv6"][0])
    np.testing.assert_allclose(by_matrix, by_kernel, rtol=1e-3, atol=1e-2)
    assert read["conv7"][0].shape == (1, 1, 3, 3)


def save_as_keras(path: Path, root: str) -> None:
    """A weight file as Keras' applications come in."""
    import h5py

    with h5py.File(path, "w") as archive:
        parent = archive.require_group(root) if root else archive
        for name, arrays in layers().items():
            name = f"block{name[4]}_conv{name[6]}"
            group = parent.create_group(name)
            names = [f"{name}_W_1:0", f"{name}_b_1:0"]
            group.attrs["weight_names"] = [each.encode() for each in names]
            for each, array in zip(names, arrays):
                group[each] = array
            parent.require_group("block1_pool")


@pytest.mark.parametrize("root", ["", "model_weights"])
def test_keras_files_load(tmp_path: Path, root: str) -> None:
    """Weights alone, or those inside a saved model."""
    path = tmp_path / "vgg16_notop.h5"
    save_as_keras(path, root)
    content = vgg16.read(str(path), False)
    for name, arrays in layers().items():
        for array, expected in zip(content[name], arrays):
            np.testing.assert_array_equal(array, expected)


# Keras 3.15 hands TensorFlow's variables to a numpy 2 that wants more of them.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept")
def test_keras_vgg16_gives_the_same_features(tmp_path: Path) -> None:
    """Its own file, loaded here: with gates of 1 the maps are equal."""
    # Random weights: a test downloads nothing.
    theirs = tf.keras.applications.VGG16(False, None, input_shape=(64, 96, 3))
    rng = np.random.RandomState(0)
    for variable in theirs.weights[1::2]:  # biases, which start at zero
        variable.assign(rng.normal(size=variable.shape))
    path = str(tmp_path / "vgg16.h5")
    theirs.save(path)
    network, _ = create_model(4, 64, 8, "identity", input_size=(64, 96))
    weights.load_vgg16(network, path, False)
    weights.named_variables(network)["W0"].assign(tf.zeros([3, 3, 1, 64]))
    pool5 = network.get_layer("pool5").output
    ours = tf.keras.Model(network.inputs, pool5)
    images = rng.uniform(0, 255, (1, 64, 96, 3)).astype(np.float32)
    prepared = tf.keras.applications.vgg16.preprocess_input(images.copy())
    expected = theirs(prepared).numpy()
    features = ours([images, np.ones((1, 64, 96, 1), np.float32)])
    error = np.abs(features - expected).max()
    assert error <= 1e-4 * np.abs(expected).max()
    assert expected.std() > 0.1


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.trace),))


# From protocol 4 on another opcode names what is to be called.
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_file_runs_nothing(tmp_path: Path, protocol: int) -> None:
    """One line that names what it wanted to run."""
    path, trace = tmp_path / "vgg16.npy", tmp_path / "ran"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": ()}
        )
        content = {**layers(), "conv9": Malicious(trace)}
        pickle.dump(content, file, protocol=protocol)
    with pytest.raises(UserError, match="wants to run .*mkdir") as error:
        vgg16.read(str(path), False)
    assert "\n" not in str(error.value)
    assert not trace.exists()


def pickled(content: object) -> bytes:
    """An npy file of one object."""
    buffer = io.BytesIO()
    holder = np.empty((), object)
    holder[()] = content
    np.save(buffer, holder, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot be read"),
        (b"\x93NUMPY", "cannot be read"),
        (pickled({"conv1_1": [1]})[:-9], "cannot be read"),
        (pickled({"conv1_1": [1]}), "no conv1_2, conv2_1"),
        (pickled([1, 2]), "cannot be read"),
        (b"\x89HDF\r\n\x1a\n damaged", "cannot be read"),
        (b"PK\x03\x04", "cannot be read"),
    ],
)
def test_damaged_files_are_one_line(
    tmp_path: Path, content: bytes, told: str
) -> None:
    """Whatever is in the file: its name, the reason, the files allowed."""
    path = tmp_path / "vgg16.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        vgg16.read(str(path), False)
    assert str(error.value).startswith(f"--vgg16={path}: cannot be read")


def test_missing_and_misfitting_files(tmp_path: Path) -> None:
    """A path that is wrong, and a network of another width."""
    with pytest.raises(UserError, match="No such file"):
        vgg16.read(str(tmp_path / "nothing.npy"), False)
    path = tmp_path / "vgg16.npy"
    save_as_python2(path, layers())
    with pytest.raises(UserError, match="use --base_filters=64"):
        weights.load_vgg16(create_model(4, 4, 8)[0], str(path), False)
