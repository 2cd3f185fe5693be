"""Figures of merit of a segmentation, from totals that can be added up.

`picture_totals` is graph code and gives sums; sums of different ranks can be
averaged and still give the same figures, which `figures` computes.
"""

import numpy as np
import tensorflow as tf

from ROI_FCN import losses


def picture_totals(
    logits: tf.Tensor, labels: tf.Tensor, valid: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Sums over a batch.

    Args:
      logits: [N, H, W, C], float32.
      labels: [N, H, W], class ids.
      valid: [N, H, W], 1 where a pixel counts.

    Returns:
      `pictures` (count), `cross_entropy` (sum of the pictures' means),
      `confusion` [C, C] (pixels; rows are the true classes). All float32.
    """
    # Invalid pixels keep their place with weight 0, which keeps shapes static.
    confusion = tf.math.confusion_matrix(
        tf.reshape(labels, [-1]),
        tf.reshape(tf.argmax(logits, -1), [-1]),
        logits.shape[-1],
        weights=tf.reshape(valid, [-1]),
        dtype=tf.float32,
    )
    entropies = losses.cross_entropy(logits, labels, valid)
    return {
        "pictures": tf.cast(tf.shape(entropies)[0], tf.float32),
        "cross_entropy": tf.reduce_sum(entropies),
        "confusion": confusion,
    }


def no_totals(classes: int) -> dict[str, np.ndarray]:
    """What picture_totals adds to: the totals of no picture at all."""
    return {
        "pictures": np.zeros([]),
        "cross_entropy": np.zeros([]),
        "confusion": np.zeros([classes, classes]),
    }


def _mean(values: np.ndarray) -> float:
    """The mean of what is not NaN, 0 where there is nothing."""
    # An absent class says nothing about the network: left out, not 0.
    present = values[np.isfinite(values)]
    return float(present.mean()) if present.size else 0.0


def figures(totals: dict[str, np.ndarray]) -> dict[str, object]:
    """Turns totals into the table of an evaluation.

    Returns:
      IoU of each class over all pixels of all pictures together (None where
      a class neither occurs nor is predicted), the mean over classes, the
      mean without background, pixel accuracy, and the mean cross-entropy of
      a picture.
    """
    # Float64: a float32 sum stops counting single pixels at 2**24.
    confusion = np.asarray(totals["confusion"], np.float64)
    hits = np.diag(confusion)
    unions = confusion.sum(0) + confusion.sum(1) - hits
    iou = np.where(unions > 0, hits / np.maximum(unions, 1.0), np.nan)
    return {
        "cross_entropy": float(totals["cross_entropy"] / totals["pictures"]),
        "pixel_accuracy": float(hits.sum() / max(confusion.sum(), 1.0)),
        # The ROI gives the background away: it flatters every mean.
        "mean_foreground_iou": _mean(iou[1:]),
        "mean_iou": _mean(iou),
        # The reference weighs pictures by their unions: the same number.
        "iou_per_class": [
            float(value) if np.isfinite(value) else None for value in iou
        ],
    }


def format_table(
    evaluation: dict[str, object], class_names: tuple[str, ...]
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
