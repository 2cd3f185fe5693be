"""Weights in and out: npz, TF1 checkpoints, and files that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import UserError
from ROI_FCN import weights
from ROI_FCN.model import create_model

SIZE = (3, 4, 8)  # classes, filters, channels of conv6 in a small network


def arrays_of(network: tf.keras.Model) -> dict:
    """Values by name."""
    return {
        name: variable.numpy()
        for name, variable in weights.named_variables(network).items()
    }


def test_npz_round_trip_gives_equal_outputs(tmp_path: Path) -> None:
    """What is written loads into another network, bit for bit."""
    first, second = create_model(*SIZE)[0], create_model(*SIZE)[0]
    path = str(tmp_path / "weights.npz")
    weights.save_npz(first, path)
    assert weights.load(second, path) == []
    images = tf.random.stateless_uniform([1, 40, 50, 3], [0, 1])
    inputs = [images, images[..., :1]]
    np.testing.assert_array_equal(first(inputs), second(inputs))
    assert list(tmp_path.iterdir()) == [tmp_path / "weights.npz"]


def test_tf1_saver_restores_what_we_write(tmp_path: Path) -> None:
    """Through the reference's own names, in a TF1 graph."""
    network = create_model(*SIZE)[0]
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
    """Adam's slots and the step of a training checkpoint are no weights."""
    network = create_model(*SIZE)[0]
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
            for slot in ("Adam", "Adam_1"):
                tf.compat.v1.get_variable(f"{name}/{slot}", value.shape)
        for name in (
            "beta1_power",
            "beta2_power",
        ):
            tf.compat.v1.get_variable(name, ())
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, prefix)
    for path in (prefix, str(tmp_path)):
        weights.load(network, path)
        for name, value in arrays_of(network).items():
            np.testing.assert_array_equal(
                value, values[name].astype(np.float32)
            )


def test_names_do_not_depend_on_the_version() -> None:
    """A file holds the reference's names, so either Keras reads it."""
    network = create_model(*SIZE)[0]
    names = list(arrays_of(network))
    assert names[:4] == [
        "conv1_1/filter_conv1_1",
        "conv1_1/biases_conv1_1",
        "W0",
        "B0",
    ]
    assert names[-2:] == ["W_t3", "b_t3"] and len(names) == 40


def test_mismatch_lists_what_is_wrong_and_loads_nothing(
    tmp_path: Path,
) -> None:
    """Another width: one line with the flag to check."""
    path = str(tmp_path / "weights.npz")
    weights.save_npz(create_model(3, 8, 8)[0], path)
    network = create_model(*SIZE)[0]
    before = arrays_of(network)
    # All 40 but those of conv7 and conv8, b6 and b_t3: no width enters.
    with pytest.raises(UserError, match="wrong shape 34.*--base_filters"):
        weights.load(network, path)
    for name, value in arrays_of(network).items():
        np.testing.assert_array_equal(value, before[name])


def test_new_classifier_only_where_asked(tmp_path: Path) -> None:
    """Other classes: what depends on them starts anew, and it is said."""
    path = str(tmp_path / "weights.npz")
    weights.save_npz(create_model(*SIZE)[0], path)
    network = create_model(5, 4, 8)[0]
    with pytest.raises(UserError, match="W8"):
        weights.load(network, path)
    left = weights.load(network, path, new_classifier=True)
    assert left == ["W8", "b8", "W_t1", "W_t3", "b_t3"]


def test_missing_and_extra_entries_are_listed(tmp_path: Path) -> None:
    """Nothing is skipped silently."""
    network = create_model(*SIZE)[0]
    values = arrays_of(network)
    values["resnet/kernel"] = values.pop("W7")
    path = str(tmp_path / "other.npz")
    np.savez(path, **values)
    with pytest.raises(UserError, match=r"missing 1 \(W7\); extra 1 \(resnet"):
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
