"""Trains UNet2D and evaluates it; the same command resumes a stopped run.

python UNet2D/train.py --data_path=DIR --output_path=RUN
Without --data_path it draws sample data, so that everything can be tried
with no download.
"""

import os
import random
import sys
from collections.abc import Sequence
from typing import Callable, Optional

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from common.npu_config import UserError
from UNet2D import (
    dataset,
    evaluate,
    losses,
    pictures,
    predict,
    run_folder,
    sample_data,
    weights,
)
from UNet2D.launch import Stopped, launch, stop_softly
from UNet2D.model import bottleneck_shape, check_input_side, create_model
from UNet2D.optimizer import FusedAdam
from UNet2D.recorder import Recorder

FLAGS = flags.FLAGS
MODEL = "UNet2D"
VERSION = "1.0.0"
# Flags that fix the network and the data it sees within one run.
# The last three say what is held out: with others the run would be scored on
# pictures that it has learned.
SHAPE_FLAGS = (
    "image_size",
    "in_channels",
    "num_classes",
    "base_filters",
    "fold",
    "fold_split",
    "seed",
)
# Bare switches of the seed's commands and what they mean here.
SWITCHES = {
    "--augment": "--augment=reference",
    "--noaugment": "--augment=none",
    "--benchmark": "--exec_mode=train",
    "--use_amp": "--precision_mode=allow_mix_precision",
    "--amp": "--precision_mode=allow_mix_precision",
}


