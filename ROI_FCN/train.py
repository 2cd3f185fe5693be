"""Trains ROI_FCN and evaluates it; the same command resumes a stopped run.

python ROI_FCN/train.py --data_path=DIR --output_path=RUN
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
from ROI_FCN import (
    dataset,
    evaluate,
    losses,
    pictures,
    predict,
    run_folder,
    sample_data,
    weights,
)
from ROI_FCN.launch import Stopped, launch, stop_softly
from ROI_FCN.model import create_model, deepest_size
from ROI_FCN.optimizer import FusedAdam
from ROI_FCN.recorder import Recorder

FLAGS = flags.FLAGS
MODEL = "ROI_FCN"
VERSION = "1.0.0"
# Flags that fix the network and the data it sees within one run.
# The seed too: a resumed stream would go on in another order.
SHAPE_FLAGS = (
    "labels",
    "num_classes",
    "base_filters",
    "fc_channels",
    "no_roi",
    "seed",
)
INPUTS = ["image", "roi"]  # of the network, by their names in a batch
VGG16_NAME = "vgg16.npy"  # where the seed looks for it: beside the data


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
    flags.DEFINE_bool("overwrite", False, "Start anew in output_path.")
    text("init_checkpoint", None, "npz, TF1 prefix or run to start from.")
    text("vgg16", "auto", "ImageNet weights: npy, h5 or none; see README.")
    flags.DEFINE_bool("vgg16_fc", False, "Take conv6 and conv7 from it too.")
    # The port's steps and rate, and its README's batch; its code has 2.
    whole("train_steps", 100000, "Steps in all, resumed ones included.", 0)
    whole("batch_size", 4, "Pictures per rank and step.", 1)
    real("learning_rate", 1e-5, "Of Adam.", 0.0)
    flags.DEFINE_enum(
        "schedule", "constant", ["constant", "cosine"], "Of the rate."
    )
    real("weight_decay", 5e-4, "L2 on VGG16's kernels; 0: TF1 code.", 0.0)
    real("dropout", 0.5, "Share of conv6 and conv7 dropped.", 0.0, 0.99)
    whole("seed", 0, "Of weights, order, augmentation.", 0)
    flags.DEFINE_enum(
        "labels", "liquid_solid", list(pictures.LABEL_SETS), "Which to learn."
    )
    # Class ids are bytes, and one value stays free to be ignored.
    whole("num_classes", None, "Classes of the labels.", 2, 255)
    # No byte is -1: by default every pixel counts.
    whole("ignore_label", -1, "Label value that does not count.")
    flags.DEFINE_bool("no_roi", False, "The whole picture is the region.")
    text("train_images", "Train_Images", "Folder of training pictures.")
    text("test_images", "Test_Images_All", "Folder of held-out pictures.")
    # To this the port squeezes all pictures, and its om file takes it.
    text("canvas", "480,854", "Height,width that training pictures get.")
    text("eval_size", None, "Evaluate at height,width; none: own sizes.")
    whole("base_filters", 64, "Filters of the first convolution.", 1)
    whole("fc_channels", 4096, "Channels of conv6 and conv7.", 1)
    flags.DEFINE_enum(
        "valve_init",
        "reference",
        ["reference", "identity"],
        "Gates start at the reference's 0.01, or at 1.",
    )
    flags.DEFINE_enum(
        "augment",
        "paper",
        ["none", "port", "paper"],
        "none places, port resizes, paper varies.",
    )
    real("min_scale", 0.3, "Smallest scale of paper's pictures.", 0.05, 1.0)
    # The reference has code for these three, and 0 as their probability.
    real("crop", 0.0, "Probability of a crop in paper.", 0.0, 1.0)
    real("colour", 0.0, "Probability of a tint in paper.", 0.0, 1.0)
    real("noise", 0.0, "Probability of noise in paper.", 0.0, 1.0)
    # Logs, validations and checkpoints come as often as the port's.
    whole("log_every", 100, "Steps between log lines.", 1)
    whole("eval_every", 2000, "Steps between evaluations; 0: at the end.", 0)
    whole("save_every", 1000, "Steps between checkpoints.", 1)
    # Two of 1.6 GB, as the newest may be damaged; the reference keeps five.
    whole("keep_checkpoints", 2, "Newest checkpoints kept.", 1)
    whole("warmup_steps", 3, "Steps left out of images/s.", 0)
    whole("limit_train", 0, "Use only the first pictures; 0: all.", 0)
    whole("limit_eval", 0, "Evaluate only the first pictures; 0: all.", 0)
    for alias, name in (
        ("data_url", "data_path"),
        ("data_dir", "data_path"),
        ("logs_dir", "output_path"),
        ("MAX_ITERATION", "train_steps"),
    ):
        flags.DEFINE_alias(alias, name)
    flags.DEFINE_enum(
        "UseValidationSet",
        "True",
        ["True", "False"],
        "False is the seed's way to write --eval_every=0.",
    )


def check_flags() -> None:
    """Refuses combinations that could only fail later."""
    dataset.parse_size(FLAGS.canvas, "canvas")
    if FLAGS.eval_size:
        dataset.parse_size(FLAGS.eval_size, "eval_size")
    # The seed takes a text here, so that its "False" means true.
    if FLAGS.UseValidationSet == "False":
        FLAGS.eval_every = 0


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
    # Known from the label set, unless somebody has classes of their own.
    if FLAGS.num_classes is None:
        names = pictures.LABEL_SETS[FLAGS.labels].class_names
        FLAGS.num_classes = len(names)
    seen = read_folder(FLAGS.train_images)[: FLAGS.limit_train or None]
    batch = FLAGS.batch_size * runtime.size
    if batch > len(seen):
        raise UserError(
            f"--batch_size={FLAGS.batch_size} on {runtime.size} ranks takes "
            f"{batch} pictures a step, {FLAGS.train_images} has {len(seen)}: "
            "lower --batch_size"
        )
    return seen


def read_folder(folder: str) -> list[pictures.Picture]:
    """The pictures of a folder of the data set, checked and described."""
    values = FLAGS.flag_values_dict()
    pairs = pictures.Reader.of(values).read(folder, FLAGS.check_data == "all")
    names = pictures.class_names(FLAGS.labels, FLAGS.num_classes)
    print(f"{folder}: {pictures.describe(pairs, FLAGS.ignore_label, names)}")
    return pairs


def training_stream(
    runtime: npu_config.Runtime,
    seen: Sequence[pictures.Picture],
    first_step: int,
) -> tf.data.Dataset:
    """This rank's batches after `first_step` steps."""
    recipe = dataset.recipe_of(FLAGS.flag_values_dict())
    deepest = deepest_size(recipe.height, recipe.width)
    return dataset.training_batches(
        seen,
        recipe,
        (2, *deepest, FLAGS.fc_channels),
        FLAGS.dropout,
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
    held_out = read_folder(FLAGS.test_images)
    values = FLAGS.flag_values_dict()
    return evaluate.evaluation_stream(values, held_out, runtime)


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
        FLAGS.base_filters,
        FLAGS.fc_channels,
        FLAGS.valve_init,
        FLAGS.dropout,
        for_cpu=runtime.device == "cpu",
    )
    # Before anything is written: a file that does not fit stops the run.
    vgg16 = find_vgg16()
    # A checkpoint has the last word, since it holds what training made of it.
    if vgg16:
        weights.load_vgg16(network, vgg16, FLAGS.vgg16_fc)
        print(f"ImageNet weights from {vgg16}")
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


