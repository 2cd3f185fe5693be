"""Evaluates a run of BlitzNet: a table, metrics.json and a contact sheet.

python BlitzNet/evaluate.py --run=RUN [--data_path=DIR] [--benchmark]
Detection and segmentation in one pass over every picture, at its own size.
"""

import functools
import os
import sys
import time
from collections.abc import Sequence
from typing import Callable

import numpy as np
import tensorflow as tf
from absl import flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BlitzNet import (
    anchors,
    dataset,
    detection,
    metrics,
    pictures,
    progress,
    run_folder,
    visuals,
    voc,
    weights,
)
from BlitzNet.augment import UNLABELLED
from BlitzNet.launch import launch
from BlitzNet.layers import resize
from BlitzNet.model import Architecture, create_model
from common import npu_config

FLAGS = flags.FLAGS
SHEET_ROWS = 6  # pictures on a contact sheet
# The reference's numbers, of its demo and of its benchmark.
SHOWN_SCORE = 0.5  # of the boxes that are drawn
TIMED, WARMUP = 200, 11  # pictures of a benchmark, and those left out


def define_flags() -> None:
    """Defines the flags of evaluation."""
    npu_config.define_flags()
    flags.declare_key_flag("device")
    flags.declare_key_flag("precision_mode")
    text = flags.DEFINE_string
    text("run", None, "Run folder: --output_path of train.py.")
    text("data_path", None, "Data set; none: the run's own.")
    text("output_path", None, "For the results; none: the run.")
    text("dataset", None, "Data set's name; none: the run's own.")
    text("test_split", None, "List of own data; none: the run's own.")
    flags.DEFINE_integer("limit_eval", 0, "Only the first pictures; 0: all.")
    flags.DEFINE_bool(
        "benchmark", False, "Time a picture from network to boxes and mask."
    )
    detection.define_flags()
    for alias, name in (("data_dir", "data_path"), ("obs_dir", "data_path")):
        flags.DEFINE_alias(alias, name)
    flags.mark_flag_as_required("run")


def metric_of(values: dict[str, object]) -> str:
    """The figure by which a run with these flags is judged."""
    # For VOC 2007 too, of which papers quote map_11_point.
    return "map_area" if values["detect"] else "mean_iou"


