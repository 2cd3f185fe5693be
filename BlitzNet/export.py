"""Exports a run of BlitzNet and proves each export against the live network.

python BlitzNet/export.py --run=RUN --output=DIR [--formats=savedmodel,pb,…]
savedmodel, a frozen pb (for Ascend's atc), tflite, onnx (needs tf2onnx and
onnxruntime) and tf1, a TF1 checkpoint, give the heads' outputs; nms is a
SavedModel, TFLite and ONNX that give boxes, scores, classes and mask.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Callable, Optional

import numpy as np
import tensorflow as tf
from absl import flags

# No public name freezes a function; this one does from TF 2.6 to 2.21.
from tensorflow.python.framework.convert_to_constants import (
    convert_variables_to_constants_v2,
)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from BlitzNet import anchors, detection, run_folder, weights
from BlitzNet.launch import launch
from BlitzNet.model import Architecture, create_model
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS
# The seed's node names: confidence, location, and the segmentation's last
# convolution, whose number follows from the architecture.
IMAGE, CONFIDENCE, LOCATION = "input", "concat_1", "concat_2"
# Ours: runtimes sum in other orders; a wrong export is far off.
TOLERANCE = 1e-5  # largest difference, as a share of the largest output
ONNX_PACKAGES = ("tf2onnx", "onnxruntime")
Outputs = dict[str, np.ndarray]


def define_flags() -> None:
    """Defines the flags of the export."""
    npu_config.define_flags()
    # An export serves other devices; it should not carry this one's bfloat16.
    FLAGS.set_default("precision_mode", "force_fp32")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("output", None, "Folder for the exports.")
    flags.DEFINE_list("formats", FORMATS, "Which to write.")
    flags.DEFINE_integer(
        "batch_size", 1, "Fixed batch of pb, tflite, onnx.", 1
    )
    flags.mark_flags_as_required(["run", "output"])


class Graph:
    """A function of pictures, frozen, with what it answers to a picture."""

    def __init__(
        self,
        function: Callable[[tf.Tensor], dict[str, tf.Tensor]],
        network: tf.keras.Model,
        shape: tuple,
        any_batch: bool,
    ) -> None:
        self.network, self.shape = network, shape
        # Suppression is done picture by picture.
        self.served_batch = None if any_batch else shape[0]
        # Noise reaches every weight; a flat picture would hide differences.
        rng = np.random.RandomState(0)
        self.images = rng.uniform(0, 1, shape).astype(np.float32)
        self.serve = tf.function(function, autograph=False)
        self.expected = self.answer()
        self.frozen = convert_variables_to_constants_v2(
            self.serve.get_concrete_function(self.spec(shape[0]))
        )
        self.graph_def = self.frozen.graph.as_graph_def()

    def answer(self) -> Outputs:
        """What the live network answers."""
        outputs = self.serve(tf.constant(self.images))
        return {name: value.numpy() for name, value in outputs.items()}

    def spec(self, batch_size: Optional[int]) -> tf.TensorSpec:
        """Signature for a fixed or any batch size."""
        return tf.TensorSpec(
            (batch_size, *self.shape[1:]), tf.float32, name=IMAGE
        )


class Live:
    """The live network as the graphs that are exported."""

    def __init__(self, run: str, batch_size: int) -> None:
        values = run_folder.read_flags(run)
        self.architecture = Architecture.of(values)
        self.limits = detection.Limits.of(values)
        self.network = create_model(self.architecture)
        weights.load(self.network, run)
        self.prior_boxes = anchors.priors(self.architecture)
        side = self.architecture.image_size
        self.heads = Graph(
            self.raw_outputs, self.network, (batch_size, side, side, 3), True
        )

    def finished(self) -> Graph:
        """The graph of nms, for one picture."""
        shape = (1, *self.heads.shape[1:])
        return Graph(self.detect, self.network, shape, False)

    def raw_outputs(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """RGB in [0, 1] to the heads' outputs by the seed's names."""
        outputs = self.network(image, training=False)
        last = self.architecture.segmentation_scope().split("/")[1]
        # Logits and encoded boxes, as the seed's graph has them.
        names = {
            "confidence": CONFIDENCE,
            "location": LOCATION,
            "segmentation": f"ssd_2/{last}/BiasAdd",
        }
        return {
            # An identity keeps its name through freezing, Keras' own vary.
            names[head]: tf.identity(value, name=names[head])
            for head, value in outputs.items()
        }

    def detect(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """RGB in [0, 1] to boxes (top, left, bottom, right), and the mask."""
        outputs = self.network(image, training=False)
        results = {}
        if "confidence" in outputs:
            found = detection.detect(
                outputs["confidence"][0],
                outputs["location"][0],
                tf.constant(self.prior_boxes),
                self.limits,
            )
            results.update(found._asdict())
        if "segmentation" in outputs:
            # At the finest map's size: the graph does not know the picture's.
            results["mask"] = tf.argmax(
                outputs["segmentation"][0], -1, tf.int32
            )
        return {
            name: tf.identity(value, name=name)
            for name, value in results.items()
        }


def export_savedmodel(graph: Graph, output: str) -> Outputs:
    """SavedModel; that of the heads takes any batch size."""
    path = os.path.join(output, "saved_model")
    # What is no attribute of the module would not be saved with it.
    module = tf.Module()
    module.network = graph.network
    module.serve = graph.serve
    signature = graph.serve.get_concrete_function(
        graph.spec(graph.served_batch)
    )
    tf.saved_model.save(module, path, {"serving_default": signature})
    # Kept in a name: TF 2.6 forgets the variables with the loaded object.
    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    outputs = serve(**{IMAGE: tf.constant(graph.images)})
    return {name: value.numpy() for name, value in outputs.items()}


def export_pb(graph: Graph, output: str) -> Outputs:
    """Frozen GraphDef with a fixed input shape."""
    tf.io.write_graph(graph.graph_def, output, "blitznet.pb", as_text=False)
    with open(os.path.join(output, "blitznet.pb"), "rb") as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    with tf.Graph().as_default() as loaded:
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(graph=loaded) as session:
            fetches = {each: f"{each}:0" for each in graph.expected}
            return session.run(fetches, {f"{IMAGE}:0": graph.images})


def export_tflite(graph: Graph, output: str) -> Outputs:
    """TFLite, converted from the frozen graph, run by its interpreter."""
    # From the frozen function: TF 2.18 converts a SavedModel of Keras 3 to
    # garbage without a word.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph.frozen])
    content = converter.convert()
    path = os.path.join(output, "blitznet.tflite")
    with open(path, "wb") as file:
        file.write(content)
    # Its successor ai_edge_litert is a package of its own; TensorFlow has this
    # one up to 2.21 at least.
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (feed,) = interpreter.get_input_details()
    interpreter.set_tensor(feed["index"], graph.images)
    interpreter.invoke()
    # In the order of the names, which the file does not keep.
    details = sorted(
        interpreter.get_output_details(), key=lambda each: each["name"]
    )
    values = [interpreter.get_tensor(each["index"]) for each in details]
    return dict(zip(sorted(graph.expected), values))


def export_onnx(graph: Graph, output: str) -> Outputs:
    """ONNX, converted from the frozen graph, run by onnxruntime."""
    import onnx
    import onnxruntime
    import tf2onnx

    path = os.path.join(output, "blitznet.onnx")
    fetches = [f"{each}:0" for each in graph.expected]
    model, _ = tf2onnx.convert.from_graph_def(
        graph.graph_def,
        input_names=[f"{IMAGE}:0"],
        output_names=fetches,
        # tf2onnx is tested from 14 to 18; old runtimes take the low ones.
        opset=15,
    )
    fix_sizes(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path)
    values = session.run(fetches, {f"{IMAGE}:0": graph.images})
    return dict(zip(graph.expected, values))


def fix_sizes(model: "onnx.ModelProto") -> None:  # noqa: F821, optional
    """Gives the resizes of a graph their sizes in place of scales.

    tf2onnx rounds scales down, so that 3 * (5 / 3) pixels become 4. Rounded up
    they would give the right sizes, and wrong pixels where a nearest
    neighbour lies exactly on one.
    """
    import onnx

    graph = model.graph
    constants = {each.name: each for each in graph.initializer}
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    # A set, for two resizes may share their scales.
    replaced = {node.input[2] for node in resizes}
    for name in replaced:
        scales = onnx.numpy_helper.to_array(constants[name])
        exact = scales == np.round(scales)
        raised = np.where(exact, scales, np.nextafter(scales, np.inf))
        raised = onnx.numpy_helper.from_array(raised.astype("f4"), name)
        constants[name].CopyFrom(raised)
    del graph.value_info[:]  # declared with the wrong sizes
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    shapes = {each.name: each.type.tensor_type.shape.dim for each in inferred}
    for node in resizes:
        sizes = [each.dim_value for each in shapes[node.output[0]]]
        name = f"{node.name}_sizes"
        graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(sizes, np.int64), name)
        )
        del node.input[1:]
        node.input.extend(["", "", name])
    for name in replaced:
        graph.initializer.remove(constants[name])


def export_tf1(graph: Graph, output: str) -> Outputs:
    """TF1 checkpoint; read back into the live network."""
    prefix = os.path.join(output, "tf1", "model.ckpt")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    weights.save_tf1(graph.network, prefix, run_folder.last_step(FLAGS.run))
    weights.load(graph.network, prefix)
    return graph.answer()


EXPORTERS: dict[str, Callable[[Graph, str], Outputs]] = {
    "savedmodel": export_savedmodel,
    "pb": export_pb,
    "tflite": export_tflite,
    "onnx": export_onnx,
    "tf1": export_tf1,
}
# What `nms` stands for: formats with decoding and suppression inside.
NMS_FORMATS = ("savedmodel", "tflite", "onnx")
FORMATS = [*EXPORTERS, "nms"]


def cannot_export(name: str) -> Optional[str]:
    """Why a format is left out here, or None."""
    missing = [
        package
        for package in ONNX_PACKAGES
        if name == "onnx" and importlib.util.find_spec(package) is None
    ]
    if missing:
        return f"needs pip install {' '.join(missing)}"
    return None


def difference(outputs: Outputs, expected: Outputs) -> float:
    """Largest difference as a share of an output's largest value.

    Detections whose scores lie within TOLERANCE of each other may change
    places, and classes of a mask that do: they are no difference.
    """
    scores = expected.get("scores")
    worst = 0.0
    for name, wanted in expected.items():
        if outputs[name].shape != wanted.shape:
            return float("inf")
        apart = np.abs(outputs[name].astype(np.float64) - wanted)
        if name in ("boxes", "classes"):
            gaps = np.abs(np.diff(scores, prepend=2.0, append=-1.0))
            apart = apart[np.minimum(gaps[1:], gaps[:-1]) > TOLERANCE]
        elif name == "mask":
            # Our choice: a pixel in a thousand may hang on rounding.
            apart = np.array([float((apart > 0).mean() > 1e-3)])
        largest = max(np.abs(wanted).max(), 1e-30)
        worst = max(worst, apart.max(initial=0.0) / largest)
    return worst


def export_all(
    graph: Graph, formats: Sequence[str], output: str, prefix: str = ""
) -> None:
    """Writes and proves a graph in some formats; `prefix` is for the log."""
    os.makedirs(output, exist_ok=True)
    for name in formats:
        reason = cannot_export(name)
        if reason and FLAGS["formats"].present:
            raise UserError(f"--formats={name} {reason}")
        if reason:
            print(f"{name:<14} left out: {reason}")
            continue
        largest = difference(EXPORTERS[name](graph, output), graph.expected)
        # NaN fails this comparison too.
        if not largest <= TOLERANCE:
            raise UserError(
                f"{prefix}{name}: differs by {largest:.2g} of the largest "
                f"output from the live network, allowed {TOLERANCE}; do not "
                "use this export"
            )
        print(f"{prefix + name:<14} largest difference {largest:.2g}")


def atc_command(live: Live) -> str:
    """The seed's command for an Ascend 310."""
    shape = ",".join(map(str, live.heads.shape))
    nodes = ";".join(f"{name}:0" for name in live.heads.expected)
    return (
        # For the seed's chip; `npu-smi info` names the one at hand.
        "atc --model=blitznet.pb --framework=3 --output=blitznet "
        f'--soc_version=Ascend310 --out_nodes="{nodes}" '
        f'--input_shape="{IMAGE}:{shape}"'
    )


def main() -> None:
    """Writes and proves the formats asked for."""
    unknown = sorted(set(FLAGS.formats) - set(FORMATS))
    if unknown:
        raise UserError(
            f"--formats={','.join(unknown)}: choose from {','.join(FORMATS)}"
        )
    npu_config.setup()
    live = Live(FLAGS.run, FLAGS.batch_size)
    formats = [name for name in FLAGS.formats if name in EXPORTERS]
    export_all(live.heads, formats, FLAGS.output)
    if "nms" in FLAGS.formats:
        folder = os.path.join(FLAGS.output, "with_nms")
        # Whoever wants them all gets those that can be made here.
        possible = [name for name in NMS_FORMATS if not cannot_export(name)]
        export_all(live.finished(), possible, folder, "nms ")
    print(f"wrote {FLAGS.output}; to convert the pb for an Ascend NPU:")
    print(atc_command(live))


if __name__ == "__main__":
    define_flags()
    launch(main)
