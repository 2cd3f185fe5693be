"""Runs all exports in a folder on the same random inputs and compares them.

python ci/run_exports.py FOLDER prints, as JSON, how far the outputs of each
format are from those of the frozen graph: differences as a share of the
largest value where that is above 1, and of classes the share that differs
where more differ than ties explain.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

Arrays = list[np.ndarray]
Inputs = dict[str, np.ndarray]
# Share of pixels whose two likeliest classes may lie within rounding.
TIES = 1e-3


def by_shape(outputs: Arrays) -> Arrays:
    """Formats order several outputs differently."""
    return sorted(outputs, key=lambda array: array.shape)


def draw(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An input for a graph: noise, or whole numbers that may be masks."""
    # A fixed seed, so that a difference can be looked into.
    rng = np.random.RandomState(0)
    if np.issubdtype(dtype, np.integer):
        largest = 255 if dtype == np.uint8 else 1
        return rng.randint(0, largest + 1, shape).astype(dtype)
    return rng.uniform(-1, 1, shape).astype(dtype)


def difference(output: np.ndarray, wanted: np.ndarray) -> float:
    """How far an output is off; infinite where shapes differ."""
    if output.shape != wanted.shape:
        return float("inf")
    if np.issubdtype(wanted.dtype, np.integer):
        share = float((output != wanted).mean())
        return share if share > TIES else 0.0
    largest = max(1.0, float(np.abs(wanted).max()))
    return float(np.abs(output - wanted).max()) / largest


def run_pb(path: Path) -> tuple[Inputs, Arrays]:
    """Draws the inputs that a frozen graph declares, and runs it."""
    graph_def = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    used = {
        name.split(":")[0].lstrip("^")
        for node in graph_def.node
        for name in node.input
    }
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        feeds = {
            operation.name: operation.outputs[0]
            for operation in graph.get_operations()
            if operation.type == "Placeholder"
        }
        # A frozen graph does not name its outputs: what nobody reads is one.
        ends = [
            graph.get_operation_by_name(node.name).outputs[0]
            for node in graph_def.node
            if node.name not in used and node.op not in ("NoOp", "Const")
        ]
        inputs = {
            name: draw(feed.shape.as_list(), feed.dtype.as_numpy_dtype)
            for name, feed in feeds.items()
        }
        values = {feed: inputs[name] for name, feed in feeds.items()}
        with tf.compat.v1.Session(graph=graph) as session:
            return inputs, session.run(ends, values)


def run_savedmodel(path: Path, inputs: Inputs) -> Arrays:
    """Runs the serving signature of a SavedModel."""
    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    # By the names of the frozen graph, as a serving client expects.
    assert set(serve.structured_input_signature[1]) == set(inputs)
    outputs = serve(
        **{name: tf.constant(array) for name, array in inputs.items()}
    )
    return [output.numpy() for output in outputs.values()]


def run_tflite(path: Path, inputs: Inputs) -> Arrays:
    """Runs a TFLite file."""
    interpreter = tf.lite.Interpreter(str(path))
    interpreter.allocate_tensors()
    for feed in interpreter.get_input_details():
        # TFLite writes prefixes and suffixes around a name.
        (name,) = (name for name in inputs if name in feed["name"])
        interpreter.set_tensor(feed["index"], inputs[name])
    interpreter.invoke()
    return [
        interpreter.get_tensor(output["index"])
        for output in interpreter.get_output_details()
    ]


def run_onnx(path: Path, inputs: Inputs) -> Arrays:
    """Runs an ONNX file."""
    # Only here: TensorFlow alone has to do for the other formats.
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    feeds = {f"{name}:0": array for name, array in inputs.items()}
    return session.run(None, feeds)


def main() -> None:
    """Compares what is in the folder."""
    folder = Path(sys.argv[1])
    (pb,) = folder.glob("*.pb")
    inputs, expected = run_pb(pb)
    results = {
        "pb": expected,
        "savedmodel": run_savedmodel(folder / "saved_model", inputs),
    }
    for path in folder.glob("*.tflite"):
        results["tflite"] = run_tflite(path, inputs)
    for path in folder.glob("*.onnx"):
        results["onnx"] = run_onnx(path, inputs)
    differences = {}
    for name, outputs in results.items():
        pairs = zip(by_shape(outputs), by_shape(expected))
        differences[name] = max(
            difference(output, wanted) for output, wanted in pairs
        )
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