class Judge:
    """A network with what turns its outputs into detections and masks."""

    def __init__(
        self,
        network: tf.keras.Model,
        architecture: Architecture,
        limits: detection.Limits,
    ) -> None:
        self.network, self.limits = network, limits
        self.classes = architecture.num_classes
        self.prior_boxes = anchors.priors(architecture)
        side = architecture.image_size
        image = tf.TensorSpec([1, side, side, 3], tf.float32)
        mask = tf.TensorSpec([1, None, None], tf.int32)
        # Not decorators: an NPU replaces tf.function when it is opened.
        graph = functools.partial(tf.function, autograph=False)
        size = tf.TensorSpec([2], tf.int32)
        self.step = graph(self._step, [{"image": image, "mask": mask}])
        self.infer = graph(self._infer, [image, size])
        self.timed = graph(self._timed, [image])
        self.forward = graph(self._forward, [image])

    def find(self, outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Boxes, scores and classes in the outputs for one picture."""
        if "confidence" not in outputs:
            return {}
        found = detection.detect(
            outputs["confidence"][0],
            outputs["location"][0],
            tf.constant(self.prior_boxes),
            self.limits,
        )
        return found._asdict()

    def _infer(
        self, image: tf.Tensor, size: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Also `predicted`, class ids [*size] uint8 of the mask."""
        return self.finish(self.network(image, training=False), size)

    def finish(
        self, outputs: dict[str, tf.Tensor], size: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """What _infer gives, from the network's outputs."""
        results = self.find(outputs)
        if "segmentation" in outputs:
            results["predicted"] = segment(outputs["segmentation"], size)
        return results

    def _step(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The results for a picture, compared with its mask."""
        outputs = self.network(batch["image"], training=False)
        return self.compare(outputs, batch["mask"][0])

    def compare(
        self, outputs: dict[str, tf.Tensor], mask: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """What `finish` gives, and `confusion`; see metrics."""
        results = self.finish(outputs, tf.shape(mask))
        if "predicted" in results:
            results["confusion"] = metrics.confusion(
                tf.cast(results["predicted"], tf.int32), mask, self.classes
            )
        return results

    def _timed(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """What the paper's speed is about: no resizing of masks."""
        outputs = self.network(image, training=False)
        results = self.find(outputs)
        if "segmentation" in outputs:
            results["predicted"] = tf.argmax(outputs["segmentation"], -1)
        return results

    def _forward(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """The network alone."""
        return self.network(image, training=False)


def segment(logits: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Class ids [*size] uint8 from logits [1, h, h, C]."""
    # Logits, not classes: between two classes there need be no third.
    resized = resize(logits, size, "bilinear")[0]
    return tf.cast(tf.argmax(resized, -1), tf.uint8)


class Tally:
    """What an evaluation has seen so far."""

    def __init__(
        self, pairs: Sequence[pictures.Picture], classes: int
    ) -> None:
        self.pairs = pairs
        self.confusion = np.zeros([classes, classes])
        self.objects = np.zeros([classes])
        for pair in pairs:
            # VOC's rule: a difficult object that is missed costs nothing.
            counted = pair.objects.labels[~pair.objects.difficult]
            self.objects += np.bincount(counted, minlength=classes)
        self.found: dict[int, np.ndarray] = {}

    def add(
        self, index: int, results: dict[str, np.ndarray], overlap: float
    ) -> None:
        """Takes the results for a picture; see Judge."""
        if "confusion" in results:
            self.confusion += results["confusion"]
        if "boxes" in results:
            matched = metrics.match(
                results["boxes"],
                results["classes"],
                self.pairs[index].objects,
                overlap,
            )
            columns = (results["scores"], results["classes"])
            self.found[index] = np.concatenate(
                [np.stack(columns, 1), matched], 1
            ).astype(np.float32)

    def figures(
        self, values: dict[str, object], runtime: npu_config.Runtime
    ) -> dict[str, object]:
        """The table of all ranks' pictures together, the same on each."""
        table = {}
        if values["detect"]:
            # A place for each picture of all ranks: sums bring them together.
            # With fewer pictures than ranks some have none, but all must take
            # part in the sum or the others would wait for them for ever.
            kept = values["top_k_post_nms"]
            # These are 50 MB for VOC 2007's test set.
            every = np.zeros(
                (len(self.pairs), kept, 3 + len(metrics.COCO_OVERLAPS)),
                np.float32,
            )
            for index, found in self.found.items():
                every[index, : len(found)] = found
            every = _sum_over_ranks(every, runtime)
            every = every[every[..., 1] > 0]
            table.update(
                metrics.detection_figures(
                    every[:, 0], every[:, 1], every[:, 2:], self.objects
                )
            )
        if values["segment"]:
            whole = _sum_over_ranks(self.confusion, runtime)
            table.update(metrics.segmentation_figures(whole))
        return table


def _sum_over_ranks(
    array: np.ndarray, runtime: npu_config.Runtime
) -> np.ndarray:
    """The sum of an array over all ranks."""
    # HCCL takes no float64; seven digits of a count are enough.
    (mean,) = runtime.all_reduce([tf.constant(array, tf.float32)])
    return mean.numpy() * runtime.size


def evaluate(
    judge: Judge,
    values: dict[str, object],
    pairs: Sequence[pictures.Picture],
    runtime: npu_config.Runtime,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Runs the network over all pictures, each on one of the ranks.

    Args:
      judge: of the network.
      values: flags of the run.
      pairs: the pictures.
      runtime: brings the ranks' shares together.

    Returns:
      The table of figures, and rows for a contact sheet of this rank's
      pictures.
    """
    tally, rows = Tally(pairs, judge.classes), []
    batches = dataset.evaluation_batches(
        pairs, values["image_size"], runtime.rank, runtime.size
    )
    chosen = evenly(len(batches))
    watched = progress.watched(
        batches, len(batches), "evaluating picture", runtime.rank
    )
    for number, batch in enumerate(watched):
        index = int(batch.pop("index")[0])
        results = {
            name: value.numpy() for name, value in judge.step(batch).items()
        }
        tally.add(index, results, values["voc_iou_thresh"])
        if number in chosen:
            rows.append(_sheet_row(batch, results, pairs[index], values))
    return tally.figures(values, runtime), rows


def evenly(count: int) -> set[int]:
    """Which of `count` pictures are shown: neighbours are too much alike."""
    return set(np.linspace(0, count - 1, SHEET_ROWS).astype(int).tolist())


def _sheet_row(
    batch: dict[str, tf.Tensor],
    results: dict[str, np.ndarray],
    pair: pictures.Picture,
    values: dict[str, object],
) -> list[np.ndarray]:
    """The tiles of a batch's picture; see save_sheet."""
    names = ["background", *values["classes"]]
    mask = batch["mask"][0].numpy()
    # For the eye alone; the legacy resize is for what the network sees.
    image = tf.image.resize(batch["image"][0], mask.shape).numpy() * 255.0
    colours = visuals.palette(UNLABELLED + 1)
    predicted = results.get("predicted", np.zeros_like(mask))
    blended = visuals.overlay(image, predicted, len(names))
    left, top, width, height = pair.objects.boxes.T
    truth = np.stack([top, left, top + height, left + width], 1)
    shown = results.get("scores", np.zeros(0)) >= SHOWN_SCORE
    if shown.any():
        blended = visuals.draw_boxes(
            blended,
            results["boxes"][shown],
            results["classes"][shown],
            names,
            results["scores"][shown],
        )
    return [
        visuals.draw_boxes(
            image.astype(np.uint8), truth, pair.objects.labels, names
        ),
        colours[mask],
        blended,
        colours[predicted],
        visuals.difference(predicted, mask),
    ]


def save_sheet(path: str, rows: list[list[np.ndarray]]) -> None:
    """Writes rows of `evaluate` as a contact sheet."""
    titles = ("truth", "label", "result", "prediction", "difference")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    visuals.contact_sheet(rows, titles).save(path)


def save_results(
    output: str,
    table: dict[str, object],
    rows: list[list[np.ndarray]],
    values: dict[str, object],
) -> None:
    """Prints the table; writes metrics.json and images/evaluation.png."""
    names = ["background", *values["classes"]]
    print(metrics.format_table(table, names))
    sheet = os.path.join(output, "images", "evaluation.png")
    save_sheet(sheet, rows)
    path = os.path.join(output, "metrics.json")
    run_folder.write_json(path, {**table, "class_names": names})
    print(f"wrote metrics.json and {sheet}")


def restore(run: str) -> tuple[dict[str, object], tf.keras.Model]:
    """The flags and the network of a run, best weights."""
    values = run_folder.read_flags(run)
    network = create_model(Architecture.of(values))
    weights.load(network, run)
    return values, network


def read_pictures(values: dict[str, object]) -> list[pictures.Picture]:
    """The pictures that a run's flags name for evaluation."""
    reader = voc.Reader.of(values)
    _, held_out = voc.parts_of(values)
    return reader.read(held_out)[: values["limit_eval"] or None]


def evaluate_run(
    values: dict[str, object],
    network: tf.keras.Model,
    runtime: npu_config.Runtime,
) -> tuple[dict[str, object], list[list[np.ndarray]]]:
    """Evaluates a network on what a run's flags name; see `evaluate`."""
    judge = make_judge(values, network)
    return evaluate(judge, values, read_pictures(values), runtime)


def make_judge(values: dict[str, object], network: tf.keras.Model) -> Judge:
    """The judge of a network with a run's flags."""
    limits = detection.Limits.of(values)
    return Judge(network, Architecture.of(values), limits)


def benchmark(values: dict[str, object], judge: Judge) -> None:
    """Prints the time from a picture of the network's size to results."""
    pairs = read_pictures(values)
    # Few pictures are shown again.
    data = dataset.evaluation_batches(pairs, values["image_size"]).repeat()
    seconds = []
    for batch in data.take(TIMED):
        # In turn, so that both see the same load of the machine.
        seconds.append(
            [
                time_of(graph, batch["image"])
                for graph in (judge.timed, judge.forward)
            ]
        )
    whole, forward = 1000.0 * np.transpose(seconds[WARMUP:])
    print(
        f"Mean={whole.mean():.2f}ms; Std={whole.std():.2f}ms; "
        f"FPS={1000.0 / whole.mean():.2f}"
    )
    alone, rest = np.median(forward), np.median(whole - forward)
    print(
        f"network {alone:.2f} ms, decoding and suppression {rest:.2f} ms, "
        f"{rest / alone:.1%} of it (medians)"
    )


def time_of(
    graph: Callable[[tf.Tensor], dict[str, tf.Tensor]], image: tf.Tensor
) -> float:
    """Seconds until all that a graph makes of a picture is there."""
    start = time.perf_counter()
    for value in graph(image).values():
        # Waits for the device, which so far has only been told to start.
        value.numpy()
    return time.perf_counter() - start


def main() -> None:
    """Evaluates one run."""
    runtime = npu_config.setup()
    print(runtime.describe())
    values, network = restore(FLAGS.run)
    # Even where it is not given: a limit that kept training short should not
    # pass for the figure of the whole split.
    values["limit_eval"] = FLAGS.limit_eval
    values.update(detection.given_flags())
    for name in ("data_path", "dataset", "test_split"):
        values[name] = FLAGS[name].value or values[name]
    if FLAGS.benchmark:
        benchmark(values, make_judge(values, network))
        return
    table, rows = evaluate_run(values, network, runtime)
    if runtime.rank == 0:
        save_results(FLAGS.output_path or FLAGS.run, table, rows, values)


if __name__ == "__main__":
    define_flags()
    launch(main)
