"""Exports a run of ROI_FCN and proves each export against the live network.

python ROI_FCN/export.py --run=RUN --output=DIR [--formats=savedmodel,pb,…]
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
from ROI_FCN import dataset, run_folder, weights
from ROI_FCN.launch import launch
from ROI_FCN.model import create_model

FLAGS = flags.FLAGS
# The seed's node names; Prob are logits, whatever the name says.
IMAGE, ROI, LOGITS, CLASSES = "input_image", "ROIMap", "Prob", "Pred"
# Ours: runtimes sum in other orders; a wrong export is far off.
TOLERANCE = 1e-5  # largest difference, as a share of the largest logit
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
    flags.DEFINE_alias("canvas", "input_size")
    flags.mark_flags_as_required(["run", "output"])


class Live:
    """The live network with a fixed input shape, and its frozen graph."""

    def __init__(
        self, run: str, batch_size: int, input_size: Optional[str]
    ) -> None:
        values = run_folder.read_flags(run)
        size = dataset.parse_size(input_size or values["canvas"], "input_size")
        self.network, _ = create_model(
            values["num_classes"],
            values["base_filters"],
            values["fc_channels"],
            input_size=size,
        )
        weights.load(self.network, run)
        self.shape = (batch_size, *size, 3)
        # Noise reaches every weight; a flat picture would hide differences.
        rng = np.random.RandomState(0)
        images = rng.uniform(0, 255, self.shape).astype(np.float32)
        regions = rng.randint(0, 2, (*self.shape[:3], 1)).astype(np.int32)
        self.inputs = {IMAGE: images, ROI: regions}
        self.serve = tf.function(self.segment, autograph=False)
        self.expected = self.logits()
        self.frozen = convert_variables_to_constants_v2(
            self.serve.get_concrete_function(*self.specs(batch_size))
        )
        self.graph_def = self.frozen.graph.as_graph_def()

    def logits(self) -> np.ndarray:
        """What the live network answers to `inputs`."""
        return self.serve(*map(tf.constant, self.inputs.values()))[
            LOGITS
        ].numpy()

    def feeds(self) -> dict[str, np.ndarray]:
        """`inputs` by the names of a graph's tensors."""
        return {f"{name}:0": array for name, array in self.inputs.items()}

    def specs(self, batch_size: Optional[int]) -> list[tf.TensorSpec]:
        """Signature of `segment` for a fixed or any batch size."""
        size = (batch_size, *self.shape[1:3])
        return [
            tf.TensorSpec((*size, 3), tf.float32, name=IMAGE),
            tf.TensorSpec((*size, 1), tf.int32, name=ROI),
        ]

    def segment(
        self, input_image: tf.Tensor, roi_map: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Pictures in 0..255 and regions of 0 and 1 to logits and classes."""
        # The seed feeds whole numbers; anything but 0 means inside.
        regions = tf.cast(roi_map > 0, tf.float32)
        logits = self.network([input_image, regions], training=False)
        return {
            # atc finds an output by its operation's name; a signature's own
            # are called Identity, whatever their keys.
            LOGITS: tf.identity(logits, name=LOGITS),
            CLASSES: tf.argmax(logits, -1, name=CLASSES),
        }


def export_savedmodel(live: Live, output: str) -> np.ndarray:
    """SavedModel for any batch size."""
    path = os.path.join(output, "saved_model")
    # What is no attribute of the module would not be saved with it.
    module = tf.Module()
    module.network = live.network
    module.serve = live.serve
    signature = live.serve.get_concrete_function(*live.specs(None))
    tf.saved_model.save(module, path, {"serving_default": signature})
    # Kept in a name: TF 2.6 forgets the variables with the loaded object.
    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    inputs = {name: tf.constant(each) for name, each in live.inputs.items()}
    return serve(**inputs)[LOGITS].numpy()


def export_pb(live: Live, output: str) -> np.ndarray:
    """Frozen GraphDef with a fixed input shape."""
    tf.io.write_graph(live.graph_def, output, "roi_fcn.pb", as_text=False)
    with open(os.path.join(output, "roi_fcn.pb"), "rb") as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            logits, classes = session.run(
                [f"{LOGITS}:0", f"{CLASSES}:0"], live.feeds()
            )
    if (classes != logits.argmax(-1)).any():
        raise UserError("pb: Pred is not the argmax of Prob; do not use it")
    return logits


def export_tflite(live: Live, output: str) -> np.ndarray:
    """TFLite, converted from the frozen graph, run by its interpreter."""
    # From the frozen function: TF 2.18 converts a SavedModel of Keras 3 to
    # garbage without a word.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([live.frozen])
    content = converter.convert()
    with open(os.path.join(output, "roi_fcn.tflite"), "wb") as file:
        file.write(content)
    # Its successor ai_edge_litert is a package of its own; TensorFlow has this
    # one up to 2.21 at least.
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    for feed in interpreter.get_input_details():
        (name,) = (name for name in live.inputs if name in feed["name"])
        interpreter.set_tensor(feed["index"], live.inputs[name])
    interpreter.invoke()
    # Outputs have no names of ours; the logits are those with channels.
    (logits,) = (
        interpreter.get_tensor(each["index"])
        for each in interpreter.get_output_details()
        if len(each["shape"]) == 4
    )
    return logits


def export_onnx(live: Live, output: str) -> np.ndarray:
    """ONNX, converted from the frozen graph, run by onnxruntime."""
    import onnxruntime
    import tf2onnx

    path = os.path.join(output, "roi_fcn.onnx")
    tf2onnx.convert.from_graph_def(
        live.graph_def,
        input_names=list(live.feeds()),
        output_names=[f"{LOGITS}:0", f"{CLASSES}:0"],
        # tf2onnx is tested from 14 to 18; old runtimes take the low ones.
        opset=15,
        output_path=path,
    )
    session = onnxruntime.InferenceSession(path)
    return session.run([f"{LOGITS}:0"], live.feeds())[0]


def export_tf1(live: Live, output: str) -> np.ndarray:
    """TF1 checkpoint; read back into the live network."""
    prefix = os.path.join(output, "tf1", "model.ckpt")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    weights.save_tf1(live.network, prefix, run_folder.last_step(FLAGS.run))
    weights.load(live.network, prefix)
    return live.logits()


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
        logits = EXPORTERS[name](live, FLAGS.output)
        difference = np.abs(logits - live.expected).max()
        difference /= np.abs(live.expected).max()
        # NaN fails this comparison too.
        if not difference <= TOLERANCE:
            raise UserError(
                f"{name}: differs by {difference:.2g} of the largest logit "
                f"from the live network, allowed {TOLERANCE}; do not use "
                "this export"
            )
        print(f"{name:<11} largest difference {difference:.2g}")
    shapes = ";".join(
        f"{name}:{','.join(map(str, each.shape))}"
        for name, each in live.inputs.items()
    )
    print(f"wrote {FLAGS.output}; to convert the pb for an Ascend NPU:")
    print(
        # For the seed's chip; `npu-smi info` names the one at hand.
        "atc --model=roi_fcn.pb --framework=3 --output=roi_fcn "
        f'--soc_version=Ascend310 --out_nodes="{CLASSES}:0" '
        f'--input_shape="{shapes}"'
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
