"""Measures speed and memory of the models: a table and a JSON file.

python ci/bench.py [MODEL…] [--precision_modes=…] [--output=bench.json]
A training step is stated as a share of R, the rate of one 3x3 convolution
measured in turn with the steps: shares compare across machines and hours,
seconds do not.
"""

import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import npu_config

FLAGS = flags.FLAGS
# The first steps compile, and fill caches and memory pools.
WARMUP_STEPS = 2
# Large enough to run about as fast as a plain matrix product.
CONVOLUTION = (128, 256)  # side and channels of the map that R is taken on
CONVOLUTIONS = (
    "Conv2D",
    "Conv2DBackpropInput",
    "Conv2DBackpropFilter",
    "DepthwiseConv2dNative",
    "DepthwiseConv2dNativeBackpropInput",
    "DepthwiseConv2dNativeBackpropFilter",
)
COLUMNS = (
    ("model", "{}"),
    ("precision", "{}"),
    ("images_per_second", "{:.2f}"),
    ("seconds_per_step", "{:.3f}"),
    ("gflops_per_second", "{:.0f}"),
    ("share_of_r", "{:.2f}"),
    ("forward_images_per_second", "{:.2f}"),
    ("pipeline_images_per_second", "{:.1f}"),
    ("pipeline_to_decoding", "{:.2f}"),
    ("pipeline_to_training", "{:.0f}"),
    ("peak_memory_mb", "{}"),
    ("first_step_seconds", "{:.1f}"),
)


def define_flags() -> None:
    """Defines the flags of the benchmark itself."""
    flags.DEFINE_list(
        "precision_modes",
        ["force_fp32", "allow_mix_precision"],
        "Precisions to measure, one process each.",
    )
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_integer("rounds", 7, "Timed steps; medians are shown.", 1)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes; it returns when the device is done."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def operations(graph: Any) -> float:
    """Floating-point operations of all convolutions and matrix products.

    Two per multiply-add. All three kinds of a convolution's operations do the
    same work: each pixel of the smaller map meets each kernel weight once.
    """
    total = 0.0
    for node in graph.get_operations():
        if node.type == "MatMul":
            # Output numbers times the length of the sums behind them.
            inner = node.inputs[0].shape[not node.get_attr("transpose_a")]
            total += 2.0 * np.prod(node.outputs[0].shape) * inner
        if node.type not in CONVOLUTIONS:
            continue
        if node.type.endswith("BackpropFilter"):
            kernel, pixels = node.outputs[0].shape, node.inputs[2].shape
        elif node.type.endswith("BackpropInput"):
            kernel, pixels = node.inputs[1].shape, node.inputs[2].shape
        else:
            kernel, pixels = node.inputs[1].shape, node.outputs[0].shape
        total += 2.0 * np.prod(pixels[:3]) * np.prod(kernel)
    return total


def convolution_rate(policy: str) -> Callable[[], float]:
    """A function that measures R, in GFLOP/s, in the policy's precision."""
    import tensorflow as tf

    side, channels = CONVOLUTION
    dtype = tf.keras.mixed_precision.Policy(policy).compute_dtype
    image = tf.cast(tf.random.normal([1, side, side, channels]), dtype)
    kernel = tf.cast(tf.random.normal([3, 3, channels, channels]), dtype)
    convolve = tf.function(
        # Reduced to a number, so that copying the map is not timed.
        lambda: tf.reduce_max(tf.nn.conv2d(image, kernel, 1, "SAME"))
    )
    work = 2.0 * 9 * channels**2 * side**2 / 1e9
    repeats = 10

    def rate() -> float:
        """Returns R of this moment, in GFLOP/s."""
        # The first call traces the function.
        convolve()
        seconds = timed(lambda: [float(convolve()) for _ in range(repeats)])
        return repeats * work / seconds

    return rate


