"""Weights in and out: npz, TF1 checkpoints, ImageNet's, and what fits not."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from BlitzNet import resnet50, weights
from BlitzNet.model import Architecture, create_model
from common.npu_config import UserError

SMALL = Architecture(96, True, 5, 4, n_base_channels=8)


def arrays_of(network: tf.keras.Model) -> dict[str, np.ndarray]:
    """Values by name."""
    return {
        name: variable.numpy()
        for name, variable in weights.named_variables(network).items()
    }


@pytest.fixture(scope="module")
def network() -> tf.keras.Model:
    """A narrow network that no test changes."""
    return create_model(SMALL)


def test_npz_round_trip_gives_equal_outputs(
    network: tf.keras.Model, tmp_path: Path
) -> None:
    """What is written loads into another network, bit for bit."""
    second = create_model(SMALL)
    path = str(tmp_path / "weights.npz")
    weights.save_npz(network, path)
    assert weights.load(second, path) == []
    images = tf.random.stateless_uniform([1, 96, 96, 3], [0, 1])
    for name, output in network(images).items():
        np.testing.assert_array_equal(output, second(images)[name])
    assert list(tmp_path.iterdir()) == [tmp_path / "weights.npz"]


def test_tf1_saver_restores_what_we_write(
    network: tf.keras.Model, tmp_path: Path
) -> None:
    """Through the reference's own names, in a TF1 graph."""
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


def test_tf1_checkpoint_of_the_reference_loads(
    network: tf.keras.Model, tmp_path: Path
) -> None:
    """Adam's slots and the step of a training checkpoint are no weights."""
    second = create_model(SMALL)
    values = {
        name: np.random.RandomState(1).normal(size=value.shape)
        for name, value in arrays_of(network).items()
    }
    names, tensors = [], []
    for name, value in values.items():
        for slot in ("", "/Adam", "/Adam_1"):
            names.append(name + slot)
            tensors.append(tf.constant(value, tf.float32))
    for name in ("beta1_power", "beta2_power"):
        names.append(name)
        tensors.append(tf.constant(0.5))
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt-40000"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=tensors,
    )
    weights.load(second, str(tmp_path / "model.ckpt-40000"))
    for name, value in arrays_of(second).items():
        np.testing.assert_array_equal(value, values[name].astype(np.float32))


def test_names_do_not_depend_on_the_version(network: tf.keras.Model) -> None:
    """A file holds the reference's names, so either Keras reads it."""
    names = list(arrays_of(network))
    assert names[:2] == [
        "resnet_v1_50/conv1/weights",
        "resnet_v1_50/conv1/BatchNorm/gamma",
    ]
    assert names[-2:] == ["ssd/Conv_7/weights", "ssd/Conv_7/biases"]
    assert len(names) == 494


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (SMALL._replace(x4=False), "--nox4"),
        (SMALL._replace(head="shared"), "--head=shared"),
        (SMALL._replace(seg_filter_size=3), "--seg_filter_size=3"),
        (SMALL._replace(segment=False), "--nosegment"),
        (SMALL._replace(detect=False), "--nodetect"),
        (SMALL._replace(base_filters=8), "--base_filters=8"),
        (SMALL._replace(num_classes=9), "--num_classes=9"),
        (SMALL._replace(n_base_channels=4), "--n_base_channels=4"),
        (SMALL._replace(trunk="resnet14"), "--trunk=resnet14"),
    ],
)
def test_what_does_not_fit_names_the_flag(
    network: tf.keras.Model, tmp_path: Path, other: Architecture, told: str
) -> None:
    """And nothing is assigned."""
    path = str(tmp_path / "other.npz")
    weights.save_npz(create_model(other), path)
    before = arrays_of(network)
    with pytest.raises(UserError, match=told):
        weights.load(network, path)
    for name, value in arrays_of(network).items():
        np.testing.assert_array_equal(value, before[name])


