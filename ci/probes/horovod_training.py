"""One rank of a Horovod job, which trains a small network in five steps.

python horovod_training.py --output=FOLDER writes FOLDER/rank<N>.npz. With
--end=error or --end=kill rank 1 ends in the middle, and the others go on.
"""

import dataclasses
import os
import signal
import sys
import time

import numpy as np
import tensorflow as tf
from absl import flags
from small_network import build, make_step

from common import npu_config

FLAGS = flags.FLAGS


def numbers(tensors: list) -> np.ndarray:
    """Returns all numbers of some tensors or variables as one vector."""
    return np.concatenate([np.array(each).ravel() for each in tensors])


def train(runtime: npu_config.Runtime) -> dict[str, np.ndarray]:
    """Trains from this rank's own seed on this rank's own data."""
    # Ranks begin and learn apart, so that equality has to be made.
    network = build(seed=runtime.rank)
    variables = network.trainable_variables
    # At rate 1 the first step of momentum is the gradient itself.
    optimizer = runtime.prepare_optimizer(
        tf.keras.optimizers.SGD(1.0, momentum=0.9), variables
    )
    state = network.variables + npu_config.optimizer_variables(optimizer)
    found = {"seeded": numbers(network.variables)}
    runtime.broadcast(state)
    found["broadcast"] = numbers(state)
    found["before"] = numbers(variables)
    step = make_step(runtime, network, optimizer)
    draws = np.random.RandomState(100 + runtime.rank)
    for number in range(5):
        gradients = step(tf.constant(draws.normal(size=[8, 4]), tf.float32))
        if number == 0:
            found["gradients"] = numbers(gradients)
            found["means"] = numbers(runtime.all_reduce(gradients))
            found["after"] = numbers(variables)
    found["trained"] = numbers(variables)
    found["slots"] = numbers(npu_config.optimizer_variables(optimizer))
    statistics = [
        tf.convert_to_tensor(each) for each in network.non_trainable_variables
    ]
    found["statistics"] = numbers(statistics)
    found["mean_statistics"] = numbers(runtime.all_reduce(statistics))
    return found


def overflow(runtime: npu_config.Runtime) -> dict[str, np.ndarray]:
    """Takes a step in float16 that overflows on rank 1 only."""
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    # Not by a flag: on a CPU setup() would never choose float16.
    runtime = dataclasses.replace(
        runtime, policy="mixed_float16", loss_scale=64
    )
    network = build(seed=0)
    variables = network.trainable_variables
    optimizer = runtime.prepare_optimizer(
        tf.keras.optimizers.SGD(1.0), variables
    )
    runtime.broadcast(
        network.variables + npu_config.optimizer_variables(optimizer)
    )
    step = make_step(runtime, network, optimizer)
    found = {"before_overflow": numbers(variables)}
    step(tf.fill([8, 4], np.inf if runtime.rank == 1 else 1.0))
    found["after_overflow"] = numbers(variables)
    found["scale"] = runtime.scale_loss(optimizer, tf.constant(1.0)).numpy()
    return found


def reduce_list(runtime: npu_config.Runtime) -> dict[str, np.ndarray]:
    """Reduces a list with a gap in it, eagerly and in a traced function."""

    def reduce(rank):
        """Returns the three means of two numbers and a gap between."""
        first, gap, second = runtime.all_reduce(
            [rank, None, tf.stack([rank, 2.0 * rank])]
        )
        assert gap is None
        return tf.concat([[first], second], 0)

    rank = tf.constant(float(runtime.rank))
    return {"eager": reduce(rank), "traced": tf.function(reduce)(rank)}


def normalize(runtime: npu_config.Runtime) -> dict[str, np.ndarray]:
    """Batch norm of other features on each rank, its gradients, its moments.

    The features of all ranks come with it, to compute the same from.
    """
    draws = np.random.RandomState(200 + runtime.rank)
    # Far from zero and apart, so that the ranks' own moments would not do.
    features = draws.normal(20.0 * runtime.rank - 50.0, size=[3, 2, 4, 5])
    weights = draws.normal(size=features.shape)
    gamma, beta = np.linspace(0.5, 2.0, 5), np.linspace(-1.0, 1.0, 5)
    inputs = [
        tf.constant(each, tf.float32) for each in (features, gamma, beta)
    ]

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs, *moments = runtime.batch_norm(
                *inputs, about=tf.zeros([5]), epsilon=1e-3
            )
            loss = tf.reduce_sum(tf.sin(outputs) * weights)
        return [outputs, *moments, *tape.gradient(loss, inputs)]

    names = ["outputs", "mean", "variance", "features", "gamma", "beta"]
    found = {f"norm_{name}": each for name, each in zip(names, step())}
    return {**found, "norm_inputs": features, "norm_weights": weights}


def end_early(runtime: npu_config.Runtime, way: str) -> None:
    """Reduces without end, but on rank 1, which breaks off."""
    for number in range(10**6):
        runtime.all_reduce([tf.constant(1.0)])
        if runtime.rank == 1 and number == 20:
            # Flushed, because SIGKILL leaves no time to write a buffer.
            print(f"rank 1 ends at {time.time()}", flush=True)
            if way == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("rank 1 cannot go on")


def main() -> None:
    """Runs one rank."""
    npu_config.define_flags()
    flags.DEFINE_string("output", None, "Folder of the results.")
    flags.DEFINE_enum("end", None, ["error", "kill"], "How rank 1 ends.")
    FLAGS(sys.argv)
    runtime = npu_config.setup()
    print(runtime.describe())
    if FLAGS.end:
        end_early(runtime, FLAGS.end)
    found = {**train(runtime), **reduce_list(runtime), **normalize(runtime)}
    found.update(overflow(runtime))
    np.savez(os.path.join(FLAGS.output, f"rank{runtime.rank}.npz"), **found)


if __name__ == "__main__":
    main()