def define_flags() -> None:
    """Defines the flags of training; the seed's names are aliases."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    flags.DEFINE_enum(
        "exec_mode",
        "train_and_evaluate",
        [
            "train",
            "evaluate",
            "predict",
            "train_and_evaluate",
            "train_and_predict",
        ],
        "What to do; evaluate and predict use output_path's run.",
    )
    text, whole, real = (
        flags.DEFINE_string,
        flags.DEFINE_integer,
        flags.DEFINE_float,
    )
    text("data_path", None, "Data set; none: draw sample data.")
    # As in the other rooms, where pictures may stay on the disk; here all are
    # held in memory and checked.
    flags.DEFINE_enum(
        "check_data", "sample", ["sample", "all"], "Files to check in full."
    )
    text("output_path", "results", "The run folder.")
    flags.DEFINE_bool("overwrite", False, "Start anew in output_path.")
    text("init_checkpoint", None, "npz, TF1 prefix or run to start from.")
    # Ours, for two cores; the reference's scripts take 6400 steps of 8.
    whole("train_steps", 600, "Steps in all, resumed ones included.", 0)
    whole("batch_size", 1, "Pictures per rank and step.", 1)
    # Rate and dropout are the reference's, the decay that of its TF2 form; the
    # paper has SGD with a momentum of 0.99.
    real("learning_rate", 1e-4, "Of Adam.", 0.0)
    flags.DEFINE_enum(
        "schedule", "constant", ["constant", "cosine"], "Of the rate."
    )
    real("weight_decay", 5e-4, "L2 on all variables; 0: TF1 reference.", 0.0)
    real("dropout", 0.5, "Share of the bottleneck dropped.", 0.0, 0.99)
    whole("seed", 0, "Of weights, folds, order, augmentation.", 0)
    text("fold", "0", "Validation fold 0..4, all, or none.")
    flags.DEFINE_enum(
        "fold_split",
        "partition",
        ["partition", "reference"],
        "Disjoint folds, or NVIDIA's overlapping ones.",
    )
    whole("image_size", 572, "Input side, 16 k + 60 pixels.", 1)
    whole("in_channels", 1, "1 grey, 3 colour.", 1)
    # Class ids are bytes, and one value stays free to be ignored.
    whole("num_classes", 2, "Classes of the labels.", 2, 255)
    # No byte is -1: by default every pixel counts.
    whole("ignore_label", -1, "Label value that does not count.")
    whole("base_filters", 64, "Filters of the first level.", 1)
    flags.DEFINE_enum(
        "initializer",
        "he_normal",
        ["he_normal", "glorot_uniform"],
        "Of the kernels: the paper's, the reference's.",
    )
    flags.DEFINE_enum(
        "augment",
        "turns",
        ["none", "reference", "turns", "paper"],
        "turns has turns for boxes, paper warps too.",
    )
    flags.DEFINE_enum(
        "border",
        "mirror",
        ["mirror", "zero"],
        "Around pictures; zero is the reference's.",
    )
    flags.DEFINE_enum(
        "resize_rule",
        "half_pixel",
        ["half_pixel", "legacy"],
        "TF2's or TF1's bilinear rule.",
    )
    whole("log_every", 10, "Steps between log lines.", 1)
    whole("eval_every", 100, "Steps between evaluations; 0: at the end.", 0)
    whole("save_every", 100, "Steps between checkpoints.", 1)
    # Two, since the newest may be damaged; the reference keeps one.
    whole("keep_checkpoints", 2, "Newest checkpoints kept.", 1)
    # The port's number; NVIDIA leaves out 200.
    whole("warmup_steps", 3, "Steps left out of images/s.", 0)
    whole("limit_train", 0, "Use only the first pictures; 0: all.", 0)
    whole("limit_eval", 0, "Evaluate only the first pictures; 0: all.", 0)
    for alias, name in (
        ("data_dir", "data_path"),
        ("model_dir", "output_path"),
        ("max_steps", "train_steps"),
        ("crossvalidation_idx", "fold"),
        ("evaluate_every", "eval_every"),
    ):
        flags.DEFINE_alias(alias, name)


def check_flags() -> None:
    """Refuses combinations that could only fail later."""
    check_input_side(FLAGS.image_size, "--image_size")
    # The seed finds this out after the whole training.
    if FLAGS.fold == "none" and "evaluate" in FLAGS.exec_mode:
        raise UserError(
            f"--fold=none leaves nothing for --exec_mode={FLAGS.exec_mode}; "
            "choose a fold or --exec_mode=train"
        )


def read_data(
    runtime: npu_config.Runtime, path: str
) -> list[pictures.Picture]:
    """Reads and checks the data set, or draws one where none is given."""
    if not FLAGS.data_path:
        FLAGS.data_path = os.path.join(path, "sample_data")
        print(f"no --data_path: using sample data in {FLAGS.data_path}")
        if runtime.rank == 0 and not os.path.isdir(FLAGS.data_path):
            sample_data.draw(
                FLAGS.data_path,
                channels=FLAGS.in_channels,
                classes=FLAGS.num_classes,
            )
        runtime.all_reduce([tf.zeros([])])  # the others wait for the files
    # flags.json keeps the path, and evaluate.py may run from elsewhere.
    FLAGS.data_path = os.path.abspath(FLAGS.data_path)
    return pictures.read_pairs(
        FLAGS.data_path,
        FLAGS.in_channels,
        FLAGS.num_classes,
        FLAGS.ignore_label,
    )


def split_data(
    pairs: Sequence[pictures.Picture], fold: str, ranks: int
) -> tuple[list[pictures.Picture], list[pictures.Picture]]:
    """The pictures to train on and those held out for evaluation."""
    # Limits cut after the split, so that no fold loses its meaning.
    splits = dataset.split_fold(len(pairs), fold, FLAGS.fold_split, FLAGS.seed)
    limits = (FLAGS.limit_train or None, FLAGS.limit_eval or None)
    seen, held_out = (
        [pairs[index] for index in split[:limit]]
        for split, limit in zip(splits, limits)
    )
    batch = FLAGS.batch_size * ranks
    if batch > len(seen):
        raise UserError(
            f"--batch_size={FLAGS.batch_size} on {ranks} ranks takes {batch} "
            f"pictures a step, the training split has {len(seen)}: lower "
            "--batch_size"
        )
    return seen, held_out


def training_stream(
    runtime: npu_config.Runtime,
    seen: Sequence[pictures.Picture],
    first_step: int,
) -> tf.data.Dataset:
    """This rank's batches after `first_step` steps."""
    geometry = dataset.geometry_of(FLAGS.flag_values_dict())
    return dataset.training_batches(
        dataset.prepare_pictures(seen, geometry),
        geometry,
        FLAGS.augment,
        bottleneck_shape(FLAGS.image_size, FLAGS.base_filters),
        FLAGS.dropout,
        FLAGS.batch_size,
        FLAGS.seed,
        first_step * FLAGS.batch_size * runtime.size,
        runtime.rank,
        runtime.size,
    )


