"""Decoding, suppression and average precision."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from BlitzNet import anchors, detection, metrics
from BlitzNet.detection import Limits
from BlitzNet.model import Architecture
from BlitzNet.pictures import Objects, no_objects


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, np.ndarray]:
    """What the reference makes of random outputs."""
    path = goldens / "nms_golden.npz"
    if not path.exists():
        pytest.skip("no nms_golden.npz in --goldens")
    return dict(np.load(path))


@pytest.mark.parametrize("case", "ABCD")
def test_detections_are_the_reference_s(
    golden: dict[str, np.ndarray], case: str
) -> None:
    """Boxes in pixels, scores and classes, in the same order; D has none."""
    prior_boxes = tf.constant(anchors.priors(Architecture()))
    rng = np.random.RandomState(int(golden[f"{case}_seed"]))
    location = rng.normal(size=(45390, 4)).astype(np.float32)
    scale = golden[f"{case}_scale"]
    confidence = (scale * rng.normal(size=(45390, 21))).astype(np.float32)
    confidence[:, 0] += golden[f"{case}_bg"]
    decoded = anchors.decode(tf.constant(location), prior_boxes)
    np.testing.assert_allclose(
        decoded[::10], golden[f"{case}_decoded_yxyx_stride10"], atol=1e-5
    )
    least = float(golden[f"{case}_eval_min_conf"])
    found = detection.detect(
        tf.constant(confidence),
        tf.constant(location),
        prior_boxes,
        Limits(eval_min_conf=least),
    )
    assert found.boxes.shape == (200, 4)
    present = found.classes.numpy() > 0
    scores = golden[f"{case}_det_scores"]
    assert present.sum() == len(scores)
    assert not found.scores.numpy()[~present].any()
    if not len(scores):
        return
    np.testing.assert_allclose(found.scores[: len(scores)], scores, atol=1e-6)
    top, left, bottom, right = found.boxes.numpy()[present].T
    width, height = golden[f"{case}_wh"]
    pixels = np.stack([left, top, right - left, bottom - top], 1)
    np.testing.assert_allclose(
        pixels * [width, height, width, height],
        golden[f"{case}_det_xywh_pixels"],
        atol=2e-3,
    )
    np.testing.assert_array_equal(
        found.classes.numpy()[present], golden[f"{case}_det_cats"]
    )


def objects_of(*rows: tuple) -> Objects:
    """Objects from (left, top, width, height, class, difficult)."""
    table = np.array(rows, np.float32)
    return Objects(table[:, :4], table[:, 4].astype(np.int32), table[:, 5] > 0)


def test_matching() -> None:
    """The first for an object is a hit; difficult objects do not count."""
    objects = objects_of(
        (0.1, 0.1, 0.2, 0.2, 1, 0),
        (0.5, 0.5, 0.2, 0.2, 1, 1),
        (0.1, 0.6, 0.2, 0.2, 2, 0),
    )
    boxes = np.array(
        [
            (0.1, 0.1, 0.3, 0.3),  # the first object
            (0.1, 0.1, 0.3, 0.29),  # the same again
            (0.5, 0.5, 0.7, 0.7),  # the difficult one
            (0.6, 0.1, 0.8, 0.3),  # there is another class
            (0.6, 0.1, 0.8, 0.2),  # half of an object: not more than half
            (0.0, 0.0, 0.0, 0.0),  # none
        ],
        np.float32,
    )
    classes = np.array([1, 1, 1, 1, 2, 0])
    results = metrics.match(boxes, classes, objects, 0.5)
    assert results[:, 0].tolist() == [1, 0, -1, 0, 0, -1]
    assert results[0].tolist() == [1] * 11
    empty = metrics.match(boxes, classes, no_objects(), 0.5)
    assert empty[:, 0].tolist() == [0, 0, 0, 0, 0, -1]


def test_average_precision() -> None:
    """By hand: hits at ranks 1 and 3 of three objects."""
    scores = np.array([0.5, 0.9, 0.7, 0.6])
    results = np.array([1, 1, 0, -1])
    precision, recall = metrics.precision_and_recall(scores, results, 3)
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(recall, [1 / 3, 1 / 3, 2 / 3])
    area = metrics.average_precision(precision, recall)
    assert area == pytest.approx(1 / 3 + 2 / 3 / 3)
    # Recalls 0 to 0.3 have precision 1, 0.4 to 0.6 two thirds, others none.
    eleven = metrics.average_precision(precision, recall, metrics.ELEVEN)
    assert eleven == pytest.approx((4 + 3 * 2 / 3) / 11)
    nothing = metrics.precision_and_recall(np.zeros(0), np.zeros(0), 3)
    assert metrics.average_precision(*nothing) == 0.0


def test_figures_leave_absent_classes_out() -> None:
    """Perfect detections of two classes of four: a mean of 1."""
    scores, classes = np.array([0.9, 0.8]), np.array([1, 3])
    results = np.ones((2, 11), np.int8)
    table = metrics.detection_figures(
        scores, classes, results, np.array([0, 1, 0, 1])
    )
    assert table["ap_per_class"] == [None, 1.0, None, 1.0]
    for name in ("map_area", "map_11_point", "map_coco"):
        assert table[name] == pytest.approx(1.0)
    table = metrics.segmentation_figures(
        np.array([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    )
    assert table["iou_per_class"] == [0.75, 4 / 6, None]
    assert table["mean_iou"] == pytest.approx((0.75 + 4 / 6) / 2)


def test_ignored_pixels_do_not_count() -> None:
    """Whatever is predicted there."""
    mask = tf.constant([[0, 1, 255], [1, 255, 0]])
    predicted = tf.constant([[0, 1, 2], [0, 1, 1]])
    table = metrics.confusion(predicted, mask, 3).numpy()
    assert table.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
