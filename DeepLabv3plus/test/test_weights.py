"""Weights in and out: npz, TF1 checkpoints, and files that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import UserError
from DeepLabv3plus import weights
from DeepLabv3plus.layers import BatchNorm
from DeepLabv3plus.model import Shape, create_model

# The shallower of two that share their code and their table of names.
SMALL = Shape(
    "xception_41",
    num_classes=3,
    depth_multiplier=0.02,
    aspp_filters=8,
    decoder_filters=8,
)


def small(**changes: object) -> tf.keras.Model:
    """A small network."""
    return create_model(SMALL._replace(**changes), BatchNorm())[0]


def arrays_of(network: tf.keras.Model) -> dict:
    """Values by name."""
    return {
        name: variable.numpy()
        for name, variable in weights.named_variables(network).items()
    }


def test_npz_round_trip_gives_equal_outputs(tmp_path: Path) -> None:
    """What is written loads into another network, bit for bit."""
    first, second = small(), small()
    path = str(tmp_path / "weights.npz")
    weights.save_npz(first, path)
    assert weights.load(second, path) == ([], [])
    images = tf.random.stateless_uniform([1, 40, 50, 3], [0, 1])
    np.testing.assert_array_equal(first(images), second(images))
    assert list(tmp_path.iterdir()) == [tmp_path / "weights.npz"]


def test_tf1_saver_restores_what_we_write(tmp_path: Path) -> None:
    """Through the reference's own names, in a TF1 graph."""
    network = small()
    prefix = str(tmp_path / "model.ckpt")
    weights.save_tf1(network, prefix, 17)
    values = arrays_of(network)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [
            tf.compat.v1.get_variable(name, value.shape)
            for name, value in values.items()
        ]
        step = tf.compat.v1.get_variable("global_step", (), tf.int64)
        tf.compat.v1.train.Saver([*variables, step]).restore(session, prefix)
        restored = session.run(variables)
        assert session.run(step) == 17
    for value, again in zip(values.values(), restored):
        np.testing.assert_array_equal(value, again)


def test_tf1_checkpoint_of_the_reference_loads(tmp_path: Path) -> None:
    """Velocities and the step of a training checkpoint are no weights."""
    network = small()
    values = {
        name: np.random.RandomState(1).normal(size=value.shape)
        for name, value in arrays_of(network).items()
    }
    prefix = str(tmp_path / "model.ckpt-100000")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in values.items():
            tf.compat.v1.get_variable(
                name, initializer=value.astype(np.float32)
            )
            tf.compat.v1.get_variable(f"{name}/Momentum", value.shape)
        tf.compat.v1.get_variable("global_step", (), tf.int64)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, prefix)
    # TensorFlow notes the newest prefix in a folder's file `checkpoint`.
    for path in (prefix, str(tmp_path)):
        weights.load(network, path)
        for name, value in arrays_of(network).items():
            np.testing.assert_array_equal(
                value, values[name].astype(np.float32)
            )


def test_names_do_not_depend_on_the_version() -> None:
    """A file holds the reference's names, so either Keras reads it."""
    names = list(arrays_of(small(variant="xception_65")))
    assert names[:2] == [
        "xception_65/entry_flow/conv1_1/weights",
        "xception_65/entry_flow/conv1_1/BatchNorm/gamma",
    ]
    assert names[-2:] == ["logits/semantic/weights", "logits/semantic/biases"]
    assert len(names) == 732


def test_mismatch_lists_what_is_wrong_and_loads_nothing(
    tmp_path: Path,
) -> None:
    """Another width: one line with the flag to check."""
    path = str(tmp_path / "weights.npz")
    weights.save_npz(small(depth_multiplier=0.2), path)
    network = small()
    before = arrays_of(network)
    with pytest.raises(UserError, match="wrong shape .*--depth_multiplier"):
        weights.load(network, path)
    for name, value in arrays_of(network).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("given", ["other classes", "none", "half"])
def test_only_a_new_classifier_starts_anew(tmp_path: Path, given: str) -> None:
    """Other classes, no classifier or half of one; only where asked for."""
    values = arrays_of(small(num_classes=5))
    if given != "other classes":
        del values["logits/semantic/weights"]
        values["logits/semantic/biases"] = np.zeros(3, np.float32)
    if given == "none":
        del values["logits/semantic/biases"]
    path = str(tmp_path / "weights.npz")
    np.savez(path, **values)
    network = small()
    before = arrays_of(network)
    with pytest.raises(UserError, match="logits/semantic/weights"):
        weights.load(network, path)
    left, extra = weights.load(network, path, ())
    assert left == ["logits/semantic/biases", "logits/semantic/weights"]
    assert extra == []
    for name, value in arrays_of(network).items():
        expected = before if name in left else values
        np.testing.assert_array_equal(value, expected[name], name)


def test_the_backbone_alone_from_an_imagenet_checkpoint(
    tmp_path: Path,
) -> None:
    """Its classifier is passed over, and all last layers start anew."""
    values = {
        name: value
        for name, value in arrays_of(small()).items()
        if name.startswith("xception_41/")
    }
    values["xception_41/logits/weights"] = np.zeros([1, 1, 40, 1001])
    path = str(tmp_path / "weights.npz")
    np.savez(path, **values)
    network = small()
    # All but the classifier's two, which may always start anew.
    with pytest.raises(UserError, match="missing 70 .*initialize_last_layer"):
        weights.load(network, path, ())
    left, extra = weights.load(network, path, weights.LAST_LAYERS)
    assert len(left) == 72 and extra == ["xception_41/logits/weights"]
    assert not any(name.startswith("xception_41/") for name in left)


def test_missing_and_extra_entries_are_listed(tmp_path: Path) -> None:
    """Nothing is skipped silently."""
    network = small()
    values = arrays_of(network)
    values["resnet/kernel"] = values.pop("aspp0/weights")
    path = str(tmp_path / "other.npz")
    np.savez(path, **values)
    match = r"missing 1 \(aspp0/weights\); extra 1 \(resnet"
    with pytest.raises(UserError, match=match):
        weights.load(network, path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    """An npz that would run code when unpickled runs nothing."""
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return (marker.write_text, ("x",))

    path = str(tmp_path / "bad.npz")
    np.savez(path, weights=np.array([Malicious()], dtype=object))
    with pytest.raises(UserError, match="plain arrays"):
        weights.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip"])
def test_damaged_npz_is_one_line(tmp_path: Path, content: bytes) -> None:
    """Truncated and foreign files are named."""
    path = tmp_path / "weights.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="weights.npz: cannot be read"):
        weights.read(str(path))
