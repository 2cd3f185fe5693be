"""The fused optimiser against Keras' own, and the schedule of its rate."""

import numpy as np
import pytest
import tensorflow as tf

from BiSeNet.optimizer import FusedMomentum, WarmUp


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_fused_momentum_gives_keras_numbers(momentum: float) -> None:
    """Ten steps on two variables, inside a graph as in training."""
    decay = tf.keras.optimizers.schedules.PolynomialDecay(0.1, 20, 0.0, 0.9)
    schedule = WarmUp(decay, 3)
    results = []
    for kind in (tf.keras.optimizers.SGD, FusedMomentum):
        rng = np.random.RandomState(0)
        variables = [
            tf.Variable(rng.normal(size=shape), dtype=tf.float32)
            for shape in ((4, 3), (7,))
        ]
        optimizer = kind(schedule, momentum)

        def step(variables=variables, optimizer=optimizer):
            gradients = [tf.sin(3.0 * variable) for variable in variables]
            optimizer.apply_gradients(zip(gradients, variables))

        getattr(optimizer, "build", lambda _: None)(variables)
        step = tf.function(step)
        for _ in range(10):
            step()
        assert int(optimizer.iterations) == 10
        results.append([variable.numpy() for variable in variables])
    for plain, fused in zip(*results):
        np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-6)


def test_momentum_is_the_reference_s() -> None:
    """velocity = 0.9 velocity - rate gradient, and no Nesterov."""
    variable = tf.Variable([1.0])
    optimizer = FusedMomentum(0.1, 0.9)
    getattr(optimizer, "build", lambda _: None)([variable])
    place, velocity = 1.0, 0.0
    for gradient in (1.0, -0.5, 2.0):
        optimizer.apply_gradients([(tf.constant([gradient]), variable)])
        velocity = 0.9 * velocity - 0.1 * gradient
        place += velocity
        np.testing.assert_allclose(variable, [place], rtol=1e-6)


def test_warm_up_rises_to_the_schedule() -> None:
    """In a straight line, and is the schedule from then on."""
    decay = tf.keras.optimizers.schedules.PolynomialDecay(0.01, 100, 0.0, 0.9)
    schedule = WarmUp(decay, 9)
    for step in (0, 4, 9, 50, 100):
        wanted = 0.01 * (1 - step / 100) ** 0.9 * min(1.0, (step + 1) / 10)
        assert float(schedule(step)) == pytest.approx(wanted, abs=1e-8)
    # Without steps to warm up in it changes nothing.
    assert float(WarmUp(decay, 0)(0)) == pytest.approx(0.01)
