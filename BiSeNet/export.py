"""Exports a run of BiSeNet and proves each export against the live network.

python BiSeNet/export.py --run=RUN --output=DIR [--formats=savedmodel,pb,…]
savedmodel, a frozen pb (for Ascend's atc), tflite, onnx (needs tf2onnx and
onnxruntime), tf1, a checkpoint with the TF1 reference's names, and float16, a
small run folder for evaluate.py and predict.py.
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

from BiSeNet import dataset, run_folder, weights
from BiSeNet.classes import FILE, read
from BiSeNet.launch import launch
from BiSeNet.model import create_model
from common import npu_config
from common.npu_config import UserError

FLAGS = flags.FLAGS
IMAGE, LOGITS, CLASSES = "input_image", "logits", "classes"
# Ours: runtimes sum in other orders; a wrong export is far off.
TOLERANCE = 1e-5  # largest difference, as a share of the largest logit
# Float16 keeps 11 bits of each weight, and errors add up over the layers.
FLOAT16_TOLERANCE = 2e-2
# Flags of a run that mean nothing on another machine.
OWN_PATHS = (
    "data_path",
    "class_dict",
    "output_path",
    "init_checkpoint",
    "frontend_checkpoint",
)
ONNX_PACKAGES = ("tf2onnx", "onnxruntime")


def define_flags() -> None:
    """Defines the flags of the export."""
    npu_config.define_flags()
    # An export serves other devices; it should not carry this one's bfloat16.
    FLAGS.set_default("precision_mode", "force_fp32")
    flags.DEFINE_string("run", None, "Run folder; none: the one shipped.")
    flags.DEFINE_string("output", None, "Folder for the exports.")
    flags.DEFINE_list("formats", list(EXPORTERS), "Which to write.")
    flags.DEFINE_integer(
        "batch_size", 1, "Fixed batch of pb, tflite, onnx.", 1
    )
    flags.DEFINE_string(
        "input_size", None, "Fixed height,width of inputs; none: the run's."
    )
    flags.mark_flag_as_required("output")


class Live:
    """The live network with a fixed input shape, and its frozen graph."""

    def __init__(
        self, run: str, batch_size: int, input_size: Optional[str]
    ) -> None:
        self.run, self.values = run, run_folder.read_flags(run)
        size = dataset.parse_size(
            input_size or self.values["crop_size"], "input_size"
        )
        self.facts = (self.values["frontend"], self.values["compat"])
        self.network, _ = create_model(
            self.values["num_classes"], *self.facts, input_size=size
        )
        weights.load(self.network, run, facts=self.facts)
        self.shape = (batch_size, *size, 3)
        # Noise reaches every weight; a flat picture would hide differences.
        rng = np.random.RandomState(0)
        self.image = rng.uniform(0, 255, self.shape).astype(np.float32)
        self.serve = tf.function(self.segment, autograph=False)
        self.expected = self.logits()
        self.frozen = convert_variables_to_constants_v2(
            self.serve.get_concrete_function(self.spec(batch_size))
        )
        self.graph_def = self.frozen.graph.as_graph_def()

    def logits(self) -> np.ndarray:
        """What the live network answers to `image`."""
        return self.serve(tf.constant(self.image))[LOGITS].numpy()

    def spec(self, batch_size: Optional[int]) -> tf.TensorSpec:
        """Signature of `segment` for a fixed or any batch size."""
        shape = (batch_size, *self.shape[1:])
        return tf.TensorSpec(shape, tf.float32, name=IMAGE)

    def segment(self, input_image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Pictures in 0..255 to logits and classes."""
        logits = self.network(input_image, training=False)
        return {
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
    signature = live.serve.get_concrete_function(live.spec(None))
    tf.saved_model.save(module, path, {"serving_default": signature})
    # Kept in a name: TF 2.6 forgets the variables with the loaded object.
    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    return serve(**{IMAGE: tf.constant(live.image)})[LOGITS].numpy()


def export_pb(live: Live, output: str) -> np.ndarray:
    """Frozen GraphDef with a fixed input shape."""
    tf.io.write_graph(live.graph_def, output, "bisenet.pb", as_text=False)
    with open(os.path.join(output, "bisenet.pb"), "rb") as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            logits, classes = session.run(
                [f"{LOGITS}:0", f"{CLASSES}:0"], {f"{IMAGE}:0": live.image}
            )
    if (classes != logits.argmax(-1)).any():
        raise UserError("pb: classes are no argmax of logits; do not use it")
    return logits


def export_tflite(live: Live, output: str) -> np.ndarray:
    """TFLite, converted from the frozen graph, run by its interpreter."""
    # From the frozen function: TF 2.18 converts a SavedModel of Keras 3 to
    # garbage without a word.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([live.frozen])
    content = converter.convert()
    with open(os.path.join(output, "bisenet.tflite"), "wb") as file:
        file.write(content)
    # Its successor ai_edge_litert is a package of its own; TensorFlow has this
    # one up to 2.21 at least.
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (feed,) = interpreter.get_input_details()
    interpreter.set_tensor(feed["index"], live.image)
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

    path = os.path.join(output, "bisenet.onnx")
    tf2onnx.convert.from_graph_def(
        live.graph_def,
        input_names=[f"{IMAGE}:0"],
        output_names=[f"{LOGITS}:0", f"{CLASSES}:0"],
        # tf2onnx is tested from 14 to 18; old runtimes take the low ones.
        opset=15,
        output_path=path,
    )
    session = onnxruntime.InferenceSession(path)
    return session.run([f"{LOGITS}:0"], {f"{IMAGE}:0": live.image})[0]


def export_tf1(live: Live, output: str) -> np.ndarray:
    """TF1 checkpoint; read back into the live network."""
    prefix = os.path.join(output, "tf1", "model.ckpt")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    # Without auxiliary heads: the reference's inference graph has none.
    weights.save_tf1(live.network, prefix, run_folder.last_step(live.run))
    weights.load(live.network, prefix)
    return live.logits()


def export_float16(live: Live, output: str) -> np.ndarray:
    """A run folder without what resuming needs, at half the size."""
    path = os.path.join(output, "weights.npz")
    weights.save_npz(live.network, path, live.facts, np.float16)
    read(os.path.join(live.run, FILE)).save(os.path.join(output, FILE))
    values = {
        name: None if name in OWN_PATHS or _is_absolute(value) else value
        for name, value in live.values.items()
    }
    run_folder.write_json(os.path.join(output, "flags.json"), values)
    weights.load(live.network, path, facts=live.facts)
    logits = live.logits()
    # What is exported after this is to be exact again.
    weights.load(live.network, live.run, facts=live.facts)
    return logits


def _is_absolute(value: object) -> bool:
    """True for a path of this machine, under whatever alias of a flag."""
    return isinstance(value, str) and os.path.isabs(value)


EXPORTERS: dict[str, Callable[[Live, str], np.ndarray]] = {
    "savedmodel": export_savedmodel,
    "pb": export_pb,
    "tflite": export_tflite,
    "onnx": export_onnx,
    "tf1": export_tf1,
    "float16": export_float16,
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
    run = run_folder.find_run(FLAGS.run)
    npu_config.setup()
    live = Live(run, FLAGS.batch_size, FLAGS.input_size)
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
        allowed = FLOAT16_TOLERANCE if name == "float16" else TOLERANCE
        # NaN fails this comparison too.
        if not difference <= allowed:
            raise UserError(
                f"{name}: differs by {difference:.2g} of the largest logit "
                f"from the live network, allowed {allowed}; do not use "
                "this export"
            )
        print(f"{name:<11} largest difference {difference:.2g}")
    shape = ",".join(map(str, live.shape))
    print(f"wrote {FLAGS.output}; to convert the pb for an Ascend NPU:")
    print(
        # For the seed's chip; `npu-smi info` names the one at hand.
        "atc --model=bisenet.pb --framework=3 --output=bisenet "
        f'--soc_version=Ascend310 --out_nodes="{CLASSES}:0" '
        f'--input_shape="{IMAGE}:{shape}"'
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
