"""The optimiser wrapper that reduces gradients over the ranks first."""

import tensorflow as tf

from npu_device._state import cluster, package, record
from npu_device.distribute.collectives import _WORLD, all_reduce


def npu_distributed_keras_optimizer_wrapper(
    optimizer, reduce_reduction="mean", fusion=1, fusion_id=-1, group=_WORLD
):
    """Patches an optimizer in place and returns it.

    Keras 3 is hooked in `apply`, because a LossScaleOptimizer there calls the
    inner optimizer's `apply` and never its `apply_gradients`.
    """
    optimizer = tf.keras.optimizers.get(optimizer)
    record("npu_distributed_keras_optimizer_wrapper", optimizer)
    if getattr(optimizer, "_npu_wrapped", False):
        record("double_wrap")
    if package()._emulate_265:
        # Version 2.6.5 patches these, which only Keras 2 has.
        for name in ("get_gradients", "_compute_gradients"):
            getattr(optimizer, name)
    if hasattr(optimizer, "apply"):
        _hook_apply(optimizer, reduce_reduction)
    else:
        _hook_apply_gradients(optimizer, reduce_reduction)
    optimizer._npu_wrapped = True
    return optimizer


def _hook_apply(optimizer, reduction):
    original = optimizer.apply

    def apply(grads, *args, **kwargs):
        """Keras 3's step, on reduced gradients."""
        return original(_reduced(list(grads), reduction), *args, **kwargs)

    optimizer.apply = apply


def _hook_apply_gradients(optimizer, reduction):
    original = optimizer.apply_gradients

    def apply_gradients(grads_and_vars, *args, **kwargs):
        """Keras 2's step, on reduced gradients."""
        gradients, variables = zip(*grads_and_vars)
        reduced = _reduced(list(gradients), reduction)
        return original(zip(reduced, variables), *args, **kwargs)

    optimizer.apply_gradients = apply_gradients


def _reduced(gradients, reduction):
    return gradients if cluster() is None else all_reduce(gradients, reduction)