def find_vgg16() -> Optional[str]:
    """The file of ImageNet weights that --vgg16 means, if any."""
    beside_data = os.path.join(FLAGS.data_path, VGG16_NAME)
    if FLAGS.vgg16 == "auto":
        return beside_data if os.path.isfile(beside_data) else None
    return None if FLAGS.vgg16 == "none" else FLAGS.vgg16


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
    kernels = weights.vgg_kernels(trainer)

    def train_step(batch):
        with tf.GradientTape() as tape:
            inputs = [batch[name] for name in (*INPUTS, "dropout_mask")]
            logits = trainer(inputs, training=True)
            terms = losses.segmentation_losses(
                logits, batch["label"], batch["valid"]
            )
            objective = terms["total_loss"]
            # With a rate of 0 the pass over all weights is saved too.
            if FLAGS.weight_decay:
                terms["l2_loss"] = losses.weight_decay_loss(kernels)
                objective += FLAGS.weight_decay * terms["l2_loss"]
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
        names = ("data_path", "test_images", "eval_size")
        # What the command line says; all else is as the run was trained.
        given = {n: FLAGS[n].value for n in names if FLAGS[n].present}
        given["limit_eval"] = FLAGS.limit_eval
        values.update(given)
        table, rows = evaluate.evaluate_run(values, network, runtime)
        if runtime.rank == 0:
            evaluate.save_results(path, table, rows, values)
    if "predict" in FLAGS.exec_mode and runtime.rank == 0:
        values = run_folder.read_flags(path)
        folder = os.path.join(values["data_path"], values["test_images"])
        regions = os.path.join(values["data_path"], pictures.ROI_FOLDER)
        predict.predict_run(
            path,
            predict.find_inputs(folder),
            os.path.join(path, "predictions"),
            None if values["no_roi"] else regions,
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
