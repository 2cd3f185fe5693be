"""Exports a run of DeepLabv3plus and proves that each export is as the run.

python DeepLabv3plus/export.py --run=RUN --output=DIR [--formats=pb,…]
savedmodel, a frozen pb (for Ascend's atc), tflite, onnx (needs tf2onnx and
onnxruntime) and tf1, a checkpoint with the TF1 reference's names.
"""

import importlib.util
import os
import sys
from typing import Callable, Optional

import numpy as np
import tensorflow as tf
from absl import flags

# No public name freezes a function; this one does from TF 2.6 to 2.21.
from tensorflow.python.framework.convert_to_constants import (
    convert_variables_to_constants_v2,
)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import npu_config
from common.npu_config import UserError
from DeepLabv3plus import dataset, run_folder, weights
from DeepLabv3plus.launch import launch
from DeepLabv3plus.layers import BatchNorm, resize_bilinear
from DeepLabv3plus.model import create_model, shape_of

FLAGS = flags.FLAGS
# The seed's node names.
IMAGE, CLASSES = "ImageTensor", "SemanticPredictions"
PROBABILITIES = "SemanticProbabilities"
# Ours: runtimes sum in other orders; a wrong export is far off.
TOLERANCE = 1e-5  # largest difference of a probability
ONNX_PACKAGES = ("tf2onnx", "onnxruntime")


def define_flags() -> None:
    """Defines the flags of the export."""
    npu_config.define_flags()
    # An export serves other devices; it should not carry this one's bfloat16.
    FLAGS.set_default("precision_mode", "force_fp32")
    flags.DEFINE_string("run", None, "Run folder: --output_path of train.py.")
    flags.DEFINE_string("output", None, "Folder for the exports.")
    flags.DEFINE_list("formats", list(EXPORTERS), "Which to write.")
    flags.DEFINE_integer(
        "batch_size", 1, "Fixed batch of pb, tflite, onnx.", 1
    )
    flags.DEFINE_string(
        "input_size", None, "Fixed height,width of inputs; none: the run's."
    )
    flags.DEFINE_alias("crop_size", "input_size")
    flags.mark_flags_as_required(["run", "output"])


