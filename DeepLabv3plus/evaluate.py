"""Evaluates a run of DeepLabv3plus: a table, metrics.json, a contact sheet.

python DeepLabv3plus/evaluate.py --run=RUN [--data_path=DIR]
  [--eval_split=val] [--scales=0.75,1,1.25] [--flip]
At the pictures' own sizes: padded to the crop, or slid over by it.
"""

import os
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from common.npu_config import UserError
from DeepLabv3plus import (
    dataset,
    layouts,
    metrics,
    pictures,
    progress,
    run_folder,
    visuals,
    weights,
)
from DeepLabv3plus.launch import launch
from DeepLabv3plus.layers import BatchNorm
from DeepLabv3plus.model import create_model, shape_of
from DeepLabv3plus.segment import Plan, Segmenter

FLAGS = flags.FLAGS
# VOC's headline figure: chooses best/, and is ModelZoo's TrainAccuracy.
METRIC = "mean_iou"
SHEET_ROWS = 6  # pictures on a contact sheet
SCALE_RANGE = (0.1, 4.0)
# What the command line may change of what the run was trained with.
CHANGEABLE = ("data_path", "eval_split", "eval_crop_size", "label_folder")


def define_flags() -> None:
    """Defines the flags of evaluation."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("data_path", None, "Data set; none: the run's own.")
    flags.DEFINE_string("output_path", None, "For the results; none: the run.")
    flags.DEFINE_string("eval_split", None, "Split; none: the run's own.")
    flags.DEFINE_string("label_folder", None, "Of VOC; none: the run's own.")
    flags.DEFINE_integer("limit_eval", 0, "Only the first pictures; 0: all.")
    define_scale_flags()
    for alias, name in (
        ("checkpoint_dir", "run"),
        ("dataset_dir", "data_path"),
        ("eval_logdir", "output_path"),
    ):
        flags.DEFINE_alias(alias, name)
    flags.mark_flag_as_required("run")


def define_scale_flags() -> None:
    """Defines at which sizes and how often a picture is looked at."""
    flags.DEFINE_string(
        "eval_crop_size",
        None,
        "height,width that the network sees; none: the run's own.",
    )
    flags.DEFINE_list("scales", ["1"], "Sizes to look at, and to average.")
    flags.DEFINE_bool("flip", False, "Look at the mirrored picture as well.")
    for alias, name in (
        ("eval_scales", "scales"),
        ("add_flipped_images", "flip"),
    ):
        flags.DEFINE_alias(alias, name)


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


def make_segmenter(
    values: dict[str, object],
    network: tf.keras.Model,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Segmenter:
    """The network of a run for pictures of any size."""
    flag = "eval_crop_size" if values["eval_crop_size"] else "train_crop_size"
    crop = dataset.parse_size(values[flag], flag)
    stride = shape_of(values).logits_stride
    recipe = dataset.recipe_of(values)
    plan = Plan(crop, stride, tuple(scales), flip, recipe)
    return Segmenter(network, plan)


def evaluate(
    segmenter: Segmenter,
    classes: int,
    batches: tf.data.Dataset,
    runtime: npu_config.Runtime,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Segments the pictures of all batches of all ranks.

    Args:
      segmenter: of make_segmenter.
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
        sample = {name: value[0].numpy() for name, value in batch.items()}
        probabilities = segmenter(sample["image"])
        totals = metrics.picture_totals(
            probabilities, sample["label"], sample["valid"]
        )
        for name, value in totals.items():
            sums[name] = sums[name] + value
        if number in chosen:
            rows.append(_sheet_row(sample, probabilities.argmax(-1), classes))
    # Means of sums keep every ratio, so each rank gets the whole table.
    names = sorted(sums)
    if runtime.size > 1:
        # Each rank has added up in float64, which an NPU cannot reduce.
        reduced = runtime.all_reduce(
            [tf.constant(sums[name], tf.float32) for name in names]
        )
        sums = {name: value.numpy() for name, value in zip(names, reduced)}
    return metrics.figures(sums), rows


def evenly(count: int) -> set[int]:
    """Which of `count` pictures are shown: neighbours are too much alike."""
    return set(np.linspace(0, count - 1, SHEET_ROWS).astype(int).tolist())


def _sheet_row(
    sample: dict[str, np.ndarray], predicted: np.ndarray, count: int
) -> list[np.ndarray]:
    """The tiles of a picture; see save_sheet."""
    label, valid = sample["label"], sample["valid"]
    blended = visuals.overlay(sample["image"], predicted, count)
    colours = visuals.palette(count)
    shown = colours[label]
    shown[valid == 0] = (224, 224, 192)  # the devkit's colour of the void
    return [
        sample["image"].astype(np.uint8),
        shown,
        colours[predicted],
        blended,
        visuals.difference(predicted, label, valid),
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
    names = class_names(values)
    print(metrics.format_table(table, names))
    sheet = os.path.join(output, "images", "evaluation.png")
    save_sheet(sheet, rows)
    path = os.path.join(output, "metrics.json")
    run_folder.write_json(path, {**table, "class_names": names})
    print(f"wrote metrics.json and {sheet}")


def class_names(values: dict[str, object]) -> tuple[str, ...]:
    """Names of the classes of a run's data."""
    names = pictures.read_class_names(values["data_path"])
    return pictures.fit_names(names, values["num_classes"])


def restore(run: str) -> tuple[dict[str, object], tf.keras.Model]:
    """The flags and the network of a run, best weights."""
    values = run_folder.read_flags(run)
    # Whether batch norm was trained makes a difference in training alone.
    network, _ = create_model(shape_of(values), BatchNorm())
    weights.load(network, run)
    return values, network


def read_split(
    values: dict[str, object], split: str, check_all: bool = False
) -> list[pictures.Picture]:
    """The pictures of a split of a run's data, checked."""
    sources = layouts.find_sources(
        values["data_path"], split, values["label_folder"]
    )
    return pictures.read_all(
        sources, values["num_classes"], values["ignore_label"], check_all
    )


def evaluate_run(
    values: dict[str, object],
    network: tf.keras.Model,
    runtime: npu_config.Runtime,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Evaluates a network on what a run's flags name; see `evaluate`."""
    pairs = read_split(values, values["eval_split"])
    batches = dataset.evaluation_batches(
        pairs[: values["limit_eval"] or None],
        values["ignore_label"],
        runtime.rank,
        runtime.size,
    )
    segmenter = make_segmenter(values, network, scales, flip)
    return evaluate(segmenter, values["num_classes"], batches, runtime)


def main() -> None:
    """Evaluates one run."""
    scales = read_scales()
    runtime = npu_config.setup()
    print(runtime.describe())
    values, network = restore(FLAGS.run)
    # Even where it is not given: a limit that kept training short should not
    # pass for the figure of the whole split.
    values["limit_eval"] = FLAGS.limit_eval
    given = {name: FLAGS[name].value for name in CHANGEABLE}
    values.update({name: value for name, value in given.items() if value})
    table, rows = evaluate_run(values, network, runtime, scales, FLAGS.flip)
    if runtime.rank == 0:
        output = FLAGS.output_path or FLAGS.run
        save_results(output, table, rows, values)


if __name__ == "__main__":
    define_flags()
    launch(main)
