"""The network and its losses against numbers of the TF1 reference."""

import ast
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import tensorflow as tf

from DeepLabv3plus import losses, weights
from DeepLabv3plus.layers import BatchNorm, Convolution, resize_bilinear
from DeepLabv3plus.model import Shape, create_model, features_size
from DeepLabv3plus.optimizer import FusedMomentum
from DeepLabv3plus.schedule import Schedule

SMALL = Shape(
    num_classes=3, depth_multiplier=0.05, aspp_filters=8, decoder_filters=8
)


def golden_fill(name: str, shape: tuple, tempered: bool) -> np.ndarray:
    """The reference's value of a variable, from its name and shape alone."""
    rng = np.random.RandomState(zlib.crc32(name.encode("utf8")))
    leaf = name.split("/")[-1]
    if leaf == "moving_variance":
        value = 1.0 + 0.5 * rng.uniform(size=shape)
        # Keeps activations from growing through the sixteen middle units.
        last = tempered and "separable_conv3_pointwise" in name
        return (value.astype(np.float32) * (16 if last else 1)).astype("f4")
    if leaf == "gamma":
        return (1.0 + 0.1 * rng.normal(size=shape)).astype(np.float32)
    if len(shape) < 2:
        return (0.1 * rng.normal(size=shape)).astype(np.float32)
    fan_in = np.prod(shape[:2] if "depthwise" in leaf else shape[:-1])
    return (rng.normal(size=shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)


def fill(network: tf.keras.Model, tempered: bool) -> None:
    """Gives every variable the reference's value."""
    for name, variable in weights.named_variables(network).items():
        shape = tuple(variable.shape)
        variable.assign(golden_fill(name, shape, tempered))


def golden_batch(golden: dict[str, np.ndarray]) -> dict[str, tf.Tensor]:
    """The images and labels that a golden file was made from."""
    shape, seed = golden["input_shape"], int(golden["seed"])
    images = np.random.RandomState(seed).uniform(0, 255, shape)
    rng = np.random.RandomState(seed + 1)
    labels = rng.randint(0, 21, (*shape[:3], 1))
    labels[rng.uniform(size=labels.shape) < 0.05] = 255
    labels = labels[..., 0]
    valid = labels != 255
    return {
        "image": tf.constant(images, tf.float32),
        "label": tf.constant(labels * valid, tf.int32),
        "valid": tf.constant(valid, tf.float32),
    }


def golden_files(folder: Path, key: str) -> list:
    """Names and contents of the golden files that hold `key`."""
    found = []
    for path in sorted(folder.glob("golden*.npz")):
        with np.load(path) as golden:
            if key in golden.files:
                found.append((path.name, dict(golden)))
    return found


def network_for(golden: dict[str, np.ndarray]) -> tf.keras.Model:
    """The full network with a golden file's strides, rates and weights."""
    shape = Shape(
        output_stride=int(golden.get("output_stride", 16)),
        atrous_rates=tuple(golden.get("atrous_rates", (6, 12, 18))),
    )
    network, _ = create_model(shape, BatchNorm())
    fill(network, bool(golden["tempered"]))
    return network


def error_of(ours: np.ndarray, golden: np.ndarray) -> float:
    """The largest difference as a share of the largest value."""
    return np.abs(ours - golden).max() / np.abs(golden).max()


def terms(network: tf.keras.Model, batch: dict[str, tf.Tensor]) -> tuple:
    """Logits, cross-entropy and the weight decay's norm of a batch."""
    logits = network(batch["image"], training=True)
    sized = losses.match_sizes(logits, batch["label"], batch["valid"], True)
    named = weights.named_variables(network)
    kernels = [named[name] for name in weights.decayed(list(named))]
    return (
        logits,
        losses.segmentation_loss(*sized),
        losses.weight_decay_loss(kernels),
    )


def trainable(network: tf.keras.Model) -> dict[str, tf.Variable]:
    """The trainable variables by TF1 name."""
    return {
        name: variable
        for name, variable in weights.named_variables(network).items()
        if "/moving_" not in name
    }


def test_logits_losses_and_gradients(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Logits to 1e-4 of their maximum; norms of gradients to 1e-3."""
    for name, golden in found(golden_files(goldens, "logits")):
        network = network_for(golden)
        batch = golden_batch(golden)

        decay = float(golden["weight_decay"])

        def graph(network=network, batch=batch, decay=decay):
            with tf.GradientTape() as tape:
                logits, entropy, norm = terms(network, batch)
                total = entropy + decay * norm
            variables = list(trainable(network).values())
            return logits, entropy, norm, tape.gradient(total, variables)

        logits, entropy, norm, gradients = tf.function(graph)()
        assert error_of(logits, golden["logits"]) < 1e-4, name
        large = resize_bilinear(logits, batch["label"].shape[1:])
        step = int(golden["upsampled_logits_stride"])
        thinned = large.numpy()[:, ::step, ::step]
        assert error_of(thinned, golden["upsampled_logits"]) < 1e-4, name
        same = np.argmax(large, -1) == golden["upsampled_argmax"]
        assert same.mean() > 0.999, name
        np.testing.assert_allclose(entropy, golden["ce_loss"], 1e-4)
        np.testing.assert_allclose(decay * norm, golden["reg_loss"], 1e-5)
        if "grad_l2" in golden:
            assert list(trainable(network)) == list(golden["grad_names"])
            norms = [float(tf.norm(each)) for each in gradients]
            np.testing.assert_allclose(norms, golden["grad_l2"], 1e-3)


def test_variables_are_the_reference_s(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Same names, shapes and order; the same ones trained and decayed."""
    network, _ = create_model(Shape(), BatchNorm())
    ours = weights.named_variables(network)
    for name, golden in found(golden_files(goldens, "var_names")):
        names = list(golden["var_names"])
        assert list(ours) == names, name
        shapes = [ast.literal_eval(str(each)) for each in golden["var_shapes"]]
        assert [tuple(v.shape) for v in ours.values()] == shapes, name
        trained = [n for n, t in zip(names, golden["trainable"]) if t]
        assert list(trainable(network)) == trained, name
        decayed = [n for n, r in zip(names, golden["l2_regularized"]) if r]
        assert weights.decayed(names) == decayed, name
    assert len(network.trainable_variables) == 440
    assert network.count_params() == 41_258_213
