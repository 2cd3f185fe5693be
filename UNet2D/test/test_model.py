"""The network and its losses against numbers of the TF1 reference."""

import ast
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import UserError
from UNet2D import losses, metrics, weights
from UNet2D.model import check_input_side, covering_side, create_model


def golden_fill(name: str, shape: tuple) -> np.ndarray:
    """The reference's value of a variable, from its name and shape alone."""
    # The rule by which the golden files were made. crc32, since Python's own
    # hash of a text differs from run to run.
    rng = np.random.RandomState(zlib.crc32(name.encode("utf8")))
    if len(shape) < 2:
        return (0.1 * rng.normal(size=shape)).astype(np.float32)
    scale = np.sqrt(2.0 / np.prod(shape[:-1]))
    return (rng.normal(size=shape) * scale).astype(np.float32)


def golden_batch(golden: dict[str, np.ndarray]) -> tuple:
    """The images, labels and valid maps that a golden file was made from."""
    shape, seed = golden["input_shape"], int(golden["input_seed"])
    raw = np.random.RandomState(seed).uniform(0, 255, size=shape)
    size = golden["logits"].shape[:3]
    uniform = np.random.RandomState(seed + 1000).uniform(size=size)
    images = raw.astype(np.float32) / 127.5 - 1.0
    # 0.8 is about the share of class 1 in the EM labels.
    labels = (uniform < 0.8).astype(np.int32)
    return tf.constant(images), tf.constant(labels), tf.ones(size)


def golden_files(folder: Path) -> list:
    """Files that hold logits; the preprocessing has files of its own."""
    found = []
    for path in sorted(folder.glob("golden*.npz")):
        with np.load(path) as golden:
            if "logits" in golden.files:
                found.append((path.name, dict(golden)))
    return found


@pytest.fixture(scope="module")
def network() -> tf.keras.Model:
    """The full network with the reference's fill."""
    network, _ = create_model()
    for name, variable in weights.named_variables(network).items():
        variable.assign(golden_fill(name, tuple(variable.shape)))
    return network


def test_variables_are_the_reference_s(
    network: tf.keras.Model, goldens: Path, found: Callable[[list], list]
) -> None:
    """Same names, same shapes, same order."""
    for name, golden in found(golden_files(goldens)):
        ours = {
            variable_name: str(tuple(variable.shape))
            for variable_name, variable in weights.named_variables(
                network
            ).items()
        }
        names = [str(each) for each in golden["var_names"]]
        assert list(ours) == names, name
        shapes = [ast.literal_eval(str(each)) for each in golden["var_shapes"]]
        assert list(ours.values()) == [str(tuple(each)) for each in shapes]
    assert network.count_params() == 34_512_258


def test_logits_losses_and_gradients(
    network: tf.keras.Model, goldens: Path, found: Callable[[list], list]
) -> None:
    """Logits to 1e-4 of their maximum, losses to 1e-5, norms to 1e-3."""
    files = found(golden_files(goldens))
    variables = network.trainable_variables
    order = list(weights.named_variables(network).values())
    for name, golden in files:
        images, labels, valid = golden_batch(golden)
        with tf.GradientTape() as tape:
            logits = network(images, training=True)
            terms = losses.segmentation_losses(logits, labels, valid)
        error = np.abs(logits.numpy() - golden["logits"]).max()
        assert error <= 1e-4 * np.abs(golden["logits"]).max(), name
        for ours, theirs in (
            (terms["cross_entropy"], "ce"),
            (terms["dice_loss"], "dice_loss"),
            (terms["total_loss"], "total"),
        ):
            assert abs(float(ours) - golden[theirs]) <= 1e-5, (name, theirs)
        decay = float(losses.weight_decay_loss(variables))
        np.testing.assert_allclose(decay, golden["l2_sum"], rtol=1e-5)
        table = metrics.figures(
            {
                key: value.numpy()
                for key, value in metrics.picture_totals(
                    logits, labels, valid
                ).items()
            }
        )
        np.testing.assert_allclose(
            table["soft_dice_per_class"], golden["dice_class"], atol=1e-5
        )
        if "grad_norms" in golden:
            gradients = tape.gradient(terms["total_loss"], order)
            norms = [float(tf.norm(gradient)) for gradient in gradients]
            np.testing.assert_allclose(norms, golden["grad_norms"], rtol=1e-3)


@pytest.mark.parametrize("size", [(188, 204), (220, 188)])
def test_any_legal_size(size: tuple) -> None:
    """Non-square inputs too; classes, channels and width are free."""
    network, trainer = create_model(5, 3, 4, "he_normal")
    logits = network(tf.zeros([1, *size, 3]))
    assert logits.shape == (1, size[0] - 184, size[1] - 184, 5)
    assert logits.dtype == tf.float32
    side = [(length - 60) // 16 - 4 for length in size]
    mask = tf.ones([1, *side, 64])
    again = trainer([tf.zeros([1, *size, 3]), mask])
    np.testing.assert_array_equal(again, logits)


def test_dropout_mask_acts_on_the_bottleneck() -> None:
    """A mask of zeros leaves only what the skips carry."""
    network, trainer = create_model(2, 1, 4, "he_normal")
    images = tf.random.stateless_uniform([1, 188, 188, 1], [1, 2])
    whole = network(images)
    dropped = trainer([images, tf.zeros([1, 4, 4, 64])])
    assert np.abs(dropped - whole).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("side", "nearest"),
    [(512, "508 or 524"), (100, "188"), (256, "252 or 268"), (187, "188")],
)
def test_illegal_sizes_name_the_nearest_legal_ones(
    side: int, nearest: str
) -> None:
    """The message is what a user corrects the flag from."""
    with pytest.raises(UserError, match=f"is {side}.*{nearest}$"):
        check_input_side(side, "--image_size")


def test_covering_side() -> None:
    """The smallest legal side that covers the output."""
    for length in range(1, 60):
        side = covering_side(length)
        check_input_side(side, "side")
        assert side - 184 >= length and side - 184 - 16 < length


def test_padding_does_not_count() -> None:
    """Losses and metrics ignore pixels that are not valid."""
    rng = np.random.RandomState(0)
    logits = tf.constant(rng.normal(size=(2, 6, 6, 3)), tf.float32)
    labels = tf.constant(rng.randint(0, 3, (2, 6, 6)))
    valid = np.zeros((2, 6, 6), np.float32)
    valid[:, :4] = 1.0
    inner = losses.segmentation_losses(
        logits[:, :4], labels[:, :4], tf.ones([2, 4, 6])
    )
    whole = losses.segmentation_losses(logits, labels, tf.constant(valid))
    for name in inner:
        np.testing.assert_allclose(whole[name], inner[name], rtol=1e-6)
    totals = metrics.picture_totals(logits, labels, tf.constant(valid))
    assert float(tf.reduce_sum(totals["confusion"])) == 48.0


def test_figures_by_hand() -> None:
    """Dice and IoU of a small confusion matrix, one class absent."""
    table = metrics.figures(
        {
            "pictures": 2.0,
            "cross_entropy": 1.0,
            "soft_dice": np.array([1.0, 0.5, 0.0]),
            "confusion": np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]),
        }
    )
    assert table["iou_per_class"] == [3 / 6, 4 / 7, None]
    assert table["hard_dice_per_class"] == [6 / 9, 8 / 11, None]
    assert table["mean_iou"] == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert table["pixel_accuracy"] == 0.7
    assert table["cross_entropy"] == 0.5
