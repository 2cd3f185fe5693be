"""Trains a small network on the double as each case says.

Answers with the weights and loss scale after every step, and with what the
adapter was asked to do.
"""

from typing import Any

import npu_device
import numpy as np
import tensorflow as tf
from cases import answer
from small_network import build, make_step

from common import npu_config


def open_runtime(case: dict) -> npu_config.Runtime:
    """Returns the NPU's Runtime, or a GPU's that computes on the CPU."""
    if case.get("device") != "gpu":
        return npu_config.setup()
    # Float16 on a GPU has to be tested where there is none.
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    scale = case["loss_scale"]
    return npu_config.Runtime("gpu", "mixed_float16", "", loss_scale=scale)


def receive(runtime: npu_config.Runtime, state: list, sent: int) -> list:
    """Broadcasts from a rank 0 where everything has the value `sent`."""
    npu_device._peers(
        lambda value, rank: tf.cast(tf.fill(value.shape, sent), value.dtype)
    )
    runtime.broadcast(state)
    # So that the steps that follow train among equal ranks.
    npu_device._peers(None)
    return [np.array(each).tolist() for each in state]


def train(step: Any, optimizer: Any, variables: list, kind: str) -> dict:
    """Takes one step.

    Args:
      kind: "good"; "data", an infinite input; or "forced", an overflow that
        the double reports.
    """
    if kind == "forced":
        optimizer._force_overflow(1)
    inputs = np.random.RandomState(1).normal(size=[8, 4]).astype("float32")
    step(tf.constant(inputs * (np.inf if kind == "data" else 1.0)))
    return {
        "weights": [np.array(each).tolist() for each in variables],
        "scale": scale_of(optimizer),
        "iterations": int(optimizer.iterations),
    }


def scale_of(optimizer: Any) -> float:
    """Returns the loss scale, 1 without one."""
    # Keras 3 and Keras 2.6 name it differently.
    for name in ("dynamic_scale", "loss_scale"):
        if hasattr(optimizer, name):
            return float(getattr(optimizer, name))
    return 1.0


def respond(case: dict) -> dict:
    """Prepares the optimizer, broadcasts, and takes the case's steps."""
    runtime = open_runtime(case)
    network = build(seed=0)
    variables = network.trainable_variables
    optimizer = runtime.prepare_optimizer(
        tf.keras.optimizers.Adam(0.1), variables
    )
    state = network.variables + npu_config.optimizer_variables(optimizer)
    found = {"optimizer": type(optimizer).__name__}
    if "sent" in case:
        found["received"] = receive(runtime, state, case["sent"])
    step = make_step(runtime, network, optimizer)
    found["history"] = [
        train(step, optimizer, variables, kind)
        for kind in case.get("steps", [])
    ]
    calls = npu_device._calls
    found["calls"] = [name for name, _ in calls]
    found["wrapped"] = [
        arguments[0] is optimizer
        for name, arguments in calls
        if name == "npu_distributed_keras_optimizer_wrapper"
    ]
    found["broadcast"] = [
        arguments[0] for name, arguments in calls if name == "broadcast"
    ]
    return found


if __name__ == "__main__":
    answer(respond)
