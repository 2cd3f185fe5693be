"""The learning rate over the steps: the reference's two policies."""

import tensorflow as tf

# The reference's defaults.
STEP_FACTOR, STEP_LENGTH = 0.1, 2000  # of the policy `step`


class Schedule(tf.keras.optimizers.schedules.LearningRateSchedule):
    """`poly` to 0, or `step`; before either a slow start, if asked for.

    poly is rate * (1 - t / T) ** power, where t counts from the end of the
    slow start and T is the number of steps left then.
    """

    def __init__(
        self,
        policy: str,
        rate: float,
        total_steps: int,
        power: float = 0.9,
        slow_steps: int = 0,
        slow_rate: float = 1e-4,
    ) -> None:
        self.policy, self.rate, self.total_steps = policy, rate, total_steps
        self.power = power
        self.slow_steps, self.slow_rate = slow_steps, slow_rate

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate of the step after `step` steps, float32."""
        done = tf.cast(step, tf.float32)
        passed = tf.maximum(done - self.slow_steps, 0.0)
        if self.policy == "poly":
            length = float(max(self.total_steps - self.slow_steps, 1))
            share = 1.0 - tf.minimum(passed, length) / length
            rate = self.rate * share**self.power
        else:
            drops = tf.floor(passed / STEP_LENGTH)
            rate = self.rate * STEP_FACTOR**drops
        return tf.where(done < self.slow_steps, self.slow_rate, rate)

    def get_config(self) -> dict[str, object]:
        """The arguments, by name."""
        # The base class keeps nothing on the instance: whatever is set in
        # __init__ has to be one of its arguments.
        return dict(vars(self))
