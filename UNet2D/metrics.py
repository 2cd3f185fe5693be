"""Figures of merit of a segmentation, from totals that can be added up.

`picture_totals` is graph code and gives sums; sums of different ranks can be
averaged and still give the same figures, which `figures` computes.
"""

import numpy as np
import tensorflow as tf

from UNet2D import losses


def picture_totals(
    logits: tf.Tensor, labels: tf.Tensor, valid: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Sums over a batch.

    Args:
      logits: [N, H, W, C], float32.
      labels: [N, H, W], class ids.
      valid: [N, H, W], float32, 1 where a pixel counts.

    Returns:
      `pictures` (count), `cross_entropy` (sum of the pictures' means),
      `soft_dice` [C] (sum over pictures), `confusion` [C, C] (pixels; rows
      are the true classes). All float32.
    """
    classes = logits.shape[-1]
    one_hot = tf.one_hot(labels, classes)
    entropies = losses.cross_entropy(logits, one_hot, valid)
    # Invalid pixels keep their place with weight 0, which keeps shapes static.
    confusion = tf.math.confusion_matrix(
        tf.reshape(labels, [-1]),
        tf.reshape(tf.argmax(logits, -1), [-1]),
        classes,
        weights=tf.reshape(valid, [-1]),
        dtype=tf.float32,
    )
    dice = losses.soft_dice(tf.nn.softmax(logits), one_hot, valid)
    return {
        "pictures": tf.constant(float(logits.shape[0])),
        "cross_entropy": tf.reduce_sum(entropies),
        "soft_dice": tf.reduce_sum(dice, axis=0),
        "confusion": confusion,
    }


def no_totals(classes: int) -> dict[str, np.ndarray]:
    """What picture_totals adds to: the totals of no picture at all."""
    return {
        "pictures": np.zeros([]),
        "cross_entropy": np.zeros([]),
        "soft_dice": np.zeros([classes]),
        "confusion": np.zeros([classes, classes]),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where a class neither occurs nor is predicted."""
    return np.where(whole > 0, part / np.maximum(whole, 1e-30), np.nan)


def figures(totals: dict[str, np.ndarray]) -> dict[str, object]:
    """Turns totals into the table of an evaluation.

    Returns:
      Means over pictures for the reference's soft figures, and figures of
      all pixels together for hard Dice and IoU: lists with one value a class
      (NaN as None where a class is absent) and their means.
    """
    # Float64: a float32 sum stops counting single pixels at 2**24.
    confusion = np.asarray(totals["confusion"], np.float64)
    hits = np.diag(confusion)
    sizes = confusion.sum(0) + confusion.sum(1)
    per_class = {
        "soft_dice": np.asarray(totals["soft_dice"]) / totals["pictures"],
        "hard_dice": _ratio(2 * hits, sizes),
        "iou": _ratio(hits, sizes - hits),
    }
    table = {
        "cross_entropy": float(totals["cross_entropy"] / totals["pictures"]),
        "pixel_accuracy": float(hits.sum() / max(confusion.sum(), 1.0)),
    }
    for name, values in per_class.items():
        # An absent class says nothing about the network: left out, not 0.
        mean = np.nanmean(values) if np.isfinite(values).any() else 0.0
        table[f"mean_{name}"] = float(mean)
        table[f"{name}_per_class"] = [
            float(value) if np.isfinite(value) else None for value in values
        ]
    return table


def format_table(evaluation: dict[str, object]) -> str:
    """An evaluation as a table: one row a figure, one column a class."""
    rows = []
    for name, value in evaluation.items():
        values = value if isinstance(value, list) else [value]
        cells = ["   absent" if v is None else f"{v:9.4f}" for v in values]
        rows.append(f"  {name:<24}{''.join(cells)}")
    return "\n".join(rows)
