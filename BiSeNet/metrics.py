"""Figures of merit of a segmentation, from totals that can be added up.

`picture_totals` is graph code and gives sums; sums of different ranks can be
averaged and still give the same figures, which `figures` computes.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from BiSeNet import losses
from BiSeNet.classes import UNKNOWN, Classes


def picture_totals(
    scores: tf.Tensor, labels: tf.Tensor, ignored: Sequence[int]
) -> dict[str, tf.Tensor]:
    """Sums over a batch.

    Args:
      scores: logits [N, H, W, C], float32.
      labels: [N, H, W], class ids, or UNKNOWN.
      ignored: ids of classes that do not count in the cross-entropy.

    Returns:
      `pixels` (count of those that count), `cross_entropy` (their sum),
      `confusion` [C, C] (pixels of known class; rows are the true classes).
      All float32.
    """
    count = scores.shape[-1]
    known = labels != UNKNOWN
    # Unknown pixels keep their place with weight 0, so that shapes are static.
    confusion = tf.math.confusion_matrix(
        tf.reshape(tf.where(known, labels, 0), [-1]),
        tf.reshape(tf.argmax(scores, -1), [-1]),
        count,
        weights=tf.reshape(tf.cast(known, tf.float32), [-1]),
        # Exact for up to 2**24 pixels of a class in one picture.
        dtype=tf.float32,
    )
    table = [float(i < count and i not in ignored) for i in range(256)]
    weights = losses.pixel_weights(table, labels)
    entropies = losses.cross_entropy(scores, tf.one_hot(labels, count))
    return {
        "pixels": tf.reduce_sum(weights),
        "cross_entropy": tf.reduce_sum(weights * entropies),
        "confusion": confusion,
    }


def no_totals(count: int) -> dict[str, np.ndarray]:
    """What picture_totals adds to: the totals of no picture at all."""
    return {
        "pixels": np.zeros([]),
        "cross_entropy": np.zeros([]),
        "confusion": np.zeros([count, count]),
    }


def _mean(values: np.ndarray) -> float:
    """The mean of what is not NaN, 0 where there is nothing."""
    # An absent class says nothing about the network: left out, not 0.
    present = values[np.isfinite(values)]
    return float(present.mean()) if present.size else 0.0


def _share(hits: np.ndarray, out_of: np.ndarray) -> np.ndarray:
    """A ratio of counts, NaN of nothing."""
    return np.where(out_of > 0, hits / np.maximum(out_of, 1.0), np.nan)


def _iou(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class, NaN where it neither occurs nor is predicted."""
    hits = np.diag(confusion)
    return _share(hits, confusion.sum(0) + confusion.sum(1) - hits)


def figures(
    totals: dict[str, np.ndarray], classes: Classes
) -> dict[str, object]:
    """Turns totals into the table of an evaluation.

    Returns:
      `mean_iou`, the mean IoU of the classes that count, over all pixels of
      all pictures together whose true class counts; pixel accuracy and mean
      accuracy of the classes over the same pixels; the mean IoU of all
      classes as the reference computes it, which counts Void as a class; the
      cross-entropy of a pixel; and the IoU of each class (None: it neither
      occurs nor is predicted, or it is ignored).
    """
    # Float64: a float32 sum stops counting single pixels at 2**24.
    confusion = np.asarray(totals["confusion"], np.float64)
    counted = confusion.copy()
    # Rows alone: to take a pixel that counts for Void is a mistake.
    counted[list(classes.ignored)] = 0.0
    iou = _iou(counted)
    iou[list(classes.ignored)] = np.nan
    hits = np.diag(counted)
    return {
        "cross_entropy": float(
            totals["cross_entropy"] / np.maximum(totals["pixels"], 1.0)
        ),
        "pixel_accuracy": float(hits.sum() / max(counted.sum(), 1.0)),
        "mean_accuracy": _mean(_share(hits, counted.sum(1))),
        "mean_iou_all_classes": _mean(_iou(confusion)),
        "mean_iou": _mean(iou),
        "iou_per_class": [
            float(value) if np.isfinite(value) else None for value in iou
        ],
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
            shown = "        -" if each is None else f"{each:9.4f}"
            rows.append(f"    {class_name:<22}{shown}")
    return "\n".join(rows)
