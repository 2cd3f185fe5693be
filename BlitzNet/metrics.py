"""Figures of merit of detection and segmentation.

Detections are matched picture by picture; average precision and IoU are
taken over the whole set at once.
"""

from collections.abc import Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

from BlitzNet import anchors
from BlitzNet.augment import UNLABELLED
from BlitzNet.pictures import Objects

HIT, FALSE, IGNORED = 1, 0, -1  # what becomes of a detection
ELEVEN = np.linspace(0.0, 1.0, 11)  # recalls of VOC 2007's measure
HUNDRED = np.linspace(0.0, 1.0, 101)  # of COCO's
COCO_OVERLAPS = np.linspace(0.5, 0.95, 10)


def confusion(predicted: tf.Tensor, mask: tf.Tensor, count: int) -> tf.Tensor:
    """Pixels [C, C] by true and predicted class, float32.

    Args:
      predicted: class ids of any shape.
      mask: as many, UNLABELLED where a pixel does not count.
      count: number of classes.
    """
    counted = mask != UNLABELLED
    # They keep their place with weight 0, which keeps shapes static.
    return tf.math.confusion_matrix(
        tf.reshape(tf.where(counted, mask, 0), [-1]),
        tf.reshape(predicted, [-1]),
        count,
        weights=tf.reshape(tf.cast(counted, tf.float32), [-1]),
        dtype=tf.float32,
    )


def match(
    boxes: np.ndarray,
    classes: np.ndarray,
    objects: Objects,
    overlap: float,
) -> np.ndarray:
    """What becomes of each detection of a picture, [K, 1 + 10] int8.

    A detection belongs to the object of its class that it overlaps most. The
    first for an object is a hit, others are false; those of difficult objects
    are ignored. The first column is VOC's, for which the overlap must be
    larger than `overlap`; the others are for COCO_OVERLAPS or more.

    Args:
      boxes: [K, 4], (top, left, bottom, right), best first.
      classes: [K], 0 where there is no detection.
      objects: the truth.
      overlap: see above.
    """
    results = np.zeros((len(boxes), 1 + len(COCO_OVERLAPS)), np.int8)
    results[classes == 0] = IGNORED
    if not len(objects.labels) or not len(boxes):
        return results
    near = boxes[:, 1::-1]
    own = np.concatenate([near, boxes[:, :1:-1] - near], 1)
    # Without the pixel that VOC's devkit adds to sides: so the reference does.
    table = anchors.overlaps(
        tf.constant(own, tf.float32), tf.constant(objects.boxes)
    ).numpy()
    table[classes[:, np.newaxis] != objects.labels] = -1.0
    best, largest = table.argmax(1), table.max(1)
    enough = [largest > overlap]
    enough += [largest >= each - 1e-9 for each in COCO_OVERLAPS]
    for column, found in enumerate(enough):
        results[found & objects.difficult[best], column] = IGNORED
        # COCO itself lets a second claim go on to the next free object: its
        # own figures may be a little higher.
        claims = np.flatnonzero(found & ~objects.difficult[best])
        # The first of each is the best, since boxes come by falling score.
        _, first = np.unique(best[claims], return_index=True)
        results[claims[first], column] = HIT
    return results


def precision_and_recall(
    scores: np.ndarray, results: np.ndarray, objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection, from the best on.

    Args:
      scores: [n].
      results: [n], HIT, FALSE or IGNORED.
      objects: how many there are, without difficult ones.
    """
    # Stable: equal scores keep the pictures' order for any number of ranks.
    order = np.argsort(-scores, kind="stable")
    order = order[results[order] != IGNORED]
    hits = np.cumsum(results[order] == HIT)
    precision = hits / np.arange(1, len(order) + 1)
    return precision, hits / max(objects, 1)


def average_precision(
    precision: np.ndarray,
    recall: np.ndarray,
    recalls: Optional[np.ndarray] = None,
) -> float:
    """Area under the curve, or its mean at some recalls.

    Precision counts as the largest at this recall or a higher one.
    """
    if not len(precision):
        return 0.0
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if recalls is None:
        return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
    # linspace's 0.3 is larger than 3 / 10, hence the margin. Recalls that are
    # never reached find the 0 at the end.
    place = np.searchsorted(recall, recalls - 1e-12)
    return float(np.append(envelope, 0.0)[place].mean())


def _mean(values: Sequence[Optional[float]]) -> float:
    """The mean of what is not None, 0 where there is nothing."""
    # An absent class says nothing about the network: left out, not 0.
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else 0.0


def detection_figures(
    scores: np.ndarray,
    classes: np.ndarray,
    results: np.ndarray,
    objects: np.ndarray,
) -> dict[str, object]:
    """Average precisions over all pictures.

    Args:
      scores: [n] of all detections.
      classes: [n].
      results: [n, 1 + 10]; see `match`.
      objects: [C], how many objects of each class there are.

    Returns:
      Means over the classes that occur: `map_area` (VOC 2012), `map_11_point`
      (VOC 2007), `map_coco`, and the first of them by class (None where a
      class does not occur).
    """
    area, eleven, coco = [], [], []
    for class_ in range(1, len(objects)):
        own = classes == class_
        curves = [
            precision_and_recall(scores[own], column, int(objects[class_]))
            for column in results[own].T
        ]
        if objects[class_] == 0:
            area.append(None)
            eleven.append(None)
            continue
        area.append(average_precision(*curves[0]))
        eleven.append(average_precision(*curves[0], ELEVEN))
        coco += [average_precision(*curve, HUNDRED) for curve in curves[1:]]
    return {
        "map_area": _mean(area),
        "map_11_point": _mean(eleven),
        "map_coco": _mean(coco),
        "ap_per_class": [None, *area],
    }


def segmentation_figures(table: np.ndarray) -> dict[str, object]:
    """Figures from the confusion [C, C] of all pictures.

    Returns:
      `mean_iou` over the classes that occur or are predicted, the accuracy
      of pixels, and the IoU of each class (None where it is neither).
    """
    # Float64: a float32 sum stops counting single pixels at 2**24.
    table = np.asarray(table, np.float64)
    hits = np.diag(table)
    unions = table.sum(0) + table.sum(1) - hits
    iou = [
        float(hit / union) if union else None
        for hit, union in zip(hits, unions)
    ]
    return {
        "mean_iou": _mean(iou),
        "pixel_accuracy": float(hits.sum() / max(table.sum(), 1.0)),
        "iou_per_class": iou,
    }


def format_table(
    evaluation: dict[str, object], class_names: Sequence[str]
) -> str:
    """An evaluation as a table: its figures, then a row for each class."""
    rows = []
    for name, value in evaluation.items():
        if not isinstance(value, list):
            rows.append(f"  {name:<24}{value:9.4f}")
            continue
        rows.append(f"  {name}")
        for class_name, each in zip(class_names, value):
            shown = "   absent" if each is None else f"{each:9.4f}"
            rows.append(f"    {class_name:<22}{shown}")
    return "\n".join(rows)
