"""Weights in and out: npz, TF1 checkpoints, and files that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from BiSeNet import weights
from BiSeNet.backbones import FRONTENDS
from BiSeNet.model import create_model
from common.npu_config import UserError

FACTS = ("Xception39", "paper")


@pytest.fixture(scope="module")
def models() -> tuple[tf.keras.Model, tf.keras.Model]:
    """A network of three classes and its trainer."""
    return create_model(3)


def arrays_of(model: tf.keras.Model) -> dict[str, np.ndarray]:
    """Values by name."""
    return {
        name: variable.numpy()
        for name, variable in weights.named_variables(model).items()
    }


def test_npz_round_trip_gives_equal_outputs(
    models: tuple, tmp_path: Path
) -> None:
    """What a trainer writes loads into a network alone, bit for bit."""
    path = str(tmp_path / "weights.npz")
    weights.save_npz(models[1], path, FACTS)
    second, _ = create_model(3)
    assert weights.load(second, path, facts=FACTS) == []
    images = tf.random.stateless_uniform([1, 40, 50, 3], [0, 1], 0, 255)
    np.testing.assert_array_equal(models[0](images), second(images))
    assert list(tmp_path.iterdir()) == [tmp_path / "weights.npz"]


def test_half_precision_is_half_the_size(
    models: tuple, tmp_path: Path
) -> None:
    """Kernels are rounded; batch norms keep their digits."""
    path = tmp_path / "weights.npz"
    weights.save_npz(models[0], str(path), FACTS, np.float16)
    # 2.1 million numbers, of which only batch norms' have four bytes.
    assert path.stat().st_size < 6e6
    second, _ = create_model(3)
    weights.load(second, str(path), facts=FACTS)
    loaded = arrays_of(second)
    for name, value in arrays_of(models[0]).items():
        assert loaded[name].dtype == np.float32
        if value.ndim == 1:
            np.testing.assert_array_equal(loaded[name], value)
        np.testing.assert_allclose(loaded[name], value, rtol=1e-3, atol=1e-6)


def test_a_checkpoint_knows_its_form(models: tuple, tmp_path: Path) -> None:
    """Weights of one form or frontend are not taken for another's."""
    path = str(tmp_path / "weights.npz")
    weights.save_npz(models[1], path, FACTS)
    network, _ = create_model(3, compat="reference")
    for facts, told in (
        (("Xception39", "reference"), "--compat=paper"),
        (("ResNet18", "paper"), "--frontend=Xception39"),
    ):
        with pytest.raises(UserError, match=told):
            weights.load(network, path, facts=facts)


def test_tf1_saver_restores_what_we_write(
    models: tuple, tmp_path: Path
) -> None:
    """Through the reference's own names, in a TF1 graph."""
    prefix = str(tmp_path / "model.ckpt")
    weights.save_tf1(models[1], prefix, 17)
    values = arrays_of(models[1])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [
            tf.compat.v1.get_variable(name, value.shape)
            for name, value in values.items()
        ]
        step = tf.compat.v1.get_variable("train/global_step", (), tf.int32)
        tf.compat.v1.train.Saver([*variables, step]).restore(session, prefix)
        restored = session.run(variables)
        assert session.run(step) == 17
    for value, again in zip(values.values(), restored):
        np.testing.assert_array_equal(value, again)


def save_checkpoint(folder: Path, values: dict[str, np.ndarray]) -> str:
    """A checkpoint of the reference's training; returns its prefix."""
    prefix = str(folder / "model.ckpt-421")
    slots = {
        f"OptimizeLoss/{name}/Momentum": value * 0.0
        for name, value in values.items()
    }
    everything = {**values, **slots, "train/global_step": np.int32(421)}
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(everything),
        shape_and_slices=[""] * len(everything),
        tensors=[tf.constant(value) for value in everything.values()],
    )
    return prefix


def noise(model: tf.keras.Model) -> dict[str, np.ndarray]:
    """Other values of the variables of a model."""
    rng = np.random.RandomState(1)
    return {
        name: rng.normal(size=value.shape).astype(np.float32)
        for name, value in arrays_of(model).items()
    }


