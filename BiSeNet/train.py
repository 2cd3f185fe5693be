"""Trains BiSeNet and evaluates it; the same command resumes a stopped run.

python BiSeNet/train.py --data_path=DIR --output_path=RUN
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

from BiSeNet import (
    dataset,
    evaluate,
    losses,
    pictures,
    predict,
    run_folder,
    sample_data,
    weights,
)
from BiSeNet.backbones import FRONTENDS
from BiSeNet.classes import FILE, Classes
from BiSeNet.launch import Stopped, launch, stop_softly
from BiSeNet.layers import FORMS
from BiSeNet.model import create_model
from BiSeNet.optimizer import FusedMomentum, WarmUp
from BiSeNet.recorder import Recorder
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS
MODEL = "BiSeNet"
VERSION = "1.0.0"
# As in the paper and in the seed.
POLY_POWER = 0.9
# Flags that fix the network and the data it sees within one run.
SHAPE_FLAGS = (
    "frontend",
    "compat",
    "num_classes",
    "ignore_classes",
    "group_classes",
    "seed",
)


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
    text("class_dict", None, "csv of classes; none: the data set's own.")
    flags.DEFINE_enum(
        "check_data", "sample", ["sample", "all"], "Files to check in full."
    )
    flags.DEFINE_enum(
        "unknown_colour",
        "error",
        ["error", "ignore"],
        "Colours of labels that are no class.",
    )
    text("output_path", "results", "The run folder.")
    flags.DEFINE_bool("overwrite", False, "Start anew in output_path.")
    text("init_checkpoint", None, "npz, TF1 prefix or run to start from.")
    flags.DEFINE_enum(
        "frontend", "Xception39", list(FRONTENDS), "Of the context path."
    )
    text("frontend_checkpoint", None, "slim's ImageNet weights for it.")
    flags.DEFINE_enum(
        "compat",
        "paper",
        list(FORMS),
        "paper mends what the TF1 reference got wrong.",
    )
    # The seed's 2000 epochs of CamVid's 421 pictures, 8 at a time.
    whole("train_steps", 105250, "Steps in all, resumed ones included.", 0)
    real("train_epochs", None, "Instead of train_steps, in epochs.", 0.0)
    whole("batch_size", 8, "Pictures per rank and step.", 1)
    # The seed's code; the paper takes 0.025 for batches of 16.
    real("learning_rate", 0.01, "Of SGD with momentum.", 0.0)
    real("momentum", 0.9, "Of SGD; 0: plain SGD.", 0.0, 1.0)
    flags.DEFINE_enum(
        "schedule", "poly", ["constant", "cosine", "poly"], "Of the rate."
    )
    whole("lr_warmup_steps", 0, "Steps of a rate that rises from 0.", 0)
    real("weight_decay", None, "L2; none: that of the frontend.", 0.0)
    text("class_weights", "none", "median_freq, sqrt_freq, list or none.")
    real("ohem", 0.0, "Learn pixels below this probability; 0: all.", 0.0, 1.0)
    whole("seed", 0, "Of weights, order, augmentation.", 0)
    whole("num_classes", None, "Classes of the labels.", 2, 255)
    whole("ignore_label", -1, "Label value that does not count.")
    flags.DEFINE_list("ignore_classes", ["Void"], "Names that do not count.")
    flags.DEFINE_enum(
        "group_classes",
        "none",
        ["none", "camvid11"],
        "Learn CamVid's 32 classes as 11.",
    )
    text("eval_split", "val", "Folder of held-out pictures.")
    text("crop_size", None, "Height,width for training; none: the pictures'.")
    flags.DEFINE_enum(
        "augment",
        "reference",
        ["none", "reference"],
        "none crops, reference varies scale, side and colours.",
    )
    # The seed's range; the paper picks one of five scales, 0.75 to 2.
    real("min_scale", 0.5, "Smallest scale of a picture.", 0.05, 8.0)
    real("max_scale", 2.0, "Largest scale of a picture.", 0.05, 8.0)
    flags.DEFINE_bool(
        "sync_batch_norm", True, "One batch norm over the batch of all ranks."
    )
    whole("log_every", 100, "Steps between log lines.", 1)
    whole("eval_every", 2000, "Steps between evaluations; 0: at the end.", 0)
    whole("save_every", 1000, "Steps between checkpoints.", 1)
    whole("keep_checkpoints", 2, "Newest checkpoints kept.", 1)
    whole("warmup_steps", 3, "Steps left out of images/s.", 0)
    whole("limit_train", 0, "Use only the first pictures; 0: all.", 0)
    whole("limit_eval", 0, "Evaluate only the first pictures; 0: all.", 0)
    for alias, name in (
        ("data_url", "data_path"),
        ("data_dir", "data_path"),
        ("logs_dir", "output_path"),
        ("checkpoint_path", "init_checkpoint"),
    ):
        flags.DEFINE_alias(alias, name)


def check_flags() -> None:
    """Refuses combinations that could only fail later."""
    if FLAGS.crop_size:
        dataset.parse_size(FLAGS.crop_size, "crop_size")
    if FLAGS.min_scale > FLAGS.max_scale:
        raise UserError(
            f"--min_scale={FLAGS.min_scale} is above "
            f"--max_scale={FLAGS.max_scale}; exchange them"
        )
    if FLAGS.weight_decay is None:
        FLAGS.weight_decay = FRONTENDS[FLAGS.frontend].weight_decay
    # The reference learns and counts Void like any class.
    if FLAGS.compat == "reference" and not FLAGS["ignore_classes"].present:
        FLAGS.ignore_classes = []


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
    FLAGS.num_classes = len(data_classes().names)
    seen = read_split("train")[: FLAGS.limit_train or None]
    batch = FLAGS.batch_size * runtime.size
    if batch > len(seen):
        raise UserError(
            f"--batch_size={FLAGS.batch_size} on {runtime.size} ranks takes "
            f"{batch} pictures a step, train has {len(seen)}: lower "
            "--batch_size"
        )
    if FLAGS.train_epochs is not None:
        # Rounded down once for all epochs, as in the seed.
        FLAGS.train_steps = int(FLAGS.train_epochs * len(seen) / batch)
    FLAGS.crop_size = FLAGS.crop_size or dataset.fitted_crop(seen)
    return seen


def data_classes() -> Classes:
    """The classes of the data set, as the flags want them."""
    return pictures.Reader(FLAGS.flag_values_dict()).classes


def read_split(split: str) -> list[pictures.Picture]:
    """The pictures of a split of the data set, checked and described."""
    reader = pictures.Reader(FLAGS.flag_values_dict())
    pairs = reader.read(split, FLAGS.check_data == "all")
    print(f"{split}: {pictures.describe(pairs, reader.classes)}")
    return pairs


def training_stream(
    runtime: npu_config.Runtime,
    seen: Sequence[pictures.Picture],
    first_step: int,
) -> tf.data.Dataset:
    """This rank's batches after `first_step` steps.

    They carry the weights of their pixels, since those of the classes are
    counted on the pictures.
    """
    values = FLAGS.flag_values_dict()
    table = pictures.class_weights(FLAGS.class_weights, seen, data_classes())
    return dataset.training_batches(
        seen,
        dataset.recipe_of(values),
        table,
        FLAGS.batch_size,
        FLAGS.seed,
        first_step * FLAGS.batch_size * runtime.size,
        runtime.rank,
        runtime.size,
    )


def evaluation_stream(
    runtime: npu_config.Runtime,
) -> Optional[tf.data.Dataset]:
    """This rank's share of the held-out pictures; None to evaluate none."""
    if "evaluate" not in FLAGS.exec_mode:
        return None
    held_out = read_split(FLAGS.eval_split)
    values = FLAGS.flag_values_dict()
    return evaluate.evaluation_stream(values, held_out, runtime)


