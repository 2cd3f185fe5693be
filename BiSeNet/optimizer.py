"""SGD with momentum in one pass over memory, in Keras 3 as in Keras 2.6.

Keras 3 writes it as several operations on whole tensors; with the two
hundred small tensors of this network their number costs.
"""

from typing import Any

import tensorflow as tf


def _raw(variable: Any) -> tf.Variable:
    """The TensorFlow variable inside a Keras 3 variable."""
    value = getattr(variable, "value", None)
    return variable if value is None or callable(value) else value


class FusedMomentum(tf.keras.optimizers.SGD):
    """Keras' SGD, its slots and its numbers, by TensorFlow's fused kernel.

    Keras 2.6 uses this kernel by itself and never calls `update_step`. Like
    TF1's it does velocity = momentum * velocity - rate * gradient.
    """

    def update_step(
        self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor
    ) -> None:
        """Updates one variable and its velocity in place."""
        if not self.momentum:
            super().update_step(gradient, variable, learning_rate)
            return
        velocity = self.momentums[self._get_variable_index(variable)]
        dtype = gradient.dtype
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=_raw(variable).handle,
            accum=_raw(velocity).handle,
            lr=tf.cast(learning_rate, dtype),
            grad=gradient,
            momentum=tf.constant(self.momentum, dtype),
        )


class WarmUp(tf.keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule, approached in a straight line from 0."""

    def __init__(
        self,
        schedule: tf.keras.optimizers.schedules.LearningRateSchedule,
        steps: int,
    ) -> None:
        """`steps`: as many as stay below `schedule`."""
        super().__init__()
        self.schedule, self.steps = schedule, steps

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate of a step, float32."""
        rate = tf.cast(self.schedule(step), tf.float32)
        done = tf.cast(tf.convert_to_tensor(step), tf.float32) + 1.0
        return rate * tf.minimum(1.0, done / (self.steps + 1.0))

    def get_config(self) -> dict[str, object]:
        """What Keras asks of every schedule: how it was made."""
        return {"schedule": self.schedule, "steps": self.steps}
