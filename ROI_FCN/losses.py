"""Cross-entropy over the pixels that count, and VGG16's weight decay.

Pure functions on float32 tensors.
"""

from collections.abc import Sequence

import tensorflow as tf


def cross_entropy(
    logits: tf.Tensor, labels: tf.Tensor, valid: tf.Tensor
) -> tf.Tensor:
    """Mean cross-entropy of each picture's valid pixels, [N] in nats.

    Args:
      logits: [N, H, W, C], float32.
      labels: [N, H, W], class ids.
      valid: [N, H, W], float32, 1 where a pixel counts and 0 elsewhere.
    """
    per_pixel = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    # A picture whose label is ignored altogether has no pixel to divide by.
    return tf.math.divide_no_nan(
        tf.reduce_sum(per_pixel * valid, axis=[1, 2]),
        tf.reduce_sum(valid, axis=[1, 2]),
    )


def segmentation_losses(
    logits: tf.Tensor, labels: tf.Tensor, valid: tf.Tensor
) -> dict[str, tf.Tensor]:
    """The terms of the training loss: scalar `total_loss`.

    It is the mean over pictures. Without padding that is the reference's mean
    over all pixels; with padding, unlike the latter, it does not depend on
    how ranks share a batch.
    """
    entropies = cross_entropy(logits, labels, valid)
    return {"total_loss": tf.reduce_mean(entropies)}


def weight_decay_loss(kernels: Sequence) -> tf.Tensor:
    """Half the squared norm of VGG16's kernels, as the reference sums it."""
    # The TF1 code sums this and never adds it to its loss; the author's code
    # for the paper does.
    return tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
