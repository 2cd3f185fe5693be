"""Trains BlitzNet and evaluates it; the same command resumes a stopped run.

python BlitzNet/train.py --data_path=DIR --output_path=RUN
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

from BlitzNet import (
    anchors,
    dataset,
    detection,
    evaluate,
    losses,
    model,
    pictures,
    predict,
    run_folder,
    sample_data,
    voc,
    weights,
)
from BlitzNet.launch import Stopped, launch, stop_softly
from BlitzNet.layers import Norm
from BlitzNet.model import Architecture
from BlitzNet.optimizer import FusedAdam
from BlitzNet.recorder import Recorder
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS
MODEL = "BlitzNet"
VERSION = "1.0.0"
# Flags that fix the network and the data it sees within one run.
# The seed too: a resumed stream would go on in another order.
SHAPE_FLAGS = (*Architecture._fields, "freeze_batch_norm", "seed")
# Where the seed looks for ImageNet's weights: beside the data.
WEIGHTS_FOLDER = "Weights_imagenet"
LOSSES = ("segmentation", "class", "bbox", "l2_loss")  # their sum is trained


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
    flags.DEFINE_enum(
        "check_data", "sample", ["sample", "all"], "Files to check in full."
    )
    text("output_path", "results", "The run folder.")
    text("run_name", None, "A folder in output_path, for the run.")
    flags.DEFINE_bool("overwrite", False, "Start anew in output_path.")
    text("init_checkpoint", None, "npz, TF1 prefix or run to start from.")
    text("weights_path", "auto", "ImageNet's ResNet-50; see README.")
    flags.DEFINE_bool("random_trunk_init", False, "Do without weights_path.")
    # The seed's recipe for VOC 2012. VOC 2007 and 2012 together had 65000
    # steps and --lr_decay=40000,50000.
    whole("train_steps", 40000, "Steps in all, resumed ones included.", 0)
    whole("batch_size", 32, "Pictures per rank and step.", 1)
    flags.DEFINE_enum(
        "optimizer", "adam", ["adam", "nesterov"], "Nesterov has momentum 0.9."
    )
    real("learning_rate", 1e-4, "Before it decays.", 0.0)
    flags.DEFINE_enum(
        "schedule", "piecewise", ["piecewise", "cosine"], "Of the rate."
    )
    flags.DEFINE_list(
        "lr_decay", ["25000", "35000"], "Steps that divide the rate by 10."
    )
    whole("lr_warmup_step", 0, "Last step at warmup_lr; the first is 0.", 0)
    real("warmup_lr", 1e-5, "Rate of the first steps, if piecewise.", 0.0)
    # As reference and port have it in their code; the paper says 5e-4.
    real("weight_decay", 5e-5, "L2 on all kernels.", 0.0)
    real("batch_norm_decay", 0.9, "Of its statistics, per step.", 0.0, 1.0)
    flags.DEFINE_bool("freeze_batch_norm", False, "Do not train batch norm.")
    flags.DEFINE_bool(
        "sync_batch_norm", True, "One batch norm over the batch of all ranks."
    )
    whole("seed", 0, "Of weights, order, augmentation.", 0)
    model.define_flags()
    voc.define_flags()
    for name in (
        *("num_classes", "ignore_label", "dataset"),
        *("image_size", "x4", "detect", "segment"),
    ):
        flags.declare_key_flag(name)
    flags.DEFINE_enum(
        "augment",
        "paper",
        ["none", "paper"],
        "none resizes, paper varies colour, zoom, crop, side.",
    )
    real("zoomout_prob", 0.5, "Probability of zooming out.", 0.0, 1.0)
    flags.DEFINE_enum(
        "compat", "mended", ["mended", "reference"], "Canvas: ignored, or 0."
    )
    detection.define_flags()
    whole("log_every", 100, "Steps between log lines.", 1)
    whole("eval_every", 2000, "Steps between evaluations; 0: at the end.", 0)
    whole("save_every", 1000, "Steps between checkpoints.", 1)
    whole("keep_checkpoints", 2, "Newest checkpoints kept.", 1)
    whole("warmup_steps", 3, "Steps left out of images/s.", 0)
    whole("limit_train", 0, "Use only the first pictures; 0: all.", 0)
    whole("limit_eval", 0, "Evaluate only the first pictures; 0: all.", 0)
    for alias, name in (
        ("data_dir", "data_path"),
        # The port's README has obs_dir where its code reads data_dir.
        ("obs_dir", "data_path"),
        ("result_dir", "output_path"),
        ("max_iterations", "train_steps"),
        ("warmup_step", "lr_warmup_step"),
        ("bn_decay", "batch_norm_decay"),
        ("split", "train_split"),
    ):
        flags.DEFINE_alias(alias, name)


def check_flags() -> None:
    """Refuses combinations that could only fail later."""
    # As in the seed's commands, --detect alone leaves segmentation out.
    given = FLAGS.detect, FLAGS.segment
    FLAGS.detect, FLAGS.segment = (
        not other if own is None else own
        for own, other in (given, given[::-1])
    )
    if not FLAGS.detect and not FLAGS.segment:
        raise UserError("--nodetect --nosegment: leave one of them out")
    wrong = [step for step in FLAGS.lr_decay if not step.isdigit()]
    steps = [int(step) for step in FLAGS.lr_decay if step.isdigit()]
    bounds = [FLAGS.lr_warmup_step, *steps]
    if wrong or sorted(set(bounds)) != bounds:
        raise UserError(
            f"--lr_decay={','.join(FLAGS.lr_decay)}: give rising steps above "
            f"lr_warmup_step {FLAGS.lr_warmup_step}, such as 25000,35000"
        )


def read_data(
    runtime: npu_config.Runtime, path: str
) -> list[pictures.Picture]:
    """Reads and checks the training pictures, or draws a data set."""
    if not FLAGS.data_path:
        FLAGS.data_path = os.path.join(path, "sample_data")
        print(f"no --data_path: using sample data in {FLAGS.data_path}")
        if runtime.rank == 0 and not os.path.isdir(FLAGS.data_path):
            sample_data.draw(FLAGS.data_path)
        runtime.all_reduce([tf.zeros([])])  # the others wait for the files
    # flags.json keeps the path, and evaluate.py may run from elsewhere.
    FLAGS.data_path = os.path.abspath(FLAGS.data_path)
    parts, _ = voc.parts_of(FLAGS.flag_values_dict())
    seen = [pair for part in parts for pair in read_part(part)]
    seen = seen[: FLAGS.limit_train or None]
    batch = FLAGS.batch_size * runtime.size
    if batch > len(seen):
        raise UserError(
            f"--batch_size={FLAGS.batch_size} on {runtime.size} ranks takes "
            f"{batch} pictures a step, there are {len(seen)}: lower "
            "--batch_size"
        )
    return seen


def read_part(part: voc.Part) -> list[pictures.Picture]:
    """The pictures of a part of the data set, checked and described."""
    reader = voc.Reader.of(FLAGS.flag_values_dict())
    # With the run, since it may be used where the data set is not.
    FLAGS.classes, FLAGS.num_classes = reader.names[1:], len(reader.names)
    pairs = reader.read(part, FLAGS.check_data == "all")
    name = os.path.join(part.year, part.split)
    print(f"{name}: {pictures.describe(pairs, reader.names)}")
    return pairs


def training_stream(
    runtime: npu_config.Runtime,
    seen: Sequence[pictures.Picture],
    first_step: int,
) -> tf.data.Dataset:
    """This rank's batches after `first_step` steps."""
    values = FLAGS.flag_values_dict()
    return dataset.training_batches(
        seen,
        dataset.recipe_of(values),
        anchors.priors(Architecture.of(values)),
        FLAGS.batch_size,
        FLAGS.seed,
        first_step * FLAGS.batch_size * runtime.size,
        runtime.rank,
        runtime.size,
    )


