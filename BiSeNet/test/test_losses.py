"""Losses over the pixels that count, and the figures of an evaluation."""

import numpy as np
import pytest
import tensorflow as tf

from BiSeNet import losses, metrics
from BiSeNet.classes import UNKNOWN, Classes

TABLE = [1.0, 2.0, 0.5] + [0.0] * 253
CLASSES = Classes(("Road", "Car", "Void"), ((1, 1, 1), (2, 2, 2), (0, 0, 0)))


def samples(count: int = 2) -> tuple[list, tf.Tensor]:
    """Logits of three heads and labels with some unknown pixels."""
    rng = np.random.RandomState(0)
    outputs = [
        tf.constant(rng.normal(size=(count, 8, 9, 3)), tf.float32)
        for _ in range(3)
    ]
    labels = rng.randint(0, 3, (count, 8, 9)).astype(np.int32)
    labels[:, :2] = UNKNOWN
    return outputs, tf.constant(labels)


def test_cross_entropy_is_tensorflow_s() -> None:
    """Each head's mean over weighted pixels; their sum is the loss."""
    outputs, labels = samples()
    weights = losses.pixel_weights(TABLE, labels)
    terms = losses.segmentation_losses(outputs, labels, weights)
    # TensorFlow's own refuses 255; the class in its place has weight 0.
    known = tf.minimum(labels, 2)
    for head, logits in zip(losses.HEADS, outputs):
        entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(
            known, logits
        )
        wanted = np.average(entropies, weights=weights)
        np.testing.assert_allclose(terms[f"{head}_loss"], wanted, rtol=1e-5)
    total = sum(float(terms[f"{head}_loss"]) for head in losses.HEADS)
    assert float(terms["total_loss"]) == pytest.approx(total, rel=1e-6)


def test_what_is_ignored_does_not_matter() -> None:
    """No gradient comes from there, and nothing at all from no pixel."""
    outputs, labels = samples()
    weights = losses.pixel_weights(TABLE, labels)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        terms = losses.segmentation_losses(outputs, labels, weights)
    for gradient in tape.gradient(terms["total_loss"], outputs):
        assert not gradient[:, :2].numpy().any()
        assert gradient[:, 2:].numpy().any(-1).all()
    nothing = losses.segmentation_losses(outputs, labels, 0.0 * weights)
    assert float(nothing["total_loss"]) == 0.0


def test_ranks_share_one_mean() -> None:
    """Ranks with unequal numbers of known pixels: gradients average."""
    outputs, labels = samples(2)
    labels = tf.concat([labels[:1], labels[1:] * 0 + UNKNOWN], 0)
    # A rank with one known pixel: a mean of means would be far off.
    labels = tf.tensor_scatter_nd_update(labels, [[1, 0, 0]], [1])
    weights = losses.pixel_weights(TABLE, labels)
    whole = losses.segmentation_losses(outputs, labels, weights)
    shares = [float(tf.reduce_sum(weights[i])) for i in range(2)]

    def mean_of_ranks(tensors):
        assert float(tensors[0]) in shares
        return [tf.constant(sum(shares) / 2)] * len(tensors)

    parts = [
        losses.segmentation_losses(
            [logits[i : i + 1] for logits in outputs],
            labels[i : i + 1],
            weights[i : i + 1],
            mean_of_ranks=mean_of_ranks,
        )["total_loss"]
        for i in range(2)
    ]
    np.testing.assert_allclose(np.mean(parts), whole["total_loss"], rtol=1e-5)


def test_ohem_keeps_the_hard_pixels() -> None:
    """Those below the threshold, and of easy pictures the hardest few."""
    rng = np.random.RandomState(1)
    entropies = tf.constant(rng.uniform(0, 2, (2, 8, 8)), tf.float32)
    weights = tf.concat([tf.zeros([2, 2, 8]), tf.ones([2, 6, 8])], 1)
    kept = losses.hard_pixels(entropies, weights, np.exp(-0.5))
    hard = (entropies >= 0.5) & (weights > 0.0)
    np.testing.assert_array_equal(kept, tf.cast(hard, tf.float32))
    few = losses.hard_pixels(entropies * 1e-3, weights, 0.7)
    least = 64 // losses.OHEM_LEAST
    np.testing.assert_array_equal(tf.reduce_sum(few, [1, 2]), [least] * 2)
    hardest = np.sort((entropies * weights)[0].numpy().ravel())[-least:]
    chosen = entropies[0].numpy()[few[0].numpy() > 0]
    np.testing.assert_array_equal(np.sort(chosen), hardest)


def test_totals_leave_unknown_pixels_out() -> None:
    """Void is in the confusion, for the reference's figure; 255 is not."""
    _, labels = samples()
    scores = tf.one_hot(tf.where(labels == UNKNOWN, 0, labels), 3) * 9.0
    totals = metrics.picture_totals(scores, labels, [2])
    known = labels.numpy()[labels.numpy() != UNKNOWN]
    np.testing.assert_array_equal(
        np.diag(totals["confusion"]), np.bincount(known, minlength=3)
    )
    assert float(totals["pixels"]) == (known < 2).sum()
    assert float(tf.reduce_sum(totals["confusion"])) == known.size


def test_figures_by_hand() -> None:
    """With Void as a class as the reference counts, and without."""
    confusion = np.array([[6, 2, 2], [1, 3, 0], [4, 0, 2]])
    totals = {"pixels": 14.0, "cross_entropy": 7.0, "confusion": confusion}
    table = metrics.figures(totals, CLASSES._replace(ignored=(2,)))
    # Void's row is out; what was taken for Void stays an error.
    assert table["iou_per_class"] == [6 / 11, 3 / 6, None]
    assert table["mean_iou"] == pytest.approx((6 / 11 + 3 / 6) / 2)
    assert table["pixel_accuracy"] == 9 / 14
    assert table["mean_accuracy"] == pytest.approx((0.6 + 0.75) / 2)
    assert table["cross_entropy"] == 0.5
    everything = (6 / 15 + 3 / 6 + 2 / 8) / 3
    assert table["mean_iou_all_classes"] == pytest.approx(everything)
    table = metrics.figures(totals, CLASSES)
    assert table["mean_iou"] == table["mean_iou_all_classes"]


def test_an_absent_class_is_left_out() -> None:
    """Neither in the labels nor predicted: no 0 in the mean."""
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    totals = {"pixels": 10.0, "cross_entropy": 1.0, "confusion": confusion}
    table = metrics.figures(totals, CLASSES)
    assert table["iou_per_class"] == [3 / 6, 4 / 7, None]
    assert table["mean_iou"] == pytest.approx((3 / 6 + 4 / 7) / 2)


def test_table_names_the_classes() -> None:
    """A row for each class by its name."""
    table = {"mean_iou": 0.5, "iou_per_class": [0.25, None]}
    shown = metrics.format_table(table, ("Road", "Void"))
    assert [line.split() for line in shown.splitlines()] == [
        ["mean_iou", "0.5000"],
        ["iou_per_class"],
        ["Road", "0.2500"],
        ["Void", "-"],
    ]
