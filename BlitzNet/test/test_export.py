"""What the exports need beyond those of the contract's small network."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from BlitzNet import export, layers


def test_onnx_keeps_the_sizes_of_300_pixels(tmp_path: Path) -> None:
    """Maps of 3, 5, 10, 19, 38 and 75 pixels: no resize is by a whole."""
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")

    def upsample(image: tf.Tensor) -> dict[str, tf.Tensor]:
        nearest = bilinear = image
        for side in (5, 10, 19, 38, 75):
            # Joined with a map that has the right size, as in the network.
            skip = tf.ones([1, side, side, 1])
            nearest, bilinear = (
                tf.concat([layers.resize(each, [side, side], method), skip], 3)
                for each, method in (
                    (nearest, "nearest"),
                    (bilinear, "bilinear"),
                )
            )
        # Twice from the same map: the two resizes share their scales.
        again = layers.resize(image, [5, 5], "nearest")
        return {
            "nearest": tf.identity(nearest, "nearest"),
            "bilinear": tf.identity(bilinear, "bilinear"),
            "again": tf.identity(again, "again"),
        }

    graph = export.Graph(upsample, None, (1, 3, 3, 2), any_batch=True)
    outputs = export.export_onnx(graph, str(tmp_path))
    assert outputs["nearest"].shape == (1, 75, 75, 7)
    np.testing.assert_array_equal(
        outputs["nearest"], graph.expected["nearest"]
    )
    assert export.difference(outputs, graph.expected) <= export.TOLERANCE
