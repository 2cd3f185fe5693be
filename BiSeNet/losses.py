"""Cross-entropy of the three heads over the pixels that count, and L2.

Pure functions on float32 tensors. Whatever is divided by is summed over all
ranks, so that a batch means the same however they share it.
"""

import math
from collections.abc import Sequence
from typing import Callable

import tensorflow as tf

from BiSeNet.model import HEADS

# The authors' code has the same share, but of the batch.
OHEM_LEAST = 16  # at least every 16th pixel of a picture counts


def pixel_weights(table: Sequence[float], labels: tf.Tensor) -> tf.Tensor:
    """The weight of each pixel from the 256 of all label values, [N, H, W].

    What is ignored has weight 0.
    """
    return tf.gather(tf.constant(table, tf.float32), labels)


def cross_entropy(logits: tf.Tensor, one_hot: tf.Tensor) -> tf.Tensor:
    """Cross-entropy [N, H, W] in nats of logits and labels [N, H, W, C].

    Where the labels are all 0 it means nothing, and has to be weighted by 0.
    """
    # Several times faster on large maps than TensorFlow's sparse form.
    hits = tf.reduce_sum(one_hot * logits, -1)
    return tf.reduce_logsumexp(logits, -1) - hits


def hard_pixels(
    entropies: tf.Tensor, weights: tf.Tensor, threshold: float
) -> tf.Tensor:
    """Weights [N, H, W] with 0 for pixels that are easy by now (OHEM).

    A pixel is hard where its class has less than `threshold` of the
    probability, and the hardest of every OHEM_LEAST are hard in any case.
    """
    # By picture, so that it does not matter how ranks share a batch. By the
    # entropy without weights, since the threshold is a probability.
    losses = tf.where(weights > 0.0, entropies, 0.0)
    flat = tf.reshape(losses, [tf.shape(losses)[0], -1])
    least = tf.shape(flat)[1] // OHEM_LEAST
    last = tf.math.top_k(flat, least).values[:, -1]
    # Where nearly all is ignored the limit is 0, and every pixel counts.
    limit = tf.minimum(-math.log(threshold), last)[:, tf.newaxis, tf.newaxis]
    return tf.where(losses >= limit, weights, 0.0)


def segmentation_losses(
    outputs: Sequence[tf.Tensor],
    labels: tf.Tensor,
    weights: tf.Tensor,
    ohem: float = 0.0,
    mean_of_ranks: Callable[[list], list] = list,
) -> dict[str, tf.Tensor]:
    """The terms of the training loss.

    Args:
      outputs: logits [N, H, W, C] of the heads, in the order of HEADS.
      labels: [N, H, W], class ids.
      weights: [N, H, W], of the pixels.
      ohem: threshold of hard_pixels; 0: all pixels.
      mean_of_ranks: the means of tensors over all ranks.

    Returns:
      `total_loss`, the sum over heads, each of them the mean over all
      weighted pixels of the batch; and `<head>_loss`, all scalars.
    """
    # UNKNOWN lies beyond all classes: tf.one_hot makes zeros of it, where a
    # sparse cross-entropy would fail or give NaN.
    one_hot = tf.one_hot(labels, outputs[0].shape[-1])
    entropies = [cross_entropy(logits, one_hot) for logits in outputs]
    shares = [
        hard_pixels(tf.stop_gradient(each), weights, ohem) if ohem else weights
        for each in entropies
    ]
    # The mean over ranks and not their sum, since gradients are averaged over
    # ranks as well.
    norms = mean_of_ranks([tf.reduce_sum(share) for share in shares])
    terms = {
        f"{head}_loss": tf.math.divide_no_nan(
            tf.reduce_sum(share * entropy), norm
        )
        for head, share, entropy, norm in zip(HEADS, shares, entropies, norms)
    }
    # All heads weigh 1, as in the paper and the reference.
    return {"total_loss": tf.add_n(list(terms.values())), **terms}


def weight_decay_loss(kernels: Sequence) -> tf.Tensor:
    """Half the squared norm of kernels, as the reference sums it."""
    return tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
