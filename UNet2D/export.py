"""Exports a run of UNet2D and proves each export against the live network.

python UNet2D/export.py --run=RUN --output=DIR [--formats=savedmodel,pb,…]
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
from UNet2D import run_folder, weights
from UNet2D.launch import launch
from UNet2D.model import check_input_side, create_model

FLAGS = flags.FLAGS
INPUT, OUTPUT = "input_tensor", "Softmax"  # the seed's node names
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
    flags.DEFINE_integer("image_size", 0, "Fixed input side; 0: the run's.", 0)
    flags.mark_flags_as_required(["run", "output"])


class Live:
    """The live network with a fixed input shape, and its frozen graph."""

    def __init__(self, run: str, batch_size: int, image_size: int) -> None:
        values = run_folder.read_flags(run)
        side = image_size or values["image_size"]
        check_input_side(side, "--image_size")
        shape = (values["num_classes"], values["in_channels"])
        self.network, _ = create_model(
            *shape, values["base_filters"], input_size=(side, side)
        )
        weights.load(self.network, run)
        channels = values["in_channels"]
        self.shape = (batch_size, side, side, channels)
        # Noise reaches every weight; a flat picture would hide differences.
        rng = np.random.RandomState(0)
        self.images = rng.uniform(-1, 1, self.shape).astype(np.float32)
        self.serve = tf.function(self.probabilities, autograph=False)
        self.expected = self.serve(tf.constant(self.images))[OUTPUT].numpy()
        spec = tf.TensorSpec(self.shape, tf.float32, name=INPUT)
        self.frozen = convert_variables_to_constants_v2(
            self.serve.get_concrete_function(spec)
        )
        self.graph_def = self.frozen.graph.as_graph_def()

    def probabilities(self, input_tensor: tf.Tensor) -> dict[str, tf.Tensor]:
        """[N, H, W, c] in [-1, 1] to class probabilities."""
        logits = self.network(input_tensor, training=False)
        # atc finds an output by its operation's name; a signature's own are
        # called Identity, whatever their keys.
        return {OUTPUT: tf.nn.softmax(logits, name=OUTPUT)}


def export_savedmodel(live: Live, output: str) -> np.ndarray:
    """SavedModel for any batch size."""
    path = os.path.join(output, "saved_model")
    spec = tf.TensorSpec((None, *live.shape[1:]), tf.float32, name=INPUT)
    # What is no attribute of the module would not be saved with it.
    module = tf.Module()
    module.network = live.network
    module.serve = live.serve
    signature = live.serve.get_concrete_function(spec)
    tf.saved_model.save(module, path, {"serving_default": signature})
    # Kept in a name: TF 2.6 forgets the variables with the loaded object.
    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    return serve(**{INPUT: tf.constant(live.images)})[OUTPUT].numpy()


def export_pb(live: Live, output: str) -> np.ndarray:
    """Frozen GraphDef with a fixed input shape."""
    tf.io.write_graph(live.graph_def, output, "unet2d.pb", as_text=False)
    with open(os.path.join(output, "unet2d.pb"), "rb") as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            return session.run(f"{OUTPUT}:0", {f"{INPUT}:0": live.images})


def export_tflite(live: Live, output: str) -> np.ndarray:
    """TFLite, converted from the frozen graph, run by its interpreter."""
    # From the frozen function: TF 2.18 converts a SavedModel of Keras 3 to
    # garbage without a word.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([live.frozen])
    content = converter.convert()
    with open(os.path.join(output, "unet2d.tflite"), "wb") as file:
        file.write(content)
    # Its successor ai_edge_litert is a package of its own; TensorFlow has this
    # one up to 2.21 at least.
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"], live.images
    )
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def export_onnx(live: Live, output: str) -> np.ndarray:
    """ONNX, converted from the frozen graph, run by onnxruntime."""
    import onnxruntime
    import tf2onnx

    path = os.path.join(output, "unet2d.onnx")
    tf2onnx.convert.from_graph_def(
        live.graph_def,
        input_names=[f"{INPUT}:0"],
        output_names=[f"{OUTPUT}:0"],
        # tf2onnx is tested from 14 to 18; old runtimes take the low ones.
        opset=15,
        output_path=path,
    )
    session = onnxruntime.InferenceSession(path)
    return session.run([f"{OUTPUT}:0"], {f"{INPUT}:0": live.images})[0]


def export_tf1(live: Live, output: str) -> np.ndarray:
    """TF1 checkpoint; read back into the live network."""
    prefix = os.path.join(output, "tf1", "model.ckpt")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    weights.save_tf1(live.network, prefix, run_folder.last_step(FLAGS.run))
    weights.load(live.network, prefix)
    return live.serve(tf.constant(live.images))[OUTPUT].numpy()


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
    live = Live(FLAGS.run, FLAGS.batch_size, FLAGS.image_size)
    os.makedirs(FLAGS.output, exist_ok=True)
    for name in FLAGS.formats:
        reason = cannot_export(name)
        if reason and FLAGS["formats"].present:
            raise UserError(f"--formats={name} {reason}")
        if reason:
            print(f"{name:<11} left out: {reason}")
            continue
        # NaN fails this comparison too.
        difference = np.abs(
            EXPORTERS[name](live, FLAGS.output) - live.expected
        )
        if not difference.max() <= TOLERANCE:
            raise UserError(
                f"{name}: differs by {difference.max():.2g} from the live "
                f"network, allowed {TOLERANCE}; do not use this export"
            )
        print(f"{name:<11} largest difference {difference.max():.2g}")
    print(f"wrote {FLAGS.output}; to convert the pb for an Ascend NPU:")
    print(
        # An example: `npu-smi info` names the chip at hand.
        "atc --model=unet2d.pb --framework=3 --output=unet2d "
        "--soc_version=Ascend310P3 --input_format=NHWC "
        f'--input_shape="{INPUT}:{",".join(map(str, live.shape))}" '
        f'--out_nodes="{OUTPUT}:0" --output_type=FP32'
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
