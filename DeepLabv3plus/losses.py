"""Cross-entropy over the pixels that count, and weight decay.

Pure functions on float32 tensors. Sums are divided by counts over all ranks,
so that ranks together have the loss of one rank with the whole batch.
"""

from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

import tensorflow as tf

from DeepLabv3plus.layers import resize_bilinear, resize_nearest


class Mining(NamedTuple):
    """Hard-pixel mining: only the largest losses count.

    Attributes:
      share: of the pixels that count in the end; 1 means no mining.
      steps: over which the share falls from 1; 0: at once.
    """

    share: float = 1.0
    steps: int = 0

    def share_at(self, step: tf.Tensor) -> tf.Tensor:
        """The share after `step` steps."""
        if not self.steps:
            return tf.constant(self.share)
        done = tf.minimum(1.0, tf.cast(step, tf.float32) / self.steps)
        return done * self.share + (1.0 - done)


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of each pixel in nats, [N, H, W].

    Args:
      logits: [N, H, W, C], float32.
      labels: [N, H, W], class ids.
    """
    # Several times faster on large maps than TensorFlow's sparse kernel.
    chosen = tf.one_hot(labels, logits.shape[-1]) * logits
    return tf.reduce_logsumexp(logits, -1) - tf.reduce_sum(chosen, -1)


def match_sizes(
    logits: tf.Tensor,
    labels: tf.Tensor,
    valid: tf.Tensor,
    upsample_logits: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Brings logits to the labels' size, or labels to the logits'."""
    if upsample_logits:
        return resize_bilinear(logits, labels.shape[1:3]), labels, valid
    size = logits.shape[1:3]
    labels, valid = (
        resize_nearest(each[..., tf.newaxis], size)[..., 0]
        for each in (labels, valid)
    )
    return logits, labels, valid


def segmentation_loss(
    logits: tf.Tensor,
    labels: tf.Tensor,
    valid: tf.Tensor,
    class_weights: Optional[Sequence[float]] = None,
    share: Optional[tf.Tensor] = None,
    mean_of_ranks: Callable[[list], list] = list,
) -> tf.Tensor:
    """The reference's loss, a scalar.

    Args:
      logits: [N, H, W, C], float32.
      labels: [N, H, W], class ids.
      valid: [N, H, W], float32, 1 where a pixel counts and 0 elsewhere.
      class_weights: of each class; none: all 1.
      share: of the pixels, those with the largest losses, that count; none:
        all of them. Each rank chooses among its own.
      mean_of_ranks: the means of tensors over all ranks.
    """
    weights = valid
    if class_weights:
        weights *= tf.gather(tf.constant(class_weights, tf.float32), labels)
    entropies = cross_entropy(logits, labels) * weights
    # The number of pixels, and not the sum of their weights.
    counted = tf.reduce_sum(valid)
    if share is not None:
        entropies = tf.reshape(entropies, [-1])
        # Ignored pixels count here but not below, as in the reference.
        pixels = tf.cast(tf.size(entropies), tf.float32)
        kept = tf.cast(share * pixels, tf.int32)
        entropies, _ = tf.math.top_k(entropies, kept, sorted=False)
        counted = tf.reduce_sum(tf.cast(entropies != 0.0, tf.float32))
    # The mean over ranks, since gradients are averaged over them as well:
    # together that is the mean over the pixels of the whole batch.
    (counted,) = mean_of_ranks([counted])
    # The reference divides by 1e-5 at least; of no pixels both make 0.
    return tf.math.divide_no_nan(tf.reduce_sum(entropies), counted)


def weight_decay_loss(kernels: Sequence) -> tf.Tensor:
    """Half the squared norm of the kernels."""
    return tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
