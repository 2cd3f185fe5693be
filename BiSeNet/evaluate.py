"""Evaluates a run of BiSeNet: a table, metrics.json and a contact sheet.

python BiSeNet/evaluate.py --data_path=DIR [--run=RUN] [--eval_split=test]
  [--scales=0.75,1,1.25] [--flip]
Every picture of the split counts once, at its label's own size.
"""

import os
import sys
from collections.abc import Sequence
from typing import Callable

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BiSeNet import (
    dataset,
    metrics,
    pictures,
    progress,
    run_folder,
    visuals,
    weights,
)
from BiSeNet.classes import FILE, Classes, read
from BiSeNet.launch import launch
from BiSeNet.model import create_model
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS
METRIC = "mean_iou"  # of the classes that count
SHEET_ROWS = 6  # pictures on a contact sheet
SCALE_RANGE = (0.1, 4.0)


def define_flags() -> None:
    """Defines the flags of evaluation."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder; none: the one shipped.")
    flags.DEFINE_string("data_path", None, "Data set; none: the run's own.")
    flags.DEFINE_string("output_path", None, "For the results; none: the run.")
    flags.DEFINE_string(
        "eval_split", None, "Folder of it; none: the run's own."
    )
    define_scale_flags()
    flags.DEFINE_integer("limit_eval", 0, "Only the first pictures; 0: all.")
    for alias, name in (
        ("logs_dir", "run"),
        ("data_url", "data_path"),
        ("data_dir", "data_path"),
        ("split", "eval_split"),
    ):
        flags.DEFINE_alias(alias, name)


def define_scale_flags() -> None:
    """Defines how often a picture is looked at."""
    flags.DEFINE_list("scales", ["1"], "Sizes to look at, and to average.")
    flags.DEFINE_bool("flip", False, "Look at the mirrored picture as well.")


def read_scales() -> list[float]:
    """The factors of --scales."""
    low, high = SCALE_RANGE
    try:
        scales = [float(part) for part in FLAGS.scales]
    except ValueError:
        scales = []
    if not scales or not all(low <= scale <= high for scale in scales):
        raise UserError(
            f"--scales={','.join(FLAGS.scales)}: numbers of {low}..{high}, "
            "separated by commas, such as 0.75,1,1.25"
        )
    return scales


def predict_scores(
    network: tf.keras.Model,
    images: tf.Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tf.Tensor:
    """Scores [N, H, W, C] of images [N, H, W, 3].

    Logits of the pictures as they are; of several views of them, the
    logarithm of the mean probability.
    """
    size = tf.shape(images)[1:3]
    views = []
    for scale in scales:
        seen = images
        if scale != 1.0:
            scaled = tf.round(scale * tf.cast(size, tf.float32))
            seen = tf.image.resize(images, tf.cast(scaled, tf.int32))
        views.append(network(seen, training=False))
        if flip:
            mirrored = network(seen[:, :, ::-1], training=False)
            views.append(mirrored[:, :, ::-1])
    if len(views) == 1 and scales[0] == 1.0:
        return views[0]
    views = [tf.nn.softmax(tf.image.resize(each, size)) for each in views]
    # Logits are float32 under every policy: in float16 1e-12 would be 0.
    return tf.math.log(tf.add_n(views) / len(views) + 1e-12)


def make_evaluation_step(
    network: tf.keras.Model,
    classes: Classes,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Callable:
    """The network with its totals as a graph, traced once for all sizes."""

    def step(batch):
        scores = predict_scores(network, batch["image"], scales, flip)
        totals = metrics.picture_totals(
            scores, batch["label"], classes.ignored
        )
        return totals, tf.argmax(scores, -1)

    signature = {
        "image": tf.TensorSpec([1, None, None, 3], tf.float32),
        "label": tf.TensorSpec([1, None, None], tf.int32),
    }
    # Not a decorator: an NPU replaces tf.function when it is opened.
    return tf.function(step, [signature], autograph=False)


def evaluate(
    step: Callable,
    classes: Classes,
    batches: tf.data.Dataset,
    runtime: npu_config.Runtime,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Runs the network over all batches of all ranks.

    Args:
      step: of make_evaluation_step.
      classes: that the network tells apart.
      batches: this rank's share of the pictures.
      runtime: adds the shares up.

    Returns:
      The table of metrics.figures, and rows for a contact sheet of this
      rank's pictures.
    """
    # With fewer pictures than ranks some have no batch, but all of them must
    # take part in the sum or the others would wait for them for ever.
    sums, rows = metrics.no_totals(len(classes.names)), []
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
    # Rounded to float32 only here, since HCCL takes no float64.
    reduced = runtime.all_reduce(
        [tf.constant(sums[name], tf.float32) for name in names]
    )
    totals = {name: value.numpy() for name, value in zip(names, reduced)}
    return metrics.figures(totals, classes), rows