def test_other_classes_start_anew(tmp_path: Path) -> None:
    """Everything else is taken, where that is asked for."""
    path = str(tmp_path / "other.npz")
    weights.save_npz(create_model(SMALL._replace(num_classes=9)), path)
    network = create_model(SMALL)
    left = weights.load(network, path, new_classifier=True)
    assert sorted(left) == sorted(
        f"{scope}/{leaf}"
        for leaf in ("weights", "biases")
        for scope in (
            "ssd/Conv_7",
            "ssd/confidence/ssd/pool6",
            *(f"ssd/confidence/ssd_back/block_rev{n}" for n in range(1, 7)),
        )
    )


def test_missing_and_extra_entries_are_listed(
    network: tf.keras.Model, tmp_path: Path
) -> None:
    """Nothing is skipped silently."""
    values = arrays_of(network)
    values["resnet/kernel"] = values.pop("ssd/Conv_7/weights")
    path = str(tmp_path / "other.npz")
    np.savez(path, **values)
    told = r"missing 1 \(ssd/Conv_7/weights\); extra 1 \(resnet"
    with pytest.raises(UserError, match=told):
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


def trunk_values(network: tf.keras.Model, seed: int) -> dict:
    """Random values for the trunk's variables."""
    rng = np.random.RandomState(seed)
    return {
        name: rng.normal(size=value.shape).astype(np.float32)
        for name, value in arrays_of(network).items()
        if name.startswith(resnet50.SCOPE)
    }


def test_trunk_from_a_tf1_checkpoint(tmp_path: Path) -> None:
    """By name, from a folder too; the rest stays as it was."""
    network = create_model(SMALL)
    values = trunk_values(network, 0)
    # ResNet-50 has 53 convolutions, of five variables each.
    assert len(values) == 265
    head = arrays_of(network)["ssd/Conv_7/weights"]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / resnet50.CHECKPOINT),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(map(tf.constant, values.values())),
    )
    weights.load_trunk(network, str(tmp_path))
    after = arrays_of(network)
    for name, value in values.items():
        np.testing.assert_array_equal(after[name], value)
    np.testing.assert_array_equal(after["ssd/Conv_7/weights"], head)
    for other in (
        SMALL._replace(base_filters=8),
        SMALL._replace(trunk="resnet14"),
    ):
        with pytest.raises(UserError, match="--trunk=resnet50 --base_filters"):
            weights.load_trunk(create_model(other), str(tmp_path))


def write_keras_file(path: Path, values: dict, bias: float) -> None:
    """The trunk as Keras' applications store it: a group for each layer."""
    import h5py

    units = {place: key for key, place in resnet50.KERAS_UNITS.items()}
    leaves = ("gamma", "beta", "moving_mean", "moving_variance")
    with h5py.File(path, "w") as archive:
        for name in values:
            if not name.endswith("/weights"):
                continue
            scope = name[: -len("/weights")]
            parts = scope.split("/")
            stem = "conv1"
            if len(parts) > 2:
                block = int(parts[1][len("block") :]) + 1
                unit = parts[2][len("unit_") :]
                stem = f"conv{block}_block{unit}_{units[parts[-1]]}"
            kernel = values[name]
            for layer, arrays in (
                (
                    f"{stem}_conv",
                    {
                        "kernel:0": kernel,
                        "bias:0": np.full(kernel.shape[-1], bias, "f4"),
                    },
                ),
                (
                    f"{stem}_bn",
                    {
                        f"{leaf}:0": values[f"{scope}/BatchNorm/{leaf}"]
                        for leaf in leaves
                    },
                ),
            ):
                group = archive.create_group(layer)
                group.attrs["weight_names"] = [
                    f"{layer}/{each}".encode() for each in arrays
                ]
                for each, array in arrays.items():
                    group[f"{layer}/{each}"] = array


def test_trunk_from_a_file_of_keras(tmp_path: Path) -> None:
    """A convolution's bias is taken off the moving mean."""
    network = create_model(SMALL)
    values = trunk_values(network, 1)
    path = tmp_path / "resnet50_weights.h5"
    write_keras_file(path, values, 0.25)
    for given in (path, tmp_path):
        weights.load_trunk(network, str(given))
        after = arrays_of(network)
        for name, value in values.items():
            shift = 0.25 * name.endswith("moving_mean")
            np.testing.assert_allclose(after[name], value - shift, atol=1e-6)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        weights.load_trunk(network, str(path))
