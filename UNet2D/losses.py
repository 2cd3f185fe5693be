"""Cross-entropy plus soft Dice, over the pixels that count.

Pure functions on float32 tensors. Written as in the reference: Dice squares
its denominator and a class that a picture lacks scores about 0, not 1.
"""

from collections.abc import Sequence

import tensorflow as tf

EPSILON = 1e-6  # of the Dice fraction, as the reference has it


def soft_dice(
    probabilities: tf.Tensor, one_hot: tf.Tensor, valid: tf.Tensor
) -> tf.Tensor:
    """Soft Dice of each image and class.

    Args:
      probabilities: [N, H, W, C].
      one_hot: [N, H, W, C], the true classes.
      valid: [N, H, W], 1 where a pixel counts and 0 where it is padding.

    Returns:
      [N, C], in [0, 1].
    """
    # Padding drops out of both sums, so it neither helps nor hurts.
    weights = valid[..., tf.newaxis]
    probabilities, one_hot = probabilities * weights, one_hot * weights
    overlap = tf.reduce_sum(probabilities * one_hot, axis=[1, 2])
    sizes = tf.reduce_sum(
        tf.square(probabilities) + tf.square(one_hot), axis=[1, 2]
    )
    return (2.0 * overlap + EPSILON) / (sizes + EPSILON)


def cross_entropy(
    logits: tf.Tensor, one_hot: tf.Tensor, valid: tf.Tensor
) -> tf.Tensor:
    """Mean cross-entropy of each picture's valid pixels, [N] in nats."""
    per_pixel = tf.nn.softmax_cross_entropy_with_logits(one_hot, logits)
    # A picture that is all padding after a box has no pixel to divide by.
    return tf.math.divide_no_nan(
        tf.reduce_sum(per_pixel * valid, axis=[1, 2]),
        tf.reduce_sum(valid, axis=[1, 2]),
    )


def segmentation_losses(
    logits: tf.Tensor, labels: tf.Tensor, valid: tf.Tensor
) -> dict[str, tf.Tensor]:
    """The terms of the training loss.

    Args:
      logits: [N, H, W, C], float32.
      labels: [N, H, W], class ids.
      valid: [N, H, W], float32, 1 where a pixel counts.

    Returns:
      Scalars `cross_entropy`, `dice_loss` and `total_loss`, their sum.
    """
    one_hot = tf.one_hot(labels, logits.shape[-1])
    # A mean of the pictures' own: one over all pixels of a batch would make
    # two ranks another thing than one rank with twice the batch.
    entropy = tf.reduce_mean(cross_entropy(logits, one_hot, valid))
    dice = soft_dice(tf.nn.softmax(logits), one_hot, valid)
    dice_loss = tf.reduce_mean(1.0 - dice)
    return {
        "cross_entropy": entropy,
        "dice_loss": dice_loss,
        "total_loss": entropy + dice_loss,
    }


def weight_decay_loss(variables: Sequence) -> tf.Tensor:
    """Half the squared norm of all trainable variables, biases included."""
    # NVIDIA's TF1 code and the port define this term and never use it; the
    # TF2 code does.
    return tf.add_n([tf.nn.l2_loss(variable) for variable in variables])
