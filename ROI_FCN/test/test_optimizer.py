"""The fused optimiser against Keras' own."""

import numpy as np
import tensorflow as tf

from ROI_FCN.optimizer import FusedAdam


def test_fused_adam_gives_keras_numbers() -> None:
    """Ten steps on two variables, inside a graph as in training."""
    schedule = tf.keras.optimizers.schedules.CosineDecay(1e-2, 20)
    results = []
    for kind in (tf.keras.optimizers.Adam, FusedAdam):
        rng = np.random.RandomState(0)
        variables = [
            tf.Variable(rng.normal(size=shape), dtype=tf.float32)
            for shape in ((4, 3), (7,))
        ]
        optimizer = kind(schedule, epsilon=1e-8)

        def step(variables=variables, optimizer=optimizer):
            gradients = [tf.sin(3.0 * variable) for variable in variables]
            optimizer.apply_gradients(zip(gradients, variables))

        # Keras 2.6 has no build(): it makes the slots in the first step.
        getattr(optimizer, "build", lambda _: None)(variables)
        step = tf.function(step)
        for _ in range(10):
            step()
        assert int(optimizer.iterations) == 10
        results.append([variable.numpy() for variable in variables])
    # Numbers alone would not show that Keras has stopped calling ours.
    operations = step.get_concrete_function().graph.get_operations()
    kinds = [operation.type for operation in operations]
    assert kinds.count("ResourceApplyAdam") == len(variables)
    for plain, fused in zip(*results):
        np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-6)