def evenly(count: int) -> set[int]:
    """Which of `count` pictures are shown: neighbours are too much alike."""
    return set(np.linspace(0, count - 1, SHEET_ROWS).astype(int).tolist())


def _sheet_row(
    batch: dict[str, tf.Tensor], predicted: tf.Tensor, classes: Classes
) -> list[np.ndarray]:
    """The tiles of a batch's picture; see save_sheet."""
    label, ids = batch["label"][0].numpy(), predicted[0].numpy()
    image = batch["image"][0].numpy().astype(np.uint8)
    colours = visuals.palette(classes)
    return [
        image,
        colours[label],
        colours[ids],
        visuals.overlay(image, ids, classes),
        visuals.difference(ids, label, classes),
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
    names = values["classes"].names
    print(metrics.format_table(table, names))
    sheet = os.path.join(output, "images", "evaluation.png")
    save_sheet(sheet, rows)
    path = os.path.join(output, "metrics.json")
    run_folder.write_json(path, {**table, "class_names": list(names)})
    print(f"wrote metrics.json and {sheet}")


def restore(run: str) -> tuple[dict[str, object], tf.keras.Model]:
    """The flags of a run with its `classes`, and its network, best weights."""
    values = run_folder.read_flags(run)
    classes = read(os.path.join(run, FILE))
    values["classes"] = classes.ignoring(
        values["ignore_classes"], must_exist=False
    )
    network, _ = create_model(
        values["num_classes"], values["frontend"], values["compat"]
    )
    facts = (values["frontend"], values["compat"])
    weights.load(network, run, facts=facts)
    return values, network


def read_split(values: dict[str, object]) -> list[pictures.Picture]:
    """The pictures of the split that a run's flags name."""
    if not values["data_path"]:
        raise UserError(
            "--data_path: not given, and this run brings no data; give the "
            "folder of a data set"
        )
    reader = pictures.Reader(values)
    names = values["classes"].names
    if reader.classes.names != names:
        raise UserError(
            f"--data_path={values['data_path']} has the classes "
            f"{', '.join(reader.classes.names)}, the run "
            f"{', '.join(names)}; give data of the same classes"
        )
    return reader.read(values["eval_split"])


def evaluation_stream(
    values: dict[str, object],
    pairs: Sequence[pictures.Picture],
    runtime: npu_config.Runtime,
) -> tf.data.Dataset:
    """This rank's share of held-out pictures."""
    return dataset.evaluation_batches(
        pairs[: values["limit_eval"] or None], runtime.rank, runtime.size
    )


def evaluate_run(
    values: dict[str, object],
    network: tf.keras.Model,
    runtime: npu_config.Runtime,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Evaluates a network on what a run's flags name; see `evaluate`."""
    batches = evaluation_stream(values, read_split(values), runtime)
    classes = values["classes"]
    step = make_evaluation_step(network, classes, scales, flip)
    return evaluate(step, classes, batches, runtime)


def main() -> None:
    """Evaluates one run."""
    run, scales = run_folder.find_run(FLAGS.run), read_scales()
    runtime = npu_config.setup()
    print(runtime.describe())
    values, network = restore(run)
    # Even where it is not given: a limit that kept training short should not
    # pass for the figure of the whole split.
    values["limit_eval"] = FLAGS.limit_eval
    for name in ("data_path", "eval_split"):
        values[name] = FLAGS[name].value or values[name]
    table, rows = evaluate_run(values, network, runtime, scales, FLAGS.flip)
    if runtime.rank == 0:
        # Nobody's results belong beside the weights that are shipped.
        output = FLAGS.output_path or FLAGS.run or "results"
        save_results(output, table, rows, values)


if __name__ == "__main__":
    define_flags()
    launch(main)
