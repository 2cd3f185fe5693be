"""The losses of detection and segmentation, as graph code of static shape.

Pure functions on float32 tensors. Counts are taken over all ranks, so that
two ranks compute what one of twice the batch does: `mean` gives means of a
list of tensors over the ranks.
"""

from collections.abc import Sequence
from typing import Callable, NamedTuple

import tensorflow as tf

# SSD's ratio, which the reference keeps.
NEGATIVES = 3  # hard negatives per positive


class Ranks(NamedTuple):
    """How losses see the other ranks; by default there are none."""

    mean: Callable[[list], list] = list
    rank: int = 0
    size: int = 1

    def total(self, tensor: tf.Tensor) -> tf.Tensor:
        """The sum of a tensor over the ranks."""
        return self.mean([tensor])[0] * self.size

    def gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensors of all ranks, [size, *shape]."""
        # By a sum, since means are all that a Runtime offers.
        own = tf.one_hot(self.rank, self.size)
        shape = [self.size] + [1] * tensor.shape.rank
        return self.total(tf.reshape(own, shape) * tensor)


ALONE = Ranks()


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Cross-entropy [...] of logits [..., C] and class ids [...], in nats."""
    # On maps this takes a third less time than the sparse operation.
    chosen = tf.one_hot(labels, logits.shape[-1])
    return tf.reduce_logsumexp(logits, -1) - tf.reduce_sum(chosen * logits, -1)


def smooth_l1(difference: tf.Tensor) -> tf.Tensor:
    """Half the square up to 1, beyond it the distance less one half."""
    distance = tf.abs(difference)
    return tf.where(distance < 1.0, 0.5 * tf.square(distance), distance - 0.5)


def hard_negatives(
    entropies: tf.Tensor, positives: tf.Tensor, count: tf.Tensor, ranks: Ranks
) -> tf.Tensor:
    """1 for the `count` negatives of largest loss in the batch, else 0.

    Args:
      entropies: [N, A].
      positives: [N, A], float32 of 0 and 1.
      count: how many, over all ranks; less than A.
      ranks: the batch is that of all ranks together.
    """
    # Entropies are positive: positives come last.
    everywhere = ranks.gather(
        # Not every adapter's collectives have a gradient; none is needed.
        tf.stop_gradient(tf.where(positives > 0, -1.0, entropies))
    )
    # With P positives among A boxes, 3 P or A - P are never more than that.
    most = -(-3 * entropies.shape[1] // 4)
    order = tf.math.top_k(tf.reshape(everywhere, [-1]), most).indices
    taken = tf.cast(tf.range(order.shape[0]), tf.float32) < count
    chosen = tf.scatter_nd(
        order[:, tf.newaxis],
        tf.cast(taken, tf.float32),
        [everywhere.shape.num_elements()],
    )
    return tf.reshape(chosen, everywhere.shape)[ranks.rank]


def detection_losses(
    confidence: tf.Tensor,
    location: tf.Tensor,
    classes: tf.Tensor,
    boxes: tf.Tensor,
    ranks: Ranks = ALONE,
) -> dict[str, tf.Tensor]:
    """Loss terms of the detection head.

    The reference mines NEGATIVES hard negatives per positive over the whole
    batch, at most as many as one picture has negatives, and divides by the
    positives.

    Args:
      confidence: [N, A, C] logits.
      location: [N, A, 4], encoded.
      classes: [N, A] targets, 0 for the background.
      boxes: [N, A, 4] targets, encoded; only those of positives matter.
      ranks: over which counts are taken.

    Returns:
      `class` and `bbox`, and the shares `accuracy`, `precision`, `recall`.
    """
    positives = tf.cast(classes > 0, tf.float32)
    found = ranks.total(tf.reduce_sum(positives))
    # The reference's cap, though A is one picture's boxes and the batch has
    # more: with very many positives it falls below 0, and none is mined.
    mined = tf.minimum(NEGATIVES * found, confidence.shape[1] - found)
    entropies = cross_entropy(confidence, classes)
    negatives = hard_negatives(entropies, positives, mined, ranks)
    # A rank's share of a sum over all, times their number: ranks average.
    share = ranks.size / tf.maximum(found, 1.0)
    distances = tf.reduce_sum(smooth_l1(location - boxes), -1)
    # Targets made elsewhere may hold infinite offsets where no object is.
    distances = tf.where(positives > 0, distances, 0.0)
    considered = positives + negatives
    # The reference counts one negative even where none is mined.
    counted = (found + tf.maximum(mined, 1.0)) / ranks.size
    return {
        "class": tf.reduce_sum(entropies * considered) * share,
        "bbox": tf.reduce_sum(distances) * share,
        **shares_of_guesses(
            confidence, classes, positives, considered / counted
        ),
    }


def shares_of_guesses(
    confidence: tf.Tensor,
    classes: tf.Tensor,
    positives: tf.Tensor,
    considered: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """How often the likeliest class is right.

    Args:
      confidence: [N, A, C] logits.
      classes: [N, A] targets.
      positives: [N, A], 1 where there is an object.
      considered: [N, A], share of each guess in the accuracy.

    Returns:
      `accuracy`, and of objects against background `precision` and `recall`.
    """
    guesses = tf.argmax(confidence, -1, classes.dtype)
    right = tf.cast(guesses == classes, tf.float32)
    objects = tf.cast(guesses > 0, tf.float32)
    hits = tf.reduce_sum(objects * positives)
    return {
        "accuracy": tf.reduce_sum(right * considered),
        # 0 where there is nothing to count; the reference had NaN.
        "precision": tf.math.divide_no_nan(hits, tf.reduce_sum(objects)),
        "recall": tf.math.divide_no_nan(hits, tf.reduce_sum(positives)),
    }


def segmentation_loss(
    logits: tf.Tensor,
    labels: tf.Tensor,
    valid: tf.Tensor,
    ranks: Ranks = ALONE,
) -> tf.Tensor:
    """Mean cross-entropy over the batch's valid pixels, 0 if there are none.

    Args:
      logits: [N, H, W, C].
      labels: [N, H, W] class ids.
      valid: [N, H, W], 1 where a pixel counts and 0 elsewhere.
      ranks: whose pixels are the batch.
    """
    # A mean per rank would give pixels of sparsely labelled ranks more weight.
    counted = ranks.total(tf.reduce_sum(valid))
    total = tf.reduce_sum(cross_entropy(logits, labels) * valid)
    return total * (ranks.size / tf.maximum(counted, 1.0))


def weight_decay_loss(kernels: Sequence) -> tf.Tensor:
    """Half the squared norm of the kernels, as the reference sums it."""
    return tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
