"""NpuLossScaleOptimizer, for chips whose floats saturate on overflow.

The real one reads the device's float status. Here an overflow is a gradient
that is not finite, or one that a test asked for with `_force_overflow`.
"""

import tensorflow as tf

from npu_device._state import record

_KerasOptimizer = tf.keras.mixed_precision.LossScaleOptimizer
# Keras 3 has no dynamic=False: a scale that never grows stands for it.
_GROWTH_DISABLED = 2**31 - 1


class _Overflow:
    """Knows whether the last step overflowed, and may force it."""

    def __init__(
        self,
        inner_optimizer,
        dynamic=True,
        initial_scale=None,
        dynamic_growth_steps=None,
    ):
        record("NpuLossScaleOptimizer", inner_optimizer)
        # 2000 steps and 2**15 are Keras' own defaults.
        growth_steps = dynamic_growth_steps or 2000
        super().__init__(
            inner_optimizer,
            initial_scale=initial_scale or 2.0**15,
            dynamic_growth_steps=growth_steps if dynamic else _GROWTH_DISABLED,
        )
        self.last_step_finite = tf.Variable(True, trainable=False)
        self._forced_steps = tf.Variable(0, trainable=False)

    def _force_overflow(self, steps):
        """Lets the next `steps` steps overflow."""
        self._forced_steps.assign(steps)

    def _observe(self, gradients):
        """Notes whether this step overflows; if forced to, spoils it."""
        # A tensor, because the step is traced once and forced later.
        factor = tf.where(self._forced_steps > 0, float("nan"), 1.0)
        self._forced_steps.assign(tf.maximum(self._forced_steps - 1, 0))
        spoilt = [
            gradient
            if gradient is None
            else gradient * tf.cast(factor, gradient.dtype)
            for gradient in gradients
        ]
        finite = [
            tf.reduce_all(tf.math.is_finite(gradient))
            for gradient in spoilt
            if gradient is not None
        ]
        self.last_step_finite.assign(tf.reduce_all(finite))
        return spoilt


class _Keras2Optimizer(_Overflow, _KerasOptimizer):
    """Keras 2 steps in apply_gradients."""

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        """Takes one step, or skips it on an overflow."""
        gradients, variables = zip(*grads_and_vars)
        pairs = list(zip(self._observe(gradients), variables))
        return super().apply_gradients(pairs, *args, **kwargs)


class _Keras3Optimizer(_Overflow, _KerasOptimizer):
    """Keras 3 steps in apply.

    It would not count a skipped step nor keep the scale at 1 or more; the
    adapter does both.
    """

    def apply(self, grads, trainable_variables=None):
        """Takes one step, or skips it on an overflow."""
        super().apply(self._observe(grads), trainable_variables)
        self.dynamic_scale.assign(tf.maximum(self.dynamic_scale.value, 1.0))
        finite = tf.cast(self.last_step_finite, self.iterations.dtype)
        self.iterations.assign_add(1 - finite)


NpuLossScaleOptimizer = (
    _Keras3Optimizer if hasattr(_KerasOptimizer, "apply") else _Keras2Optimizer
)
