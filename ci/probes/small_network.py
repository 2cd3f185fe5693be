"""The network that probes train: batch normalisation, known weights."""

from typing import Any, Callable

import numpy as np
import tensorflow as tf

from common import npu_config


def build(seed: int) -> tf.keras.Model:
    """Returns the network with the weights of a seed."""
    network = tf.keras.Sequential(
        [
            tf.keras.Input([4]),
            tf.keras.layers.Dense(3),
            tf.keras.layers.BatchNormalization(),
            # Float32, or the loss itself would overflow in float16.
            tf.keras.layers.Dense(1, dtype="float32"),
        ]
    )
    # Positive weights, and not those of a version of Keras.
    draws = np.random.RandomState(seed)
    network.set_weights(
        [draws.uniform(0.5, 1.5, each.shape) for each in network.get_weights()]
    )
    return network


def make_step(
    runtime: npu_config.Runtime, network: tf.keras.Model, optimizer: Any
) -> Callable:
    """Returns a training step that returns this rank's own gradients."""
    variables = network.trainable_variables

    @tf.function
    def step(inputs):
        """Takes one step; returns the gradients before the reduction."""
        with tf.GradientTape() as tape:
            outputs = network(inputs, training=True)
            # Small enough for the first loss scale of float16.
            loss = 0.01 * tf.reduce_mean(tf.square(outputs - 1.0))
            scaled = runtime.scale_loss(optimizer, loss)
        gradients = tape.gradient(scaled, variables)
        runtime.apply_gradients(optimizer, gradients, variables)
        return gradients

    return step