class Live:
    """The live network with a fixed input shape, and its frozen graph."""

    def __init__(
        self, run: str, batch_size: int, input_size: Optional[str]
    ) -> None:
        values = run_folder.read_flags(run)
        crop = values["eval_crop_size"] or values["train_crop_size"]
        # One size for pictures and crop, where the reference's graph pads: atc
        # wants static shapes.
        self.size = dataset.parse_size(input_size or crop, "input_size")
        self.network, _ = create_model(
            shape_of(values), BatchNorm(), input_size=self.size
        )
        weights.load(self.network, run)
        # Noise reaches every weight; a flat picture would hide differences.
        rng = np.random.RandomState(0)
        shape = (batch_size, *self.size, 3)
        self.images = rng.randint(0, 256, shape).astype(np.uint8)
        self.serve = tf.function(self.segment, autograph=False)
        self.expected = self.probabilities()
        self.frozen = convert_variables_to_constants_v2(
            self.serve.get_concrete_function(self.spec(batch_size))
        )
        self.graph_def = self.frozen.graph.as_graph_def()

    def probabilities(self) -> np.ndarray:
        """What the live network answers to `images`."""
        return self.serve(tf.constant(self.images))[PROBABILITIES].numpy()

    def spec(self, batch_size: Optional[int]) -> tf.TensorSpec:
        """Signature of `segment` for a fixed or any batch size."""
        return tf.TensorSpec((batch_size, *self.size, 3), tf.uint8, name=IMAGE)

    def segment(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Pictures in 0..255 to class ids and probabilities."""
        # Scaling to -1..1 is in the network: no caller can forget it.
        logits = self.network(tf.cast(images, tf.float32), training=False)
        probabilities = tf.nn.softmax(resize_bilinear(logits, self.size))
        # The seed's type; argmax alone would give int64.
        classes = tf.argmax(probabilities, -1, output_type=tf.int32)
        return {
            # atc and others find the outputs by the names of these nodes.
            CLASSES: tf.identity(classes, name=CLASSES),
            PROBABILITIES: tf.identity(probabilities, name=PROBABILITIES),
        }


def export_savedmodel(live: Live, output: str) -> np.ndarray:
    """SavedModel for any batch size."""
    path = os.path.join(output, "saved_model")
    # What is no attribute of the module would not be saved with it.
    module = tf.Module()
    module.network = live.network
    module.serve = live.serve
    signature = live.serve.get_concrete_function(live.spec(None))
    tf.saved_model.save(module, path, {"serving_default": signature})
    # Kept in a name: TF 2.6 forgets the variables with the loaded object.
    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    return serve(**{IMAGE: tf.constant(live.images)})[PROBABILITIES].numpy()


def export_pb(live: Live, output: str) -> np.ndarray:
    """Frozen GraphDef with a fixed input shape."""
    tf.io.write_graph(
        live.graph_def, output, "deeplabv3plus.pb", as_text=False
    )
    with open(os.path.join(output, "deeplabv3plus.pb"), "rb") as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            probabilities, classes = session.run(
                [f"{PROBABILITIES}:0", f"{CLASSES}:0"],
                {f"{IMAGE}:0": live.images},
            )
    if (classes != probabilities.argmax(-1)).any():
        raise UserError(
            f"pb: {CLASSES} are not those of the largest {PROBABILITIES}; do "
            "not use it"
        )
    return probabilities


def export_tflite(live: Live, output: str) -> np.ndarray:
    """TFLite, converted from the frozen graph, run by its interpreter."""
    # From the frozen function: TF 2.18 converts a SavedModel of Keras 3 to
    # garbage without a word.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([live.frozen])
    content = converter.convert()
    with open(os.path.join(output, "deeplabv3plus.tflite"), "wb") as file:
        file.write(content)
    # Its successor ai_edge_litert is a package of its own; TensorFlow has this
    # one up to 2.21 at least.
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (feed,) = interpreter.get_input_details()
    interpreter.set_tensor(feed["index"], live.images)
    interpreter.invoke()
    # Outputs have no names of ours; probabilities are those with channels.
    (probabilities,) = (
        interpreter.get_tensor(each["index"])
        for each in interpreter.get_output_details()
        if len(each["shape"]) == 4
    )
    return probabilities


def export_onnx(live: Live, output: str) -> np.ndarray:
    """ONNX, converted from the frozen graph, run by onnxruntime."""
    import onnx
    import onnxruntime
    import tf2onnx

    path = os.path.join(output, "deeplabv3plus.onnx")
    model, _ = tf2onnx.convert.from_graph_def(
        live.graph_def,
        input_names=[f"{IMAGE}:0"],
        output_names=[f"{CLASSES}:0", f"{PROBABILITIES}:0"],
        # tf2onnx is tested from 14 to 18; old runtimes take the low ones.
        opset=15,
    )
    constants = {each.name: each for each in model.graph.initializer}
    resizes = [node for node in model.graph.node if node.op_type == "Resize"]
    # A set, for two resizes may share their scales.
    for name in {node.input[2] for node in resizes}:
        # tf2onnx rounds 25 / 7 down, and seven pixels would become 24.
        scales = constants[name]
        values = onnx.numpy_helper.to_array(scales)
        raised = np.where(values == 1, values, np.nextafter(values, np.inf))
        raised = raised.astype(np.float32)
        scales.CopyFrom(onnx.numpy_helper.from_array(raised, scales.name))
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path)
    feeds = {f"{IMAGE}:0": live.images}
    return session.run([f"{PROBABILITIES}:0"], feeds)[0]


def export_tf1(live: Live, output: str) -> np.ndarray:
    """TF1 checkpoint; read back into the live network."""
    prefix = os.path.join(output, "tf1", "model.ckpt")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    weights.save_tf1(live.network, prefix, run_folder.last_step(FLAGS.run))
    weights.load(live.network, prefix)
    return live.probabilities()


EXPORTERS: dict[str, Callable[[Live, str], np.ndarray]] = {
    "savedmodel": export_savedmodel,
    "pb": export_pb,
    "tflite": export_tflite,
    "onnx": export_onnx,
    "tf1": export_tf1,
}


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


def main() -> None:
    """Writes and proves the formats asked for."""
    unknown = sorted(set(FLAGS.formats) - set(EXPORTERS))
    if unknown:
        raise UserError(
            f"--formats={','.join(unknown)}: choose from {','.join(EXPORTERS)}"
        )
    npu_config.setup()
    live = Live(FLAGS.run, FLAGS.batch_size, FLAGS.input_size)
    os.makedirs(FLAGS.output, exist_ok=True)
    for name in FLAGS.formats:
        reason = cannot_export(name)
        if reason and FLAGS["formats"].present:
            raise UserError(f"--formats={name} {reason}")
        if reason:
            print(f"{name:<11} left out: {reason}")
            continue
        probabilities = EXPORTERS[name](live, FLAGS.output)
        difference = np.abs(probabilities - live.expected).max()
        # NaN fails this comparison too.
        if not difference <= TOLERANCE:
            raise UserError(
                f"{name}: differs by {difference:.2g} from the live network, "
                f"allowed {TOLERANCE}; do not use this export"
            )
        print(f"{name:<11} largest difference {difference:.2g}")
    shape = ",".join(map(str, live.images.shape))
    print(f"wrote {FLAGS.output}; to convert the pb for an Ascend NPU:")
    print(
        # For the seed's chip; `npu-smi info` names the one at hand.
        "atc --model=deeplabv3plus.pb --framework=3 --output=deeplabv3plus "
        f'--soc_version=Ascend310 --out_nodes="{CLASSES}:0" '
        f'--input_shape="{IMAGE}:{shape}"'
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
