"""Evaluates a run of ROI_FCN: a table, metrics.json and a contact sheet.

python ROI_FCN/evaluate.py --run=RUN [--data_path=DIR] [--eval_size=H,W]
At the pictures' own sizes, unless --eval_size resizes pictures and labels.
"""

import os
import sys
from collections.abc import Sequence
from typing import Callable

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from ROI_FCN import (
    dataset,
    metrics,
    pictures,
    progress,
    run_folder,
    visuals,
    weights,
)
from ROI_FCN.launch import launch
from ROI_FCN.model import create_model

FLAGS = flags.FLAGS
METRIC = "mean_foreground_iou"  # the ROI gives the background away
SHEET_ROWS = 6  # pictures on a contact sheet


def define_flags() -> None:
    """Defines the flags of evaluation."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("data_path", None, "Data set; none: the run's own.")
    flags.DEFINE_string("output_path", None, "For the results; none: the run.")
    flags.DEFINE_string(
        "test_images", None, "Folder of it; none: the run's own."
    )
    flags.DEFINE_string("eval_size", None, "height,width; none: own sizes.")
    flags.DEFINE_integer("limit_eval", 0, "Only the first pictures; 0: all.")
    for alias, name in (
        ("logs_dir", "run"),
        ("data_url", "data_path"),
        ("data_dir", "data_path"),
        ("images", "test_images"),
    ):
        flags.DEFINE_alias(alias, name)
    flags.mark_flag_as_required("run")


def make_evaluation_step(network: tf.keras.Model) -> Callable:
    """The network with its totals as a graph, traced once for all sizes."""

    def step(batch):
        logits = predict_logits(
            network, batch["image"], batch["roi"], tf.shape(batch["label"])[1:]
        )
        totals = metrics.picture_totals(logits, batch["label"], batch["valid"])
        return totals, tf.argmax(logits, -1)

    # Sizes are open: an NPU compiles for each of them, or for --eval_size.
    signature = {
        "image": tf.TensorSpec([1, None, None, 3], tf.float32),
        "roi": tf.TensorSpec([1, None, None, 1], tf.float32),
        "label": tf.TensorSpec([1, None, None], tf.int32),
        "valid": tf.TensorSpec([1, None, None], tf.float32),
    }
    # Not a decorator: an NPU replaces tf.function when it is opened.
    return tf.function(step, [signature], autograph=False)


def predict_logits(
    network: tf.keras.Model, image: tf.Tensor, roi: tf.Tensor, size: tf.Tensor
) -> tf.Tensor:
    """Logits [N, *size, C] of pictures that the network sees at its scale."""
    logits = network([image, roi], training=False)
    # Logits, not classes: between two classes there need be no third.
    return tf.image.resize(logits, size)


def evaluate(
    step: Callable,
    classes: int,
    batches: tf.data.Dataset,
    runtime: npu_config.Runtime,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Runs the network over all batches of all ranks.

    Args:
      step: of make_evaluation_step.
      classes: number of classes.
      batches: this rank's share of the pictures.
      runtime: adds the shares up.

    Returns:
      The table of metrics.figures, and rows for a contact sheet of this
      rank's pictures.
    """
    # With fewer pictures than ranks some have no batch, but all of them must
    # take part in the sum or the others would wait for them for ever.
    sums, rows = metrics.no_totals(classes), []
    chosen = evenly(len(batches))
    watched = progress.watched(
        batches, len(batches), "evaluating picture", runtime.rank
    )
    for number, batch in enumerate(watched):
        totals, predicted = step(batch)
        for name, value in totals.items():
            sums[name] = sums[name] + value.numpy()
        if number in chosen:
            rows.append(_sheet_row(batch, predicted, classes))
    # Means of sums keep every ratio, so each rank gets the whole table.
    names = sorted(sums)
    # Each rank has added up in float64, which an NPU cannot reduce.
    reduced = runtime.all_reduce(
        [tf.constant(sums[name], tf.float32) for name in names]
    )
    return metrics.figures(
        {name: value.numpy() for name, value in zip(names, reduced)}
    ), rows


