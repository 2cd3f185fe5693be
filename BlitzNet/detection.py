"""From the network's boxes to detections: decoding and suppression.

Graph code of static shape, built from operations that TFLite and ONNX have
too, so that exports can hold it.
"""

from typing import NamedTuple

import tensorflow as tf
from absl import flags

from BlitzNet import anchors

FLAGS = flags.FLAGS


class Limits(NamedTuple):
    """How many detections are kept; see the flags of evaluate.py."""

    # The reference's values; but for 50 and 0 they are SSD's as well.
    conf_thresh: float = 0.01
    nms_thresh: float = 0.45
    top_k_nms: int = 400
    top_k_after_nms: int = 50
    top_k_post_nms: int = 200
    eval_min_conf: float = 0.0

    @classmethod
    def of(cls, values: dict[str, object]) -> "Limits":
        """The limits that the flags of a run fix."""
        return cls(**{name: values[name] for name in cls._fields})


LIMITS = Limits()
OVERLAP = "voc_iou_thresh"


def define_flags() -> None:
    """Defines the flags of what is kept, and of what counts as found."""
    real, whole = flags.DEFINE_float, flags.DEFINE_integer
    real("conf_thresh", LIMITS.conf_thresh, "Least score.", 0.0, 1.0)
    real("nms_thresh", LIMITS.nms_thresh, "Most overlap of two.", 0.0, 1.0)
    whole("top_k_nms", LIMITS.top_k_nms, "Candidates per class.", 1)
    whole("top_k_after_nms", LIMITS.top_k_after_nms, "Kept per class.", 1)
    whole("top_k_post_nms", LIMITS.top_k_post_nms, "Kept per picture.", 1)
    real("eval_min_conf", LIMITS.eval_min_conf, "Least score kept.", 0.0, 1.0)
    real(OVERLAP, 0.5, "Overlap above which an object is found.", 0.0, 1.0)


def given_flags() -> dict[str, object]:
    """Those of the flags above that the command line gives."""
    names = (*Limits._fields, OVERLAP)
    return {name: FLAGS[name].value for name in names if FLAGS[name].present}


class Detections(NamedTuple):
    """The detections of a picture, best first.

    Attributes:
      boxes: [K, 4] float32, (top, left, bottom, right) in [0, 1].
      scores: [K] float32, 0 where there is none.
      classes: [K] int32, from 1 on; 0 where there is none.
    """

    boxes: tf.Tensor
    scores: tf.Tensor
    classes: tf.Tensor


def detect(
    confidence: tf.Tensor,
    location: tf.Tensor,
    prior_boxes: tf.Tensor,
    limits: Limits,
) -> Detections:
    """The detections in the network's outputs for one picture.

    Args:
      confidence: [A, C], logits.
      location: [A, 4], encoded.
      prior_boxes: [A, 4].
      limits: K is their top_k_post_nms, or less where that cannot be reached.
    """
    scores = tf.transpose(tf.nn.softmax(confidence)[:, 1:])
    candidates = min(limits.top_k_nms, scores.shape[1])
    # Only what has a chance is decoded.
    scores, chosen = tf.math.top_k(scores, candidates)
    boxes = anchors.decode(
        tf.gather(location, chosen), tf.gather(prior_boxes, chosen)
    )
    kept = [
        _suppress(own_boxes, own_scores, limits)
        for own_boxes, own_scores in zip(tf.unstack(boxes), tf.unstack(scores))
    ]
    boxes, scores = (tf.concat(each, 0) for each in zip(*kept))
    per_class = scores.shape[0] // len(kept)
    classes = tf.repeat(tf.range(1, len(kept) + 1), per_class)
    best = min(limits.top_k_post_nms, scores.shape[0])
    scores, order = tf.math.top_k(scores, best)
    # Scores kept are strictly above conf_thresh, so 0 marks an empty place.
    present = tf.logical_and(scores > 0.0, scores >= limits.eval_min_conf)
    return Detections(
        tf.where(present[:, tf.newaxis], tf.gather(boxes, order), 0.0),
        tf.where(present, scores, 0.0),
        tf.where(present, tf.gather(classes, order), 0),
    )


def _suppress(
    boxes: tf.Tensor, scores: tf.Tensor, limits: Limits
) -> tuple[tf.Tensor, tf.Tensor]:
    """What is kept of one class; scores of the places left over are 0."""
    # V4 is the first to pad to a fixed size. Scores and overlaps count where
    # they are strictly above their thresholds, as in the reference.
    selected, count = tf.raw_ops.NonMaxSuppressionV4(
        boxes=boxes,
        scores=scores,
        max_output_size=limits.top_k_after_nms,
        iou_threshold=limits.nms_thresh,
        score_threshold=limits.conf_thresh,
        pad_to_max_output_size=True,
    )
    selected = tf.ensure_shape(selected, [limits.top_k_after_nms])
    kept = tf.range(limits.top_k_after_nms) < count
    return tf.gather(boxes, selected), tf.where(
        kept, tf.gather(scores, selected), 0.0
    )