def learning_rate_schedule() -> (
    tf.keras.optimizers.schedules.LearningRateSchedule
):
    """The learning rate over the steps; power 0 is a constant."""
    schedules = tf.keras.optimizers.schedules
    steps = max(FLAGS.train_steps, 1)
    if FLAGS.schedule == "cosine":
        rate = schedules.CosineDecay(FLAGS.learning_rate, steps)
    else:
        power = POLY_POWER if FLAGS.schedule == "poly" else 0.0
        # Keras stops at its end; the reference's first versions went on, to
        # the power of a negative number, which is NaN.
        rate = schedules.PolynomialDecay(
            FLAGS.learning_rate, steps, 0.0, power
        )
    return WarmUp(rate, FLAGS.lr_warmup_steps)


def create_network(
    runtime: npu_config.Runtime,
) -> tuple[tf.keras.Model, tf.keras.Model, tf.keras.optimizers.Optimizer]:
    """Network, its twin for training and optimiser, seeded by --seed."""
    synchronised = FLAGS.sync_batch_norm and runtime.size > 1
    random.seed(FLAGS.seed)  # Keras 3 draws its initial weights from here
    np.random.seed(FLAGS.seed)
    tf.random.set_seed(FLAGS.seed)  # Keras 2.6 from here
    network, trainer = create_model(
        FLAGS.num_classes,
        FLAGS.frontend,
        FLAGS.compat,
        runtime=runtime if synchronised else None,
    )
    # Before anything is written: a file that does not fit stops the run.
    if FLAGS.frontend_checkpoint:
        weights.load_frontend(
            trainer, FLAGS.frontend_checkpoint, FLAGS.frontend
        )
        print(f"ImageNet weights from {FLAGS.frontend_checkpoint}")
    # A checkpoint has the last word, since it holds what training made of it.
    if FLAGS.init_checkpoint:
        facts = (FLAGS.frontend, FLAGS.compat)
        left = weights.load(trainer, FLAGS.init_checkpoint, True, facts)
        print(
            f"weights from {FLAGS.init_checkpoint}; new: {weights.some(left)}"
        )
    optimizer = runtime.prepare_optimizer(
        FusedMomentum(learning_rate_schedule(), FLAGS.momentum),
        trainer.trainable_variables,
    )
    return network, trainer, optimizer


