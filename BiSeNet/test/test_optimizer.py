"""The fused optimiser against the reference's formula, and its rate."""

import numpy as np
import pytest
import tensorflow as tf

from BiSeNet.optimizer import FusedMomentum, WarmUp


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_momentum_is_tf1_s(momentum: float) -> None:
    """Under a falling rate, where Keras' own velocity differs."""
    schedule = tf.keras.optimizers.schedules.PolynomialDecay(0.1, 6, 0.0, 0.9)
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


def test_warm_up_rises_to_the_schedule() -> None:
    """In a straight line, and is the schedule from then on."""
    decay = tf.keras.optimizers.schedules.PolynomialDecay(0.01, 100, 0.0, 0.9)
    schedule = WarmUp(decay, 9)
    for step in (0, 4, 9, 50, 100):
        wanted = 0.01 * (1 - step / 100) ** 0.9 * min(1.0, (step + 1) / 10)
        assert float(schedule(step)) == pytest.approx(wanted, abs=1e-8)
    # Without steps to warm up in it changes nothing.
    assert float(WarmUp(decay, 0)(0)) == pytest.approx(0.01)