def held_out_pictures() -> Optional[list[pictures.Picture]]:
    """The pictures to evaluate on; None to evaluate none."""
    if "evaluate" not in FLAGS.exec_mode:
        return None
    _, held_out = voc.parts_of(FLAGS.flag_values_dict())
    return read_part(held_out)[: FLAGS.limit_eval or None]


def learning_rate_schedule() -> (
    tf.keras.optimizers.schedules.LearningRateSchedule
):
    """The learning rate over the steps, from 0 on; bounds are inclusive."""
    schedules = tf.keras.optimizers.schedules
    if FLAGS.schedule == "cosine":
        steps = max(FLAGS.train_steps, 1)
        return schedules.CosineDecay(FLAGS.learning_rate, steps)
    rates = [
        FLAGS.learning_rate * 10.0**-power
        for power in range(len(FLAGS.lr_decay) + 1)
    ]
    return schedules.PiecewiseConstantDecay(
        [FLAGS.lr_warmup_step, *map(int, FLAGS.lr_decay)],
        [FLAGS.warmup_lr, *rates],
    )


def create_network(
    runtime: npu_config.Runtime,
) -> tuple[tf.keras.Model, tf.keras.Model, tf.keras.optimizers.Optimizer]:
    """Network, the same for training, and optimiser, seeded by --seed."""
    random.seed(FLAGS.seed)  # Keras 3 draws its initial weights from here
    np.random.seed(FLAGS.seed)
    tf.random.set_seed(FLAGS.seed)  # Keras 2.6 from here
    synchronised = FLAGS.sync_batch_norm and runtime.size > 1
    norm = Norm(
        FLAGS.batch_norm_decay,
        FLAGS.freeze_batch_norm,
        runtime if synchronised else None,
    )
    network = model.create_model(
        Architecture.of(FLAGS.flag_values_dict()), norm
    )
    # Before anything is written: a file that does not fit stops the run.
    trunk = find_trunk_weights()
    # A checkpoint has the last word, since it holds what training made of it.
    if trunk:
        weights.load_trunk(network, trunk)
        print(f"ImageNet weights from {trunk}")
    if FLAGS.init_checkpoint:
        left = weights.load(network, FLAGS.init_checkpoint, True)
        print(
            f"weights from {FLAGS.init_checkpoint}; new: {weights.some(left)}"
        )
    rate = learning_rate_schedule()
    # Epsilon is TF1's; Keras has 1e-7.
    optimizer = FusedAdam(rate, epsilon=1e-8)
    if FLAGS.optimizer == "nesterov":
        optimizer = tf.keras.optimizers.SGD(rate, 0.9, nesterov=True)
    optimizer = runtime.prepare_optimizer(
        optimizer, network.trainable_variables
    )
    return network, network, optimizer


