"""The fused optimiser against the reference's formula."""

import numpy as np
import pytest
import tensorflow as tf

from DeepLabv3plus.optimizer import FusedMomentum
from DeepLabv3plus.schedule import Schedule


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_momentum_is_tf1_s(momentum: float) -> None:
    """Under a falling rate, where Keras' own velocity differs."""
    schedule = Schedule("poly", 0.1, 6)
    rng = np.random.RandomState(0)
    starts = [rng.normal(size=shape) for shape in ((4, 3), (7,))]
    variables = [tf.Variable(each, dtype=tf.float32) for each in starts]
    optimizer = FusedMomentum(schedule, momentum=momentum)
    # Keras 2.6 has no build(): it makes the slots in the first step.
    getattr(optimizer, "build", lambda _: None)(variables)

    def step():
        gradients = [tf.sin(3.0 * variable) for variable in variables]
        optimizer.apply_gradients(zip(gradients, variables))

    graph = tf.function(step)
    for _ in range(5):
        graph()
    assert int(optimizer.iterations) == 5
    for start, variable in zip(starts, variables):
        value, velocity = start, 0.0
        for number in range(5):
            velocity = momentum * velocity + np.sin(3.0 * value)
            value = value - 0.1 * (1 - number / 6) ** 0.9 * velocity
        np.testing.assert_allclose(variable, value, rtol=1e-4, atol=1e-5)