def pipeline_rate(batches: Iterator, batch_size: int) -> float:
    """Images per second of an input pipeline on its own."""
    # Enough pictures for a steady rate where batches are small.
    count = max(4, 48 // batch_size)
    # The first batch waits for threads to start and buffers to fill.
    next(batches)
    seconds = timed(lambda: [next(batches) for _ in range(count)])
    return count * batch_size / seconds


def measure(model: str, folder: str) -> dict[str, Any]:
    """All figures of one model in one precision, in this process."""
    train = importlib.import_module(f"{model}.train")
    train.define_flags()
    flagfile = ROOT / model / "test" / "bench.flags"
    FLAGS(["bench", f"--flagfile={flagfile}", *sys.argv[4:]])
    runtime = npu_config.setup()
    import tensorflow as tf

    batch_size = FLAGS.batch_size
    pairs = train.read_data(runtime, folder)
    network, trainer, optimizer = train.create_network(runtime)
    train_step = train.make_train_step(runtime, trainer, optimizer)
    batch = next(iter(train.training_stream(runtime, pairs, 0)))
    first = timed(lambda: float(train_step(batch)["total_loss"]))
    # What the network takes, by name, where that is more than the image.
    names = getattr(train, "INPUTS", "image")
    inputs = tf.nest.map_structure(batch.get, names)
    forward = tf.function(lambda: network(inputs, training=False))
    rate = convolution_rate(runtime.policy)
    steps, forwards, rates = [], [], []
    for _ in range(FLAGS.rounds + WARMUP_STEPS):
        # In turn, because other work on the machine slows all three alike.
        rates.append(rate())
        steps.append(timed(lambda: float(train_step(batch)["total_loss"])))
        forwards.append(
            timed(lambda: [out.numpy() for out in tf.nest.flatten(forward())])
        )
    seconds, forward_seconds, r = (
        float(np.median(values[WARMUP_STEPS:]))
        for values in (steps, forwards, rates)
    )
    # Before the pipelines below, which are not part of training.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    batches = iter(train.training_stream(runtime, pairs, 0).repeat())
    pipeline = pipeline_rate(batches, batch_size)
    # What is left is decoding: the ratio is the price of augmentation.
    FLAGS.augment = "none"
    plain = iter(train.training_stream(runtime, pairs, 0).repeat())
    work = operations(train_step.get_concrete_function(batch).graph) / 1e9
    return {
        "model": model,
        "precision": runtime.policy,
        "image_shape": list(batch["image"].shape),
        "images_per_second": batch_size / seconds,
        "seconds_per_step": seconds,
        "gflop_per_step": work,
        "gflops_per_second": work / seconds,
        "r_gflops_per_second": r,
        "share_of_r": work / seconds / r,
        "forward_images_per_second": batch_size / forward_seconds,
        "pipeline_images_per_second": pipeline,
        "pipeline_to_decoding": pipeline / pipeline_rate(plain, batch_size),
        "pipeline_to_training": pipeline * seconds / batch_size,
        "peak_memory_mb": memory,
        "first_step_seconds": first,
        "device": runtime.device,
        "tensorflow": tf.__version__,
    }


def run_worker(model: str, mode: str) -> dict[str, Any]:
    """Measures in a process of its own, so that memory is the model's."""
    # Through a file, since standard output belongs to the training.
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result.json")
        command = [sys.executable, __file__, "--worker", model, result]
        process = subprocess.run(
            [*command, f"--rounds={FLAGS.rounds}", f"--precision_mode={mode}"],
            check=False,
        )
        if process.returncode:
            raise SystemExit(f"bench: {model} in {mode} failed")
        return json.loads(Path(result).read_text())


def processor() -> str:
    """Name of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    # On arm64 the file has no such line.
    return platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    names = [name for name, _ in COLUMNS]
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |"
    ]
    lines.append("|---" * len(names) + "|")
    for row in rows:
        cells = [form.format(row[name]) for name, form in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measures the models named, or all there are."""
    models = arguments[1:] or sorted(
        path.parent.parent.name for path in ROOT.glob("*/test/bench.flags")
    )
    rows = [
        run_worker(model, mode)
        for model in models
        for mode in FLAGS.precision_modes
    ]
    for row in rows:
        print(
            f"{row['model']}: input {row['image_shape']}, "
            f"R {row['r_gflops_per_second']:.0f} GFLOP/s"
        )
    print(
        f"{processor()}, {os.cpu_count()} threads; medians of "
        f"{FLAGS.rounds} steps"
    )
    print(table(rows))
    if FLAGS.output:
        Path(FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    if sys.argv[1:2] == ["--worker"]:
        model, result = sys.argv[2:4]
        figures = measure(model, os.path.dirname(result))
        Path(result).write_text(json.dumps(figures))
    else:
        app.run(main)
