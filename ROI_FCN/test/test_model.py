"""The network and its losses against numbers of the TF1 reference."""

import ast
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import tensorflow as tf

from ROI_FCN import losses, metrics, visuals, weights
from ROI_FCN.model import MEAN_RGB, UpsampleTo, create_model, deepest_size
from ROI_FCN.optimizer import FusedAdam


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
    """The inputs, labels and valid maps that a golden file was made from."""
    shape, seed = golden["input_shape"], int(golden["seed"])
    images = np.random.RandomState(seed).uniform(0, 255, shape)
    labels = np.random.RandomState(seed + 1).randint(0, 4, shape[:3])
    roi = np.zeros((*shape[:3], 1), np.float32)
    for index, box in enumerate(golden["roi_rects_y0x0y1x1"]):
        top, left, bottom, right = box
        roi[index, top:bottom, left:right] = 1.0
    inputs = [tf.constant(images, tf.float32), tf.constant(roi)]
    return inputs, tf.constant(labels), tf.ones(shape[:3])


def golden_files(folder: Path) -> list:
    """Files that hold logits; the evaluation has a file of its own."""
    found = []
    for path in sorted(folder.glob("golden*.npz")):
        with np.load(path) as golden:
            if "logits" in golden.files:
                found.append((path.name, dict(golden)))
    return found


def fill(network: tf.keras.Model, golden: dict[str, np.ndarray]) -> None:
    """Gives every variable the reference's value."""
    sources = [str(name) for name in golden["var_fill_names"]]
    variables = weights.named_variables(network).values()
    for source, variable in zip(sources, variables):
        variable.assign(golden_fill(source, tuple(variable.shape)))


@pytest.fixture(scope="module")
def network() -> tf.keras.Model:
    """The full network; tests fill it."""
    return create_model()[0]


def test_variables_are_the_reference_s(
    network: tf.keras.Model, goldens: Path, found: Callable[[list], list]
) -> None:
    """Same names, same shapes, same order."""
    for name, golden in found(golden_files(goldens)):
        ours = weights.named_variables(network)
        assert list(ours) == [str(each) for each in golden["var_names"]], name
        shapes = [ast.literal_eval(str(each)) for each in golden["var_shapes"]]
        assert [tuple(v.shape) for v in ours.values()] == shapes, name
    assert network.count_params() == 136_670_408


def test_logits_losses_gradients_and_steps(
    network: tf.keras.Model, goldens: Path, found: Callable[[list], list]
) -> None:
    """Logits to 1e-4 of their maximum, norms to 1e-3, Adam's to 1e-5."""
    variables = list(weights.named_variables(network).values())
    for name, golden in found(golden_files(goldens)):
        fill(network, golden)
        inputs, labels, valid = golden_batch(golden)

        def forward(inputs=inputs, labels=labels, valid=valid):
            logits = network(inputs, training=True)
            terms = losses.segmentation_losses(logits, labels, valid)
            return logits, terms["total_loss"]

        optimizer = FusedAdam(1e-5, epsilon=1e-8)
        # Keras 2.6 has no build(): it makes the slots in the first step.
        getattr(optimizer, "build", lambda _: None)(variables)
        for step in range(3):
            with tf.GradientTape() as tape:
                logits, loss = forward()
            key = f"loss_after_adam_{step}" if step else "loss"
            np.testing.assert_allclose(loss, golden[key], 1e-5, err_msg=name)
            if step == 2:
                break
            gradients = tape.gradient(loss, variables)
            if step == 0:
                # Relative, since the logits are of the order of 500.
                error = np.abs(logits - golden["logits"]).max()
                assert error <= 1e-4 * np.abs(golden["logits"]).max(), name
                decay = losses.weight_decay_loss(weights.vgg_kernels(network))
                np.testing.assert_allclose(decay, golden["sum_weights"], 1e-5)
                total = loss + 5e-4 * decay
                np.testing.assert_allclose(total, golden["loss_plus_wd"], 1e-5)
                norms = [float(tf.norm(gradient)) for gradient in gradients]
                np.testing.assert_allclose(norms, golden["grad_norms"], 1e-3)
            optimizer.apply_gradients(zip(gradients, variables))


@pytest.mark.parametrize("size", [(75, 107), (32, 33), (97, 64)])
def test_any_size_and_the_trainer(size: tuple) -> None:
    """Odd sizes too; the trainer with masks of ones is the network."""
    network, trainer = create_model(3, 4, 16, dropout=0.0)
    for name, variable in weights.named_variables(network).items():
        variable.assign(golden_fill(name, tuple(variable.shape)))
    rng = np.random.RandomState(0)
    images = tf.constant(rng.uniform(0, 255, (2, *size, 3)), tf.float32)
    roi = tf.constant(rng.randint(0, 2, (2, *size, 1)), tf.float32)
    logits = network([images, roi])
    assert logits.shape == (2, *size, 3) and logits.dtype == tf.float32
    masks = tf.ones([2, 2, *deepest_size(*size), 16], tf.uint8)
    np.testing.assert_array_equal(trainer([images, roi, masks]), logits)
    dropped = trainer([images, roi, 0 * masks])
    assert np.abs(dropped - logits).max() > 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("length", [854, 851, 848, 107])