def evaluation_stream(
    runtime: npu_config.Runtime, held_out: Sequence[pictures.Picture]
) -> Optional[tf.data.Dataset]:
    """This rank's share of the held-out pictures; None to evaluate none."""
    if "evaluate" not in FLAGS.exec_mode:
        return None
    geometry = dataset.geometry_of(FLAGS.flag_values_dict())
    return dataset.evaluation_batches(
        dataset.prepare_pictures(held_out, geometry),
        geometry,
        runtime.rank,
        runtime.size,
    )


def learning_rate_schedule() -> tf.keras.optimizers.schedules.CosineDecay:
    """The learning rate over the steps; a cosine to 1 is a constant."""
    return tf.keras.optimizers.schedules.CosineDecay(
        FLAGS.learning_rate,
        max(FLAGS.train_steps, 1),
        alpha=0.0 if FLAGS.schedule == "cosine" else 1.0,
    )


def create_network(
    runtime: npu_config.Runtime,
) -> tuple[tf.keras.Model, tf.keras.Model, tf.keras.optimizers.Optimizer]:
    """Network, its twin for training and optimiser, seeded by --seed."""
    random.seed(FLAGS.seed)  # Keras 3 draws its initial weights from here
    np.random.seed(FLAGS.seed)
    tf.random.set_seed(FLAGS.seed)  # Keras 2.6 from here
    network, trainer = create_model(
        FLAGS.num_classes,
        FLAGS.in_channels,
        FLAGS.base_filters,
        FLAGS.initializer,
    )
    # Before anything is written: a file that does not fit stops the run.
    if FLAGS.init_checkpoint:
        left = weights.load(network, FLAGS.init_checkpoint, True)
        print(
            f"weights from {FLAGS.init_checkpoint}; new: {weights.some(left)}"
        )
    # Epsilon is TF1's; Keras has 1e-7.
    optimizer = runtime.prepare_optimizer(
        FusedAdam(learning_rate_schedule(), epsilon=1e-8),
        trainer.trainable_variables,
    )
    return network, trainer, optimizer


