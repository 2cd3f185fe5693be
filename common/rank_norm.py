"""Batch norm over the batches of all ranks: two exchanges, forth and back.

Written out in TensorFlow's operations it takes four, and every exchange makes
the ranks wait for each other: so it has a gradient of its own.
"""

from typing import Callable

import tensorflow as tf

Reduce = Callable[[list], list]  # the means of tensors over the ranks


def batch_norm(
    features: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    about: tf.Tensor,
    epsilon: float,
    reduce: Reduce,
    ranks: int,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Does what the fused kernel would do with all batches as one.

    Args:
      features: [N, h, w, c], of the same size on every rank.
      gamma, beta: [c], float32.
      about: [c], roughly the means, such as their moving average.
      epsilon: added to the variance.
      reduce: gives the means of tensors over the ranks.
      ranks: how many there are.

    Returns:
      the features normalised; their mean and unbiased variance, [c] float32.
    """
    about = tf.convert_to_tensor(about)

    def normalize(features, gamma, beta):
        mean, variance = _moments(features, about, reduce)
        # With moments given, the kernel makes one pass over the features.
        apply = _kernel(features, mean, variance, epsilon)

        def gradient(upstream, *_):
            # By the kernel as if the moments were constants; the sums that it
            # makes on the way are just what the moments' share takes.
            from_features, from_gamma, from_beta, *_ = (
                tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=upstream,
                    x=features,
                    scale=gamma,
                    reserve_space_1=mean,
                    reserve_space_2=variance,
                    reserve_space_3=tf.zeros([0]),
                    epsilon=epsilon,
                    is_training=False,
                )
            )
            sums = tf.stack([from_gamma, from_beta])
            (sums_of_all,) = reduce([sums])
            factor = gamma * tf.math.rsqrt(variance + epsilon)
            share = factor * sums_of_all / _count(features)
            # The features' part that only moved the moments.
            moved = apply(*tf.unstack(share))
            return from_features - moved, from_gamma, from_beta

        return (apply(gamma, beta), mean, variance), gradient

    outputs, mean, variance = tf.custom_gradient(normalize)(
        features, gamma, beta
    )
    count = ranks * _count(features)
    # At least 1: the means of one picture alone are a batch of one value.
    return outputs, mean, variance * count / tf.maximum(count - 1.0, 1.0)


def _moments(
    features: tf.Tensor, about: tf.Tensor, reduce: Reduce
) -> list[tf.Tensor]:
    """Mean and variance over all ranks, [c] each."""
    mean, variance = tf.nn.moments(tf.cast(features, tf.float32), [0, 1, 2])
    # Taken from `about`, since a difference of large squares has few digits.
    offset = mean - about
    (moments,) = reduce([tf.stack([offset, variance + tf.square(offset)])])
    offset, square = tf.unstack(moments)
    return [about + offset, tf.maximum(square - tf.square(offset), 0.0)]


def _kernel(
    features: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, epsilon: float
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The function (gamma, beta) -> normalised features, moments given."""

    def apply(gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.FusedBatchNormV3(
            x=features,
            scale=gamma,
            offset=beta,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
            is_training=False,
        ).y

    return apply


def _count(features: tf.Tensor) -> tf.Tensor:
    """Values of each channel on this rank."""
    return tf.cast(tf.reduce_prod(tf.shape(features)[:3]), tf.float32)