def test_upsampling_cuts_odd_sizes_as_the_reference(length: int) -> None:
    """A kernel of 16 and stride 8: columns are cut from d // 2 on."""
    layer = UpsampleTo(1, 8)
    short = -(-length // 8)
    features = tf.random.stateless_uniform([1, 2, short, 3], [0, 1])
    ours = layer([features, tf.zeros([1, 16, length, 1])])
    whole = layer([features, tf.zeros([1, 16, 8 * short, 1])])
    offset = (8 * short - length) // 2
    np.testing.assert_allclose(
        ours, whole[:, :, offset : offset + length], atol=1e-6
    )
    assert np.abs(whole).max() > 1e-3


def test_the_region_enters_through_the_valve_alone() -> None:
    """With a closed valve no pixel matters; with gates of 1 no region does."""
    network, _ = create_model(3, 4, 16, "identity")
    named = weights.named_variables(network)
    images = tf.random.stateless_uniform([1, 64, 64, 3], [0, 1], 0, 255)
    inside = tf.ones([1, 64, 64, 1])
    named["W0"].assign(tf.zeros_like(named["W0"]))
    open_valve = network([images, inside])
    np.testing.assert_array_equal(network([images, 0 * inside]), open_valve)
    named["B0"].assign(tf.zeros_like(named["B0"]))
    closed = network([images, inside])
    np.testing.assert_array_equal(network([0 * images, inside]), closed)
    assert np.abs(closed - open_valve).max() > 0.0


def test_mean_grey_is_zero_to_the_network() -> None:
    """Padding with the mean is padding with zeros, as convolutions pad."""
    network, _ = create_model(3, 4, 16)
    layer = network.get_layer("normalize")
    grey = tf.ones([1, 2, 2, 3]) * tf.constant(MEAN_RGB)
    np.testing.assert_allclose(layer(grey), 0.0, atol=1e-5)
    red = layer(tf.constant([[[[200.0, 0.0, 0.0]]]]))[0, 0, 0]
    np.testing.assert_allclose(red, [-103.939, -116.779, 76.32], rtol=1e-5)


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
    np.testing.assert_allclose(
        whole["total_loss"], inner["total_loss"], rtol=1e-6
    )
    totals = metrics.picture_totals(logits, labels, tf.constant(valid))
    assert float(tf.reduce_sum(totals["confusion"])) == 48.0
    nothing = losses.cross_entropy(logits, labels, tf.zeros([2, 6, 6]))
    np.testing.assert_array_equal(nothing, [0.0, 0.0])


def evaluation_goldens(folder: Path) -> list:
    """Golden files of the evaluation and the overlay."""
    paths = sorted(folder.glob("golden_eval*.npz"))
    return [dict(np.load(path)) for path in paths]


def test_iou_equals_the_reference_s(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Over the whole set, and picture by picture."""
    for golden in found(evaluation_goldens(goldens)):
        classes = len(golden["class_names"])
        sums = metrics.no_totals(classes)
        for number, (predicted, label) in enumerate(
            zip(golden["preds"], golden["gts"])
        ):
            logits = tf.one_hot(predicted, classes)[tf.newaxis]
            totals = metrics.picture_totals(
                logits,
                label[np.newaxis].astype(np.int32),
                tf.ones([1, *label.shape]),
            )
            alone = metrics.figures(
                {name: value.numpy() for name, value in totals.items()}
            )["iou_per_class"]
            theirs = golden["per_image_iou"][number]
            ours = [0.0 if value is None else value for value in alone]
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
            for name, value in totals.items():
                sums[name] = sums[name] + value.numpy()
        table = metrics.figures(sums)
        np.testing.assert_allclose(
            table["iou_per_class"], golden["final_iou"], rtol=1e-6
        )
        foreground = np.mean(golden["final_iou"][1:])
        np.testing.assert_allclose(table["mean_foreground_iou"], foreground)


def test_overlay_equals_the_reference_s(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Its colours for labels 0 to 17, background untouched; rounded down."""
    for golden in found(evaluation_goldens(goldens)):
        classes = golden["overlay_label"].astype(int)
        ours = visuals.overlay(golden["img"], classes, classes.max() + 1)
        theirs = golden["overlay"].astype(np.uint8)
        np.testing.assert_array_equal(ours, theirs)


def test_figures_by_hand() -> None:
    """IoU of a small confusion matrix, one class absent."""
    table = metrics.figures(
        {
            "pictures": 2.0,
            "cross_entropy": 1.0,
            "confusion": np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]),
        }
    )
    assert table["iou_per_class"] == [3 / 6, 4 / 7, None]
    assert table["mean_iou"] == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert table["mean_foreground_iou"] == pytest.approx(4 / 7)
    assert table["pixel_accuracy"] == 0.7
    assert table["cross_entropy"] == 0.5
