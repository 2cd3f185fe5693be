"""Runs all exports in a folder on the same random input and compares them.

python ci/run_exports.py FOLDER prints, as JSON, how far the outputs of each
format are from those of the frozen graph.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

Arrays = list[np.ndarray]


def by_shape(outputs: Arrays) -> Arrays:
    """Formats order several outputs differently."""
    return sorted(outputs, key=lambda array: array.shape)


def run_pb(path: Path) -> tuple[np.ndarray, Arrays]:
    """Draws the input that a frozen graph declares, and runs it."""
    graph_def = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    used = {
        name.split(":")[0].lstrip("^")
        for node in graph_def.node
        for name in node.input
    }
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        (feed,) = (
            operation.outputs[0]
            for operation in graph.get_operations()
            if operation.type == "Placeholder"
        )
        # A frozen graph does not name its outputs: what nobody reads is one.
        ends = [
            graph.get_operation_by_name(node.name).outputs[0]
            for node in graph_def.node
            if node.name not in used and node.op not in ("NoOp", "Const")
        ]
        shape = feed.shape.as_list()
        # A fixed seed, so that a difference can be looked into.
        values = np.random.RandomState(0).uniform(-1, 1, shape)
        images = values.astype(np.float32)
        with tf.compat.v1.Session(graph=graph) as session:
            return images, session.run(ends, {feed: images})


def run_savedmodel(path: Path, images: np.ndarray) -> Arrays:
    """Runs the serving signature of a SavedModel."""
    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    # One input exactly, as a serving client expects.
    (name,) = serve.structured_input_signature[1]
    outputs = serve(**{name: tf.constant(images)})
    return [output.numpy() for output in outputs.values()]


def run_tflite(path: Path, images: np.ndarray) -> Arrays:
    """Runs a TFLite file."""
    interpreter = tf.lite.Interpreter(str(path))
    interpreter.allocate_tensors()
    (feed,) = interpreter.get_input_details()
    interpreter.set_tensor(feed["index"], images)
    interpreter.invoke()
    return [
        interpreter.get_tensor(output["index"])
        for output in interpreter.get_output_details()
    ]


def run_onnx(path: Path, images: np.ndarray) -> Arrays:
    """Runs an ONNX file."""
    # Only here: TensorFlow alone has to do for the other formats.
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    (feed,) = session.get_inputs()
    return session.run(None, {feed.name: images})


def main() -> None:
    """Compares what is in the folder."""
    folder = Path(sys.argv[1])
    (pb,) = folder.glob("*.pb")
    images, expected = run_pb(pb)
    results = {
        "pb": expected,
        "savedmodel": run_savedmodel(folder / "saved_model", images),
    }
    for path in folder.glob("*.tflite"):
        results["tflite"] = run_tflite(path, images)
    for path in folder.glob("*.onnx"):
        results["onnx"] = run_onnx(path, images)
    differences = {}
    for name, outputs in results.items():
        pairs = zip(by_shape(outputs), by_shape(expected))
        differences[name] = max(
            float(np.abs(output - wanted).max()) for output, wanted in pairs
        )
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
