"""Trains DeepLabv3plus and evaluates it; the same command resumes a run.

python DeepLabv3plus/train.py --data_path=DIR --output_path=RUN
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
from DeepLabv3plus import (
    dataset,
    evaluate,
    layouts,
    losses,
    options,
    pictures,
    predict,
    run_folder,
    sample_data,
    weights,
)
from DeepLabv3plus.launch import Stopped, launch, stop_softly
from DeepLabv3plus.layers import BatchNorm
from DeepLabv3plus.model import create_model, features_size, shape_of
from DeepLabv3plus.optimizer import FusedMomentum
from DeepLabv3plus.recorder import Recorder
from DeepLabv3plus.schedule import Schedule

FLAGS = flags.FLAGS
MODEL = "DeepLabv3plus"
VERSION = "1.0.0"
# Flags that fix the network and the data it sees within one run.
SHAPE_FLAGS = (
    "model_variant",
    "num_classes",
    "output_stride",
    "atrous_rates",
    "decoder_output_stride",
    "depth_multiplier",
    "aspp_convs_filters",
    "decoder_filters",
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
    flags.DEFINE_enum(
        "check_data", "sample", ["sample", "all"], "Files to check in full."
    )
    text("output_path", "results", "The run folder.")
    flags.DEFINE_bool("overwrite", False, "Start anew in output_path.")
    text("init_checkpoint", None, "npz, TF1 prefix or run to start from.")
    whole("train_steps", 300000, "Steps in all, resumed ones included.", 0)
    whole("batch_size", 7, "Pictures per rank and step.", 1)
    real("learning_rate", 1e-4, "Of momentum SGD, at its start.", 0.0)
    flags.DEFINE_enum(
        "schedule", "poly", ["poly", "step"], "Of the rate; poly falls to 0."
    )
    whole("slow_start_step", 0, "Steps of a slow start.", 0)
    real("slow_start_learning_rate", 1e-4, "Rate in the slow start.", 0.0)
    real("weight_decay", 4e-5, "L2 on kernels but depthwise ones.", 0.0)
    whole("seed", 0, "Of weights, order, augmentation.", 0)
    # Class ids are bytes, and one value stays free to be ignored.
    whole("num_classes", None, "Classes of the labels.", 2, 255)
    whole("ignore_label", 255, "Label value that does not count.")
    text("train_split", "train", "Or trainaug; trainval has val in it.")
    text("eval_split", "val", "Split to evaluate.")
    text("label_folder", None, "Of VOC; none: SegmentationClass(Raw).")
    text("train_crop_size", "513,513", "Height,width that is trained on.")
    text("eval_crop_size", None, "In evaluation; none: as trained.")
    flags.DEFINE_bool("initialize_last_layer", True, "From the checkpoint.")
    flags.DEFINE_bool("fine_tune_batch_norm", False, "Or leave it frozen.")
    real("batch_norm_decay", 0.9997, "Of its statistics, per step.", 0.0, 1.0)
    flags.DEFINE_enum(
        "augment",
        "reference",
        ["none", "reference"],
        "none crops, reference scales and mirrors too.",
    )
    whole("log_every", 100, "Steps between log lines.", 1)
    whole("eval_every", 2000, "Steps between evaluations; 0: at the end.", 0)
    whole("save_every", 1000, "Steps between checkpoints.", 1)
    whole("keep_checkpoints", 2, "Newest checkpoints kept.", 1)
    whole("warmup_steps", 3, "Steps left out of images/s.", 0)
    whole("limit_train", 0, "Use only the first pictures; 0: all.", 0)
    whole("limit_eval", 0, "Evaluate only the first pictures; 0: all.", 0)
    options.define_flags()
    for name in options.USUAL:
        flags.declare_key_flag(name)
    for alias, name in (
        ("dataset_dir", "data_path"),
        ("train_logdir", "output_path"),
        ("tf_initial_checkpoint", "init_checkpoint"),
        ("training_number_of_steps", "train_steps"),
        ("train_batch_size", "batch_size"),
        ("base_learning_rate", "learning_rate"),
        ("learning_policy", "schedule"),
        ("log_steps", "log_every"),
    ):
        flags.DEFINE_alias(alias, name)


def check_flags() -> None:
    """Refuses combinations that could only fail later."""
    for name in ("train_crop_size", "eval_crop_size"):
        if FLAGS[name].value:
            dataset.parse_size(FLAGS[name].value, name)
    options.check_flags()
    if FLAGS.train_split == "trainval" and FLAGS.eval_split == "val":
        print("trainval contains val: figures on val will flatter the run")


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
    if FLAGS.num_classes is None:
        FLAGS.num_classes = len(pictures.read_class_names(FLAGS.data_path))
    options.check_label_weights(FLAGS.num_classes)
    seen = read_split(FLAGS.train_split)[: FLAGS.limit_train or None]
    batch = FLAGS.batch_size * runtime.size
    if batch > len(seen):
        raise UserError(
            f"--batch_size={FLAGS.batch_size} on {runtime.size} ranks takes "
            f"{batch} pictures a step, {FLAGS.train_split} has {len(seen)}: "
            "lower --batch_size"
        )
    return seen


def read_split(split: str) -> list[pictures.Picture]:
    """The pictures of a split of the data set, checked and described."""
    values = FLAGS.flag_values_dict()
    pairs = evaluate.read_split(values, split, FLAGS.check_data == "all")
    names = evaluate.class_names(values)
    print(f"{split}: {pictures.describe(pairs, FLAGS.ignore_label, names)}")
    return pairs


def training_stream(
    runtime: npu_config.Runtime,
    seen: Sequence[pictures.Picture],
    first_step: int,
) -> tf.data.Dataset:
    """This rank's batches after `first_step` steps."""
    values = FLAGS.flag_values_dict()
    recipe, shape = dataset.recipe_of(values), shape_of(values)
    return dataset.training_batches(
        seen,
        recipe,
        features_size(recipe.height, recipe.width, shape),
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
    held_out = read_split(FLAGS.eval_split)[: FLAGS.limit_eval or None]
    return dataset.evaluation_batches(
        held_out, FLAGS.ignore_label, runtime.rank, runtime.size
    )


def learning_rate_schedule() -> Schedule:
    """The learning rate over the steps."""
    return Schedule(
        FLAGS.schedule,
        FLAGS.learning_rate,
        FLAGS.train_steps,
        FLAGS.learning_power,
        FLAGS.slow_start_step,
        FLAGS.slow_start_learning_rate,
    )


def create_network(
    runtime: npu_config.Runtime,
) -> tuple[tf.keras.Model, tf.keras.Model, tf.keras.optimizers.Optimizer]:
    """Network, its twin for training and optimiser, seeded by --seed."""
    random.seed(FLAGS.seed)  # Keras 3 draws its initial weights from here
    np.random.seed(FLAGS.seed)
    tf.random.set_seed(FLAGS.seed)  # Keras 2.6 from here
    synchronised = FLAGS.sync_batch_norm and runtime.size > 1
    norm = BatchNorm(
        FLAGS.fine_tune_batch_norm,
        FLAGS.batch_norm_decay,
        runtime if synchronised else None,
    )
    shape = shape_of(FLAGS.flag_values_dict())
    network, trainer = create_model(shape, norm, FLAGS.dropout)
    # Before anything is written: a file that does not fit stops the run.
    if FLAGS.init_checkpoint:
        new_layers = ()
        if not FLAGS.initialize_last_layer:
            new_layers = weights.last_layers(
                FLAGS.last_layers_contain_logits_only
            )
        left, extra = weights.load(network, FLAGS.init_checkpoint, new_layers)
        print(
            f"weights from {FLAGS.init_checkpoint}; new: {weights.some(left)}"
            f"; passed over: {weights.some(extra)}"
        )
    optimizer = runtime.prepare_optimizer(
        FusedMomentum(learning_rate_schedule(), momentum=FLAGS.momentum),
        trainer.trainable_variables,
    )
    return network, trainer, optimizer


def make_loss(
    runtime: npu_config.Runtime,
    trainer: tf.keras.Model,
    optimizer: tf.keras.optimizers.Optimizer,
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """A function of a batch to loss terms.

    As in the reference's log, total_loss includes the weight decay.
    """
    named = weights.named_variables(trainer)
    kernels = [named[name] for name in weights.decayed(named)]
    class_weights = options.numbers(FLAGS.label_weights, "label_weights")
    mining = losses.Mining(
        FLAGS.top_k_percent_pixels, FLAGS.hard_example_mining_step
    )

    def loss(batch):
        share = None
        if mining.share < 1.0:
            share = mining.share_at(optimizer.iterations)
        inputs = [batch["image"], batch["dropout_mask"]]
        sized = losses.match_sizes(
            trainer(inputs, training=True),
            batch["label"],
            batch["valid"],
            FLAGS.upsample_logits,
        )
        entropy = losses.segmentation_loss(
            *sized, class_weights, share, runtime.all_reduce
        )
        total = entropy
        # With a rate of 0 the pass over all weights is saved too.
        if FLAGS.weight_decay:
            norm = losses.weight_decay_loss(kernels)
            total += FLAGS.weight_decay * norm
        return {"total_loss": total, "cross_entropy": entropy}

    return loss


def make_train_step(
    runtime: npu_config.Runtime,
    trainer: tf.keras.Model,
    optimizer: tf.keras.optimizers.Optimizer,
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """One step of training as a graph: batch to loss terms."""
    loss = make_loss(runtime, trainer, optimizer)
    named = weights.trainable_variables(trainer)
    variables = list(named.values())
    multipliers = weights.gradient_multipliers(
        named,
        FLAGS.last_layer_gradient_multiplier,
        weights.last_layers(FLAGS.last_layers_contain_logits_only),
    )

    def train_step(batch):
        with tf.GradientTape() as tape:
            terms = loss(batch)
            objective = runtime.scale_loss(optimizer, terms["total_loss"])
        gradients = [
            gradient if multiplier == 1.0 else multiplier * gradient
            for gradient, multiplier in zip(
                tape.gradient(objective, variables), multipliers
            )
        ]
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
    values = FLAGS.flag_values_dict()
    size = dataset.parse_size(FLAGS.train_crop_size, "train_crop_size")
    for warning in options.warnings(
        values, FLAGS.batch_size * runtime.size, size, shape_of(values)
    ):
        print(warning)
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
        names = evaluate.CHANGEABLE
        # What the command line says; all else is as the run was trained.
        given = {n: FLAGS[n].value for n in names if FLAGS[n].present}
        given["limit_eval"] = FLAGS.limit_eval
        values.update(given)
        table, rows = evaluate.evaluate_run(values, network, runtime)
        if runtime.rank == 0:
            evaluate.save_results(path, table, rows, values)
    if "predict" in FLAGS.exec_mode and runtime.rank == 0:
        values = run_folder.read_flags(path)
        sources = layouts.find_sources(
            values["data_path"], values["eval_split"], values["label_folder"]
        )
        predict.predict_run(
            path,
            [source.name for source in sources if not source.content],
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