def make_train_step(
    runtime: npu_config.Runtime,
    trainer: tf.keras.Model,
    optimizer: tf.keras.optimizers.Optimizer,
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """One step of training as a graph: batch to loss terms.

    The L2 term acts on the gradients and is logged apart: total_loss is
    without it, as in the reference's log.
    """
    variables = trainer.trainable_variables

    def train_step(batch):
        with tf.GradientTape() as tape:
            inputs = [batch["image"], batch["dropout_mask"]]
            logits = trainer(inputs, training=True)
            terms = losses.segmentation_losses(
                logits, batch["label"], batch["valid"]
            )
            objective = terms["total_loss"]
            # With a rate of 0 the pass over all weights is saved too.
            if FLAGS.weight_decay:
                terms["l2_loss"] = losses.weight_decay_loss(variables)
                objective += FLAGS.weight_decay * terms["l2_loss"]
            objective = runtime.scale_loss(optimizer, objective)
        gradients = tape.gradient(objective, variables)
        runtime.apply_gradients(optimizer, gradients, variables)
        return terms

    # Not a decorator: an NPU replaces tf.function when it is opened.
    return tf.function(train_step, autograph=False)


def train(runtime: npu_config.Runtime, fold: str, path: str) -> dict:
    """Trains one fold in run folder `path`; returns its result.json."""
    print("data")
    pairs = read_data(runtime, path)
    seen, held_out = split_data(pairs, fold, runtime.size)
    print(f"{len(seen)} training pictures, {len(held_out)} held out")
    evaluation_data = evaluation_stream(runtime, held_out)

    print("model and optimiser")
    network, trainer, optimizer = create_network(runtime)
    print(f"{network.count_params()} parameters")

    print("run folder and restore")
    picture_size = pairs[0].label.shape
    if runtime.rank == 0:
        run_folder.open_run(
            path, MODEL, SHAPE_FLAGS, FLAGS.overwrite, picture_size
        )
    checkpoints = run_folder.Checkpoints(
        path, FLAGS.keep_checkpoints, network, optimizer
    )
    if runtime.rank == 0:
        checkpoints.restore()
    # Rank 0 alone has read files; the others take all its state.
    runtime.broadcast(checkpoints.variables())
    first = int(checkpoints.step)

    print(f"training, steps {first + 1} to {FLAGS.train_steps}")
    recorder = Recorder(
        runtime, path, network, checkpoints, learning_rate_schedule()
    )
    train_step = make_train_step(runtime, trainer, optimizer)
    batches = iter(training_stream(runtime, seen, first))
    stop_softly()
    recorder.clock.restart()
    for step in range(first + 1, FLAGS.train_steps + 1):
        recorder.step_done(train_step(next(batches)))
        # Every rank comes to the same answers here, or they would part.
        stopping = recorder.stop_requested()
        last = stopping or step == FLAGS.train_steps
        saving = last or step % FLAGS.save_every == 0
        evaluating = evaluation_data is not None and (
            step == FLAGS.train_steps
            or (FLAGS.eval_every and step % FLAGS.eval_every == 0)
        )
        # Before other work, so that the window holds nothing but training.
        if evaluating or saving or step % FLAGS.log_every == 0:
            recorder.record(step)
        # Whoever stops us may not wait for an evaluation.
        if evaluating and not stopping:
            recorder.evaluate(step, evaluation_data)
        # After the evaluation, so that the checkpoint holds its figure.
        if saving:
            recorder.save(step)
        if stopping:
            raise Stopped(
                f"stopped after step {step} and saved; the same command "
                "continues"
            )
    # A finished run that is started again has only to be evaluated.
    if first >= FLAGS.train_steps and evaluation_data is not None:
        recorder.evaluate(first, evaluation_data)
    return recorder.finish(MODEL)


def use_run(runtime: npu_config.Runtime, fold: str, path: str) -> None:
    """What exec_mode asks for beyond training, from the run's best weights."""
    if FLAGS.exec_mode == "evaluate":
        values, network = evaluate.restore(path)
        # What the command line says; all else is as the run was trained.
        values.update(fold=fold, limit_eval=FLAGS.limit_eval)
        values["data_path"] = FLAGS.data_path or values["data_path"]
        table, rows = evaluate.evaluate_run(values, network, runtime)
        if runtime.rank == 0:
            evaluate.save_results(path, table, rows)
    if "predict" in FLAGS.exec_mode and runtime.rank == 0:
        data_path = run_folder.read_flags(path)["data_path"]
        tests = predict.test_pictures(data_path)
        predict.predict_run(path, tests, os.path.join(path, "predictions"))


def main() -> None:
    """Device, then one run, or one for each fold."""
    runtime = npu_config.setup()
    print(
        f"{MODEL} {VERSION}, TensorFlow {tf.__version__}, {runtime.describe()}"
    )
    print(run_folder.all_flags())
    path = os.path.abspath(FLAGS.output_path)
    # As the run was split: otherwise it is scored on what it has learned.
    if "train" not in FLAGS.exec_mode and not FLAGS["fold"].present:
        FLAGS.fold = run_folder.read_flags(path)["fold"]
    check_flags()
    results = []
    for fold, run in dataset.fold_runs(FLAGS.fold, path):
        FLAGS.fold = fold  # what flags.json of its folder shall say
        if "train" in FLAGS.exec_mode:
            results.append(train(runtime, fold, run))
        use_run(runtime, fold, run)
    if len(results) > 1 and results[0]["metric"] is not None:
        mean = np.mean([result["metric"] for result in results])
        print(f"mean of {len(results)} folds: {evaluate.METRIC} {mean:.4f}")


if __name__ == "__main__":
    define_flags()
    launch(main, SWITCHES)
