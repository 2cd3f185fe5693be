"""Momentum as TF1 has it, in one pass over memory, in either Keras.

Keras multiplies the rate into the velocity, so that a changing rate acts late;
the reference's velocity is a sum of gradients alone.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def _raw(variable: Any) -> tf.Variable:
    """The TensorFlow variable inside a Keras 3 variable."""
    # `value` is a property in Keras 3 and a method of a tf.Variable.
    value = getattr(variable, "value", None)
    return variable if value is None or callable(value) else value


def _step(
    variable: Any,
    velocity: Any,
    rate: tf.Tensor,
    gradient: tf.Tensor,
    momentum: Any,
) -> tf.Operation:
    """v = momentum v + gradient; variable -= rate v; both in place."""
    # The kernel's own Nesterov form is left off, as in the reference: the
    # option of Keras' SGD has no effect here.
    return tf.raw_ops.ResourceApplyMomentum(
        var=_raw(variable).handle,
        accum=_raw(velocity).handle,
        lr=tf.cast(rate, gradient.dtype),
        grad=gradient,
        momentum=tf.cast(momentum, gradient.dtype),
    )


class FusedMomentum(tf.keras.optimizers.SGD):
    """Keras' SGD with momentum and its slots, by TF1's kernel."""

    def _backend_update_step(
        self,
        grads: Sequence[tf.Tensor],
        trainable_variables: Sequence[Any],
        learning_rate: tf.Tensor,
    ) -> None:
        """Updates all variables and their velocities in Keras 3."""
        # Keras makes no velocities for plain SGD.
        if not self.momentum:
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        # All at once: Keras asks a distribution strategy about each variable,
        # which takes longer to trace than the step itself.
        for gradient, variable in zip(grads, trainable_variables):
            # Private names of Keras 3: test_optimizer.py fails where a
            # release changes them.
            velocity = self.momentums[self._get_variable_index(variable)]
            _step(variable, velocity, learning_rate, gradient, self.momentum)

    def _resource_apply_dense(
        self, grad: tf.Tensor, var: Any, apply_state: Any = None
    ) -> tf.Operation:
        """The same in Keras 2.6, which has the rate computed beforehand."""
        # Sparse gradients would take Keras' own way; this network has none.
        if not self._momentum:
            return super()._resource_apply_dense(grad, var, apply_state)
        state = apply_state[var.device, var.dtype.base_dtype]
        velocity = self.get_slot(var, "momentum")
        return _step(var, velocity, state["lr_t"], grad, state["momentum"])
