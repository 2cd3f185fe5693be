"""Adam in one pass over memory, in Keras 3 as in Keras 2.6.

Keras 3 writes Adam as a dozen operations on whole tensors; on a CPU their
memory traffic costs several per cent of a training step.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def _raw(variable: Any) -> tf.Variable:
    """The TensorFlow variable inside a Keras 3 variable."""
    # `value` is a property in Keras 3 and a method of a tf.Variable.
    value = getattr(variable, "value", None)
    return variable if value is None or callable(value) else value


class FusedAdam(tf.keras.optimizers.Adam):
    """Keras' Adam, its slots and its numbers, by TensorFlow's fused kernel.

    Keras 2.6 uses this kernel by itself and has no `_backend_update_step`.
    """

    def _backend_update_step(
        self,
        grads: Sequence[tf.Tensor],
        trainable_variables: Sequence[Any],
        learning_rate: tf.Tensor,
    ) -> None:
        """Updates all variables, float32, and their moments in place."""
        # All at once: Keras asks a distribution strategy about each variable,
        # which takes longer to trace than the step itself.
        # `iterations` counts the steps done; the powers are those of this one.
        step = tf.cast(_raw(self.iterations) + 1, tf.float32)
        same = {
            "beta1_power": tf.pow(self.beta_1, step),
            "beta2_power": tf.pow(self.beta_2, step),
            "lr": tf.cast(learning_rate, tf.float32),
            "beta1": tf.constant(self.beta_1),
            "beta2": tf.constant(self.beta_2),
            # Keras and the kernel both add it to the root of the uncorrected
            # moment (epsilon hat in Adam's paper), so their numbers agree.
            "epsilon": tf.constant(self.epsilon),
        }
        for gradient, variable in zip(grads, trainable_variables):
            # Private names of Keras 3: test_optimizer.py fails where a
            # release changes them.
            index = self._get_variable_index(variable)
            tf.raw_ops.ResourceApplyAdam(
                var=_raw(variable).handle,
                m=_raw(self._momentums[index]).handle,
                v=_raw(self._velocities[index]).handle,
                grad=gradient,
                **same,
            )