def evenly(count: int) -> set[int]:
    """Which of `count` pictures are shown: neighbours are too much alike."""
    return set(np.linspace(0, count - 1, SHEET_ROWS).astype(int).tolist())


def _sheet_row(
    batch: dict[str, tf.Tensor], classes: tf.Tensor, count: int
) -> list[np.ndarray]:
    """The tiles of a batch's picture; see save_sheet."""
    label, predicted = batch["label"][0].numpy(), classes[0].numpy()
    image = tf.image.resize(batch["image"][0], label.shape).numpy()
    blended = visuals.overlay(image, predicted, count)
    colours = visuals.palette(count)
    # Outside the region the picture is dimmed, to show what was asked for.
    region = tf.image.resize(batch["roi"][0], label.shape, method="nearest")
    dimmed = image * (0.5 + 0.5 * region.numpy())
    return [
        dimmed.astype(np.uint8),
        colours[label],
        colours[predicted],
        blended,
        visuals.difference(predicted, label, batch["valid"][0].numpy()),
    ]


def save_sheet(path: str, rows: list[list[np.ndarray]]) -> None:
    """Writes rows of `evaluate` as a contact sheet."""
    titles = ("input", "label", "prediction", "overlay", "difference")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    visuals.contact_sheet(rows, titles).save(path)


def save_results(
    output: str,
    table: dict[str, object],
    rows: list[list[np.ndarray]],
    values: dict[str, object],
) -> None:
    """Prints the table; writes metrics.json and images/evaluation.png."""
    names = pictures.class_names(values["labels"], values["num_classes"])
    print(metrics.format_table(table, names))
    sheet = os.path.join(output, "images", "evaluation.png")
    save_sheet(sheet, rows)
    path = os.path.join(output, "metrics.json")
    run_folder.write_json(path, {**table, "class_names": names})
    print(f"wrote metrics.json and {sheet}")


def restore(run: str) -> tuple[dict[str, object], tf.keras.Model]:
    """The flags and the network of a run, best weights."""
    values = run_folder.read_flags(run)
    network, _ = create_model(
        values["num_classes"], values["base_filters"], values["fc_channels"]
    )
    weights.load(network, run)
    return values, network


def evaluation_stream(
    values: dict[str, object],
    pairs: Sequence[pictures.Picture],
    runtime: npu_config.Runtime,
) -> tf.data.Dataset:
    """This rank's share of held-out pictures, as a run's flags ask."""
    size = values["eval_size"]
    return dataset.evaluation_batches(
        pairs[: values["limit_eval"] or None],
        dataset.recipe_of(values),
        size and dataset.parse_size(size, "eval_size"),
        runtime.rank,
        runtime.size,
    )


def evaluate_run(
    values: dict[str, object],
    network: tf.keras.Model,
    runtime: npu_config.Runtime,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Evaluates a network on what a run's flags name; see `evaluate`."""
    pairs = pictures.Reader.of(values).read(values["test_images"])
    batches = evaluation_stream(values, pairs, runtime)
    step = make_evaluation_step(network)
    return evaluate(step, values["num_classes"], batches, runtime)


def main() -> None:
    """Evaluates one run."""
    runtime = npu_config.setup()
    print(runtime.describe())
    values, network = restore(FLAGS.run)
    # Even where it is not given: a limit that kept training short should not
    # pass for the figure of the whole split.
    values["limit_eval"] = FLAGS.limit_eval
    values["eval_size"] = FLAGS.eval_size
    values["data_path"] = FLAGS.data_path or values["data_path"]
    values["test_images"] = FLAGS.test_images or values["test_images"]
    table, rows = evaluate_run(values, network, runtime)
    if runtime.rank == 0:
        output = FLAGS.output_path or FLAGS.run
        save_results(output, table, rows, values)


if __name__ == "__main__":
    define_flags()
    launch(main)
