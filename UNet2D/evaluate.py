"""Evaluates a run of UNet2D: a table, metrics.json and a contact sheet.

python UNet2D/evaluate.py --run=RUN [--data_path=DIR] [--fold=0|…|all]
"""

import os
import sys
from typing import Callable

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from UNet2D import (
    dataset,
    metrics,
    pictures,
    progress,
    run_folder,
    visuals,
    weights,
)
from UNet2D.launch import launch
from UNet2D.model import MARGIN, create_model

FLAGS = flags.FLAGS
METRIC = "mean_soft_dice"  # the headline, as the reference reports it
SHEET_ROWS = 6  # pictures on a contact sheet


def define_flags() -> None:
    """Defines the flags of evaluation."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("data_path", None, "Data set; none: the run's own.")
    flags.DEFINE_string("output_path", None, "For the results; none: the run.")
    flags.DEFINE_string("fold", None, "0..4, all (mean of RUN/fold*), none.")
    flags.DEFINE_integer("limit_eval", 0, "Only the first pictures; 0: all.")
    for alias, name in (("model_dir", "run"), ("data_dir", "data_path")):
        flags.DEFINE_alias(alias, name)
    flags.mark_flag_as_required("run")


def make_evaluation_step(network: tf.keras.Model) -> Callable:
    """The network with its totals as a graph, traced once for all batches."""

    def step(batch):
        logits = network(batch["image"], training=False)
        totals = metrics.picture_totals(logits, batch["label"], batch["valid"])
        return totals, tf.argmax(logits, -1)

    # Not a decorator: an NPU replaces tf.function when it is opened.
    return tf.function(step, autograph=False)


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
      The table of metrics.figures, and rows for a contact sheet: input,
      label, prediction and difference of some of this rank's pictures.
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
    """Input, label, prediction and difference of a batch's first picture."""
    image = batch["image"][0].numpy()[MARGIN:-MARGIN, MARGIN:-MARGIN]
    label, predicted = batch["label"][0].numpy(), classes[0].numpy()
    colours = visuals.palette(count)
    return [
        visuals.to_bytes(image[..., :3] if image.shape[-1] > 1 else image),
        colours[label],
        colours[predicted],
        visuals.difference(predicted, label, batch["valid"][0].numpy()),
    ]


def save_sheet(path: str, rows: list[list[np.ndarray]]) -> None:
    """Writes rows of `evaluate` as a contact sheet."""
    titles = ("input", "label", "prediction", "difference")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    visuals.contact_sheet(rows, titles).save(path)


def save_results(
    output: str, table: dict[str, object], rows: list[list[np.ndarray]]
) -> None:
    """Prints the table; writes metrics.json and images/evaluation.png."""
    print(metrics.format_table(table))
    sheet = os.path.join(output, "images", "evaluation.png")
    save_sheet(sheet, rows)
    run_folder.write_json(os.path.join(output, "metrics.json"), table)
    print(f"wrote metrics.json and {sheet}")


def restore(run: str) -> tuple[dict[str, object], tf.keras.Model]:
    """The flags and the network of a run, best weights."""
    values = run_folder.read_flags(run)
    network, _ = create_model(
        values["num_classes"], values["in_channels"], values["base_filters"]
    )
    weights.load(network, run)
    return values, network


def evaluate_run(
    values: dict[str, object],
    network: tf.keras.Model,
    runtime: npu_config.Runtime,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Evaluates a network on what a run's flags name; see `evaluate`."""
    geometry = dataset.geometry_of(values)
    pairs = pictures.read_pairs(
        values["data_path"],
        geometry.channels,
        geometry.num_classes,
        geometry.ignore_label,
    )
    if values["fold"] != "none":
        # As the run was split: otherwise it is scored on what it has learned.
        _, held_out = dataset.split_fold(
            len(pairs), values["fold"], values["fold_split"], values["seed"]
        )
        pairs = [pairs[index] for index in held_out]
    pairs = pairs[: values["limit_eval"] or None]
    prepared = dataset.prepare_pictures(pairs, geometry)
    batches = dataset.evaluation_batches(
        prepared, geometry, runtime.rank, runtime.size
    )
    step = make_evaluation_step(network)
    return evaluate(step, geometry.num_classes, batches, runtime)


def mean_tables(tables: list[dict[str, object]]) -> dict[str, object]:
    """The plain mean over folds; a class counts in the folds that have it."""
    if len(tables) == 1:
        return tables[0]
    means = {}
    for name in tables[0]:
        values = np.array([table[name] for table in tables], np.float64)
        present = np.isfinite(values)
        sums = np.where(present, values, 0.0).sum(0)
        mean = np.where(present.any(0), sums / present.sum(0).clip(1), None)
        means[name] = mean.tolist()
    return means


def main() -> None:
    """Evaluates one run, or the five of a cross-validation."""
    runtime = npu_config.setup()
    print(runtime.describe())
    wanted = FLAGS.fold or run_folder.read_flags(FLAGS.run)["fold"]
    tables, rows = [], []
    for fold, run in dataset.fold_runs(wanted, FLAGS.run):
        values, network = restore(run)
        # Even where it is not given: a limit that kept training short should
        # not pass for the figure of the whole split.
        values.update(limit_eval=FLAGS.limit_eval, fold=fold)
        values["data_path"] = FLAGS.data_path or values["data_path"]
        table, sheet = evaluate_run(values, network, runtime)
        print(f"fold {fold}: {METRIC} {table[METRIC]:.4f}")
        tables.append(table)
        rows += sheet
    if runtime.rank == 0:
        output = FLAGS.output_path or FLAGS.run
        save_results(output, mean_tables(tables), rows)


if __name__ == "__main__":
    define_flags()
    launch(main)