def test_tf1_checkpoint_of_the_reference_loads(tmp_path: Path) -> None:
    """Slots and the step of a training checkpoint are no weights."""
    _, trainer = create_model(4, compat="reference")
    values = noise(trainer)
    prefix = save_checkpoint(tmp_path, values)
    weights.load(trainer, prefix, facts=("Xception39", "reference"))
    for name, value in arrays_of(trainer).items():
        np.testing.assert_array_equal(value, values[name])


@pytest.mark.parametrize("frontend", ["ResNet50", "MobileNetV2"])
def test_slim_s_checkpoint_starts_the_frontend(
    frontend: str, tmp_path: Path
) -> None:
    """By name; the rest of the file and of the network stay as they are."""
    _, trainer = create_model(3, frontend)
    before, values = arrays_of(trainer), noise(trainer)
    scope = FRONTENDS[frontend].scope
    own = {n: v for n, v in values.items() if n.startswith(scope)}
    own[f"{scope}/logits/weights"] = np.zeros([1, 1, 8, 1001], np.float32)
    weights.load_frontend(trainer, save_checkpoint(tmp_path, own), frontend)
    for name, value in arrays_of(trainer).items():
        wanted = (own if name in own else before)[name]
        np.testing.assert_array_equal(value, wanted, name)
    with pytest.raises(UserError, match="slim's checkpoint of --frontend"):
        other = {"resnet_v2_101/conv1/weights": own.popitem()[1]}
        (tmp_path / "other").mkdir()
        prefix = save_checkpoint(tmp_path / "other", other)
        weights.load_frontend(trainer, prefix, frontend)


def test_decay_acts_where_the_form_says() -> None:
    """On the frontend's kernels in the reference, on all in the paper."""
    # Xception39 has 103, the spatial path 4, the combine path 14 and the
    # three of the logits.
    for compat, count in (("reference", 103), ("paper", 103 + 4 + 17)):
        _, trainer = create_model(3, compat=compat)
        kernels = weights.decayed_kernels(trainer, "Xception39", compat)
        assert len(kernels) == count
        assert all(len(kernel.shape) == 4 for kernel in kernels)


def test_names_do_not_depend_on_the_version(models: tuple) -> None:
    """A file holds the reference's names, so either Keras reads it."""
    names = [list(arrays_of(model)) for model in models]
    for own, count in zip(names, (384, 396)):
        assert own[:2] == [
            "xception39/pool1/weights",
            "xception39/pool1_bn1/gamma",
        ]
        assert len(own) == count
    assert names[0][-1] == "combine_path/logits/weights"
    assert names[1][-1] == "combine_path/supl2/weights"


def test_mismatch_lists_what_is_wrong_and_loads_nothing(
    models: tuple, tmp_path: Path
) -> None:
    """Other classes: one line with the flag to check."""
    path = str(tmp_path / "weights.npz")
    weights.save_npz(create_model(5)[1], path, FACTS)
    before = arrays_of(models[1])
    with pytest.raises(UserError, match="wrong shape 3 .*--num_classes"):
        weights.load(models[1], path)
    for name, value in arrays_of(models[1]).items():
        np.testing.assert_array_equal(value, before[name])


def test_new_classifier_only_where_asked(
    models: tuple, tmp_path: Path
) -> None:
    """Other classes: the three heads' logits start anew, and it is said."""
    path = str(tmp_path / "weights.npz")
    weights.save_npz(models[1], path, FACTS)
    _, trainer = create_model(5)
    left = weights.load(trainer, path, new_classifier=True)
    assert sorted(left) == sorted(weights.CLASSIFIER)


def test_missing_and_extra_entries_are_listed(
    models: tuple, tmp_path: Path
) -> None:
    """Nothing is skipped silently, but the heads that only training needs."""
    values = arrays_of(models[1])
    values["resnet/kernel"] = values.pop("spatial_net/Conv/weights")
    path = str(tmp_path / "other.npz")
    np.savez(path, **values)
    told = r"missing 1 \(spatial_net/Conv/weights\); extra 1 \(resnet"
    for model in models:
        with pytest.raises(UserError, match=told):
            weights.load(model, path)


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