def find_trunk_weights() -> Optional[str]:
    """The file of ImageNet weights that --weights_path means, if any."""
    if FLAGS.random_trunk_init or FLAGS.weights_path == "none":
        return None
    beside_data = os.path.join(FLAGS.data_path, WEIGHTS_FOLDER)
    if FLAGS.weights_path == "auto":
        return beside_data if os.path.isdir(beside_data) else None
    return FLAGS.weights_path


def make_train_step(
    runtime: npu_config.Runtime,
    trainer: tf.keras.Model,
    optimizer: tf.keras.optimizers.Optimizer,
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """One step of training as a graph: batch to loss terms."""
    variables = trainer.trainable_variables
    kernels = weights.kernels(trainer)
    ranks = losses.Ranks(runtime.all_reduce, runtime.rank, runtime.size)

    def train_step(batch):
        with tf.GradientTape() as tape:
            outputs = trainer(batch["image"], training=True)
            terms = batch_losses(outputs, batch, ranks)
            # With a rate of 0 the pass over all weights is saved too.
            if FLAGS.weight_decay:
                decay = losses.weight_decay_loss(kernels)
                terms["l2_loss"] = FLAGS.weight_decay * decay
            total = tf.add_n([terms[n] for n in LOSSES if n in terms])
            objective = runtime.scale_loss(optimizer, total)
        gradients = tape.gradient(objective, variables)
        runtime.apply_gradients(optimizer, gradients, variables)
        return {"total_loss": total, **terms}

    # Not a decorator: an NPU replaces tf.function when it is opened.
    return tf.function(train_step, autograph=False)


def batch_losses(
    outputs: dict[str, tf.Tensor],
    batch: dict[str, tf.Tensor],
    ranks: losses.Ranks,
) -> dict[str, tf.Tensor]:
    """The terms of the heads that there are."""
    terms = {}
    if FLAGS.segment:
        terms["segmentation"] = losses.segmentation_loss(
            outputs["segmentation"], batch["label"], batch["valid"], ranks
        )
    if FLAGS.detect:
        terms.update(
            losses.detection_losses(
                outputs["confidence"],
                outputs["location"],
                batch["classes"],
                batch["boxes"],
                ranks,
            )
        )
    return terms


def train(runtime: npu_config.Runtime, path: str) -> None:
    """Trains in run folder `path`."""
    print("data")
    seen = read_data(runtime, path)
    evaluation_data = held_out_pictures()

    print("model and optimiser")
    network, trainer, optimizer = create_network(runtime)
    print(f"{network.count_params()} parameters")

    print("run folder and restore")
    if runtime.rank == 0:
        run_folder.open_run(path, MODEL, SHAPE_FLAGS, FLAGS.overwrite)
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
    # The reference counts from 0 to its last step: it makes one step more.
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
    recorder.finish(MODEL)


def use_run(runtime: npu_config.Runtime, path: str) -> None:
    """What exec_mode asks for beyond training, from the run's best weights."""
    if FLAGS.exec_mode == "evaluate":
        values, network = evaluate.restore(path)
        names = ("data_path", "dataset", "test_split")
        # What the command line says; all else is as the run was trained.
        given = {n: FLAGS[n].value for n in names if FLAGS[n].present}
        given["limit_eval"] = FLAGS.limit_eval
        values.update(given, **detection.given_flags())
        table, rows = evaluate.evaluate_run(values, network, runtime)
        if runtime.rank == 0:
            evaluate.save_results(path, table, rows, values)
    if "predict" in FLAGS.exec_mode and runtime.rank == 0:
        values = run_folder.read_flags(path)
        # Pictures within a TFRecord have no file of their own.
        paths = [
            pair.path
            for pair in evaluate.read_pictures(values)
            if not pair.span[0]
        ]
        predict.predict_run(path, paths, os.path.join(path, "predictions"))


def main() -> None:
    """Device, then the run."""
    runtime = npu_config.setup()
    print(
        f"{MODEL} {VERSION}, TensorFlow {tf.__version__}, {runtime.describe()}"
    )
    print(run_folder.all_flags())
    check_flags()
    path = os.path.abspath(
        os.path.join(FLAGS.output_path, FLAGS.run_name or "")
    )
    if "train" in FLAGS.exec_mode:
        train(runtime, path)
    use_run(runtime, path)


if __name__ == "__main__":
    define_flags()
    launch(main)