def make_train_step(
    runtime: npu_config.Runtime,
    trainer: tf.keras.Model,
    optimizer: tf.keras.optimizers.Optimizer,
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """One step of training as a graph: batch to loss terms.

    total_loss is the sum of all terms, L2 included, as in the reference's
    log.
    """
    variables = trainer.trainable_variables
    kernels = weights.decayed_kernels(trainer, FLAGS.frontend, FLAGS.compat)

    def train_step(batch):
        with tf.GradientTape() as tape:
            outputs = trainer(batch["image"], training=True)
            terms = losses.segmentation_losses(
                outputs,
                batch["label"],
                batch["weight"],
                FLAGS.ohem,
                runtime.all_reduce,
            )
            objective = terms["total_loss"]
            # With a rate of 0 the pass over all weights is saved too.
            if FLAGS.weight_decay:
                # Equal on all ranks, so their mean is the L2 of one.
                l2_loss = losses.weight_decay_loss(kernels)
                terms["l2_loss"] = FLAGS.weight_decay * l2_loss
                objective += terms["l2_loss"]
            terms["total_loss"] = objective
            objective = runtime.scale_loss(optimizer, objective)
        gradients = tape.gradient(objective, variables)
        runtime.apply_gradients(optimizer, gradients, variables)
        return terms

    # Not a decorator: an NPU replaces tf.function when it is opened.
    return tf.function(train_step, autograph=False)


def train(runtime: npu_config.Runtime, path: str) -> None:
    """Trains in run folder `path`."""
    print("data")
    seen = read_data(runtime, path)
    evaluation_data = evaluation_stream(runtime)
    classes = data_classes()

    print("model and optimiser")
    network, trainer, optimizer = create_network(runtime)
    print(f"{trainer.count_params()} parameters")

    print("run folder and restore")
    if runtime.rank == 0:
        run_folder.open_run(path, MODEL, SHAPE_FLAGS, FLAGS.overwrite)
        classes.save(os.path.join(path, FILE))
    checkpoints = run_folder.Checkpoints(
        path, FLAGS.keep_checkpoints, trainer, optimizer
    )
    if runtime.rank == 0:
        checkpoints.restore()
    # Rank 0 alone has read files; the others take all its state.
    runtime.broadcast(checkpoints.variables())
    first = int(checkpoints.step)

    print(f"training, steps {first + 1} to {FLAGS.train_steps}")
    recorder = Recorder(
        runtime,
        path,
        (network, trainer),
        classes,
        checkpoints,
        learning_rate_schedule(),
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
    recorder.finish(MODEL)


def use_run(runtime: npu_config.Runtime, path: str) -> None:
    """What exec_mode asks for beyond training, from the run's best weights."""
    if FLAGS.exec_mode == "evaluate":
        values, network = evaluate.restore(path)
        names = ("data_path", "eval_split")
        # What the command line says; all else is as the run was trained.
        given = {n: FLAGS[n].value for n in names if FLAGS[n].present}
        given["limit_eval"] = FLAGS.limit_eval
        values.update(given)
        table, rows = evaluate.evaluate_run(values, network, runtime)
        if runtime.rank == 0:
            evaluate.save_results(path, table, rows, values)
    if "predict" in FLAGS.exec_mode and runtime.rank == 0:
        values = run_folder.read_flags(path)
        folder = os.path.join(values["data_path"], values["eval_split"])
        predict.predict_run(
            path,
            predict.find_inputs(folder),
            os.path.join(path, "predictions"),
        )


def main() -> None:
    """Device, then the run."""
    runtime = npu_config.setup()
    print(
        f"{MODEL} {VERSION}, TensorFlow {tf.__version__}, {runtime.describe()}"
    )
    print(run_folder.all_flags())
    check_flags()
    path = os.path.abspath(FLAGS.output_path)
    if "train" in FLAGS.exec_mode:
        train(runtime, path)
    use_run(runtime, path)


if __name__ == "__main__":
    define_flags()
    launch(main)
