"""Figures of merit of a segmentation, from totals that can be added up.

`picture_totals` gives sums; sums of different ranks can be averaged and still
give the same figures, which `figures` computes.
"""

import numpy as np

LEAST = 1e-7  # a probability that is rounded to 0 has no logarithm


def picture_totals(
    probabilities: np.ndarray, labels: np.ndarray, valid: np.ndarray
) -> dict[str, np.ndarray]:
    """Sums over the pixels of a picture that count.

    Args:
      probabilities: [H, W, C].
      labels: [H, W], class ids.
      valid: [H, W], 1 where a pixel counts.

    Returns:
      `cross_entropy` (nats) and `confusion` [C, C] (pixels; rows are the true
      classes).
    """
    classes = probabilities.shape[-1]
    counted = valid > 0
    labels, probabilities = labels[counted], probabilities[counted]
    predicted = probabilities.argmax(-1)
    pairs = np.bincount(labels * classes + predicted, minlength=classes**2)
    chosen = np.take_along_axis(probabilities, labels[:, np.newaxis], 1)
    return {
        "cross_entropy": -np.log(np.maximum(chosen, LEAST)).sum(),
        "confusion": pairs.reshape(classes, classes),
    }


def no_totals(classes: int) -> dict[str, np.ndarray]:
    """What picture_totals adds to: the totals of no picture at all."""
    return {
        "cross_entropy": np.zeros([]),
        "confusion": np.zeros([classes, classes]),
    }


def figures(totals: dict[str, np.ndarray]) -> dict[str, object]:
    """Turns totals into the table of an evaluation.

    Returns:
      IoU of each class over all pixels of all pictures together (None where a
      class neither occurs nor is predicted), their mean, how many classes it
      is the mean of and how many occur in the labels, pixel accuracy, and the
      mean cross-entropy of a pixel.
    """
    confusion = np.asarray(totals["confusion"], np.float64)
    hits, labelled = np.diag(confusion), confusion.sum(1)
    # The VOC devkit's rule: sums over the whole split come before the ratio.
    unions = confusion.sum(0) + labelled - hits
    counted = unions > 0
    iou = hits / np.maximum(unions, 1e-12)
    pixels = max(confusion.sum(), 1e-12)
    return {
        "cross_entropy": float(totals["cross_entropy"] / pixels),
        "pixel_accuracy": float(hits.sum() / pixels),
        # What is predicted and never occurs counts as 0; what is neither says
        # nothing about the network.
        "mean_iou": float(iou[counted].mean()) if counted.any() else 0.0,
        "classes_in_mean": int(counted.sum()),
        "classes_in_labels": int((labelled > 0).sum()),
        "iou_per_class": [
            float(value) if there else None
            for value, there in zip(iou, counted)
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
