"""The network and its losses against numbers of the TF1 reference."""

import ast
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import tensorflow as tf

from BlitzNet import anchors, losses, weights
from BlitzNet.layers import ConvolutionNorm, Norm, resize
from BlitzNet.model import Architecture, create_model
from common.npu_config import Runtime

SMALL = Architecture(96, True, 5, 4, n_base_channels=8)


def golden_fill(name: str, shape: tuple) -> np.ndarray:
    """The reference's value of a variable, from its name and shape alone."""
    # The rule by which the golden files were made. crc32, since Python's own
    # hash of a text differs from run to run.
    rng = np.random.RandomState(zlib.crc32(name.encode("utf8")))
    leaf = name.split("/")[-1]
    if leaf == "moving_variance":
        values = 1.0 + 0.5 * rng.uniform(size=shape)
    elif leaf == "gamma":
        values = 1.0 + 0.1 * rng.normal(size=shape)
    elif len(shape) < 2:
        values = 0.1 * rng.normal(size=shape)
    else:
        values = rng.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[:-1]))
    return values.astype(np.float32)


def fill(network: tf.keras.Model) -> None:
    """Gives every variable the reference's value."""
    for name, variable in weights.named_variables(network).items():
        variable.assign(golden_fill(name, tuple(variable.shape)))


def architecture_of(golden: dict[str, np.ndarray]) -> Architecture:
    """What a golden file's variant and names describe."""
    names = [str(name) for name in golden["var_names"]]
    shapes = [ast.literal_eval(str(each)) for each in golden["var_shapes"]]
    shape_of = dict(zip(names, shapes))
    variant = str(golden["variant"])
    return Architecture(
        image_size=int(variant[:3]),
        x4="x4" in variant,
        head=("non" * ("ssd/location/weights" not in names)) + "shared",
        seg_filter_size=shape_of.get("ssd/Conv/weights", [1])[0],
        detect=any(name.startswith("ssd/location") for name in names),
        segment="ssd/Conv/weights" in names,
    )


def forward_goldens(folder: Path) -> list:
    """Files that hold a network's outputs, and their names."""
    found = []
    for path in sorted(folder.glob("golden*.npz")):
        with np.load(path) as golden:
            if "var_names" in golden.files:
                found.append((path.name, dict(golden)))
    return found


def sampled(output: tf.Tensor, name: str, stride: int) -> np.ndarray:
    """What a golden file keeps of an output."""
    output = output.numpy()
    if name == "segmentation":
        return output[:, ::stride, ::stride]
    return output[:, ::stride]


def test_outputs_are_the_reference_s(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Same variables; logits to 1e-4 of their maximum, the same classes."""
    for file, golden in found(forward_goldens(goldens)):
        network = create_model(architecture_of(golden))
        ours = {
            name: tuple(variable.shape)
            for name, variable in weights.named_variables(network).items()
        }
        shapes = [ast.literal_eval(str(each)) for each in golden["var_shapes"]]
        assert ours == dict(zip(golden["var_names"].tolist(), shapes)), file
        trained = int(golden["var_trainable"].sum())
        assert len(network.trainable_variables) == trained
        fill(network)
        rng = np.random.RandomState(int(golden["seed"]))
        images = rng.uniform(0, 255, golden["image_shape"]).astype("f4")
        outputs = network(images / np.float32(255.0), training=False)
        for name, output in outputs.items():
            expected = golden[name]
            full = tuple(golden[f"{name}_full_shape"])
            assert tuple(output.shape) == full
            # Random weights make values of 1e5, so errors are relative.
            error = np.abs(
                sampled(output, name, int(golden[f"{name}_stride"])) - expected
            ).max()
            assert error <= 1e-4 * golden[f"{name}_stats"][2], (file, name)
        for name, key in (
            ("confidence", "conf_argmax"),
            ("segmentation", "seg_argmax"),
        ):
            if key in golden:
                classes = outputs[name].numpy().argmax(-1)
                np.testing.assert_array_equal(classes, golden[key])


def test_size_of_the_default_network() -> None:
    """BlitzNet300 x4: 494 variables, 59 million numbers."""
    network = create_model(Architecture())
    assert network.count_params() == 59_480_175
    assert len(weights.named_variables(network)) == 494
    assert len(weights.kernels(network)) == 112


def targets_of(folder: Path, sets: np.ndarray) -> tuple:
    """Targets of the reference's encoding for some of its sets of boxes."""
    golden = dict(np.load(folder / "encode_golden.npz"))
    classes = np.stack([golden[f"conf_labels_{each}"] for each in sets])
    boxes = np.zeros((*classes.shape, 4), np.float32)
    for row, each in enumerate(sets):
        boxes[row, golden[f"pos_idx_{each}"]] = golden[
            f"loc_targets_pos_{each}"
        ]
    return tf.constant(classes), tf.constant(boxes)


def label_of(rng: np.random.RandomState, count: int) -> tuple:
    """Labels with ignored pixels, drawn as the reference's were."""
    label = rng.randint(0, 21, (count, 75, 75))
    label[rng.uniform(size=label.shape) < 0.1] = 255
    # The reference has <= 21, which would let through what is no class.
    valid = (label < 21).astype(np.float32)
    return tf.constant(np.where(label < 21, label, 0), tf.int32), valid


def check_terms(
    terms: dict[str, tf.Tensor], golden: dict, prefix: str, tolerance: float
) -> None:
    """Compares what both have."""
    for ours, theirs in (
        ("class", "loss_class"),
        ("bbox", "loss_bbox"),
        ("segmentation", "loss_segmentation"),
        ("accuracy", "accuracy_train"),
        ("precision", "metrics_train_precision"),
    ):
        if prefix + theirs in golden:
            np.testing.assert_allclose(
                terms[ours], golden[prefix + theirs], tolerance, err_msg=ours
            )


@pytest.mark.parametrize("case", "ABC")
def test_losses_and_their_gradients(goldens: Path, case: str) -> None:
    """To 1e-5, with objects, without, and with more than one picture."""
    path = goldens / "loss_golden.npz"
    if not path.exists():
        pytest.skip("no loss_golden.npz in --goldens")
    golden = dict(np.load(path))
    sets = golden[f"{case}_sets"]
    rng = np.random.RandomState(int(golden[f"{case}_seed"]))
    count = len(sets)
    location, confidence, logits = (
        tf.constant(rng.normal(size=(count, *shape)), tf.float32)
        for shape in ((45390, 4), (45390, 21), (75, 75, 21))
    )
    labels, valid = label_of(rng, count)
    classes, boxes = targets_of(goldens, sets)
    heads = (location, confidence, logits)
    with tf.GradientTape() as tape:
        tape.watch(heads)
        terms = losses.detection_losses(confidence, location, classes, boxes)
        terms["segmentation"] = losses.segmentation_loss(logits, labels, valid)
        total = terms["class"] + terms["bbox"] + terms["segmentation"]
    np.testing.assert_allclose(total, golden[f"{case}_loss_full"], 1e-5)
    check_terms(terms, golden, f"{case}_", 1e-5)
    for gradient, name in zip(
        tape.gradient(total, heads), ("loc", "conf", "seg")
    ):
        norm = golden[f"{case}_grad_{name}_norm"]
        np.testing.assert_allclose(tf.norm(gradient), norm, 1e-4, 1e-9)


def test_a_training_step(goldens: Path) -> None:
    """Batch statistics: losses, gradients, moving means and variances."""
    path = goldens / "train_golden.npz"
    if not path.exists():
        pytest.skip("no train_golden.npz in --goldens")
    golden = dict(np.load(path))
    network = create_model(Architecture())
    fill(network)
    rng = np.random.RandomState(int(golden["seed"]))
    images = rng.uniform(0, 255, (2, 300, 300, 3)).astype("f4") / 255.0
    labels, valid = label_of(rng, 2)
    classes, boxes = targets_of(goldens, golden["sets"])
    named = weights.named_variables(network)
    with tf.GradientTape() as tape:
        outputs = network(images, training=True)
        terms = losses.detection_losses(
            outputs["confidence"], outputs["location"], classes, boxes
        )
        terms["segmentation"] = losses.segmentation_loss(
            outputs["segmentation"], labels, valid
        )
        decay = losses.weight_decay_loss(weights.kernels(network))
        total = terms["class"] + terms["bbox"] + terms["segmentation"]
        total += 5e-5 * decay
    np.testing.assert_allclose(5e-5 * decay, golden["loss_weight_decay"], 1e-5)
    # Batch norm over two pictures magnifies rounding, TF1's against TF2's.
    np.testing.assert_allclose(total, golden["loss_full"], 2e-3)
    check_terms(terms, golden, "", 2e-3)
    for name in ("location", "confidence", "segmentation"):
        expected = golden[name]
        ours = sampled(outputs[name], name, int(golden[f"{name}_stride"]))
        error = np.linalg.norm(ours - expected)
        assert error <= 2e-3 * np.linalg.norm(expected), name
    for key in golden:
        if key.startswith("moving_after/"):
            variable = named[key[len("moving_after/") :]]
            expected = golden[key]
            error = np.abs(variable.numpy() - expected).max()
            assert error <= 1e-3 * np.abs(expected).max(), key
    names = [str(name) for name in golden["grad_var_names"]]
    gradients = tape.gradient(total, [named[name] for name in names])
    norms = np.array([float(tf.norm(each)) for each in gradients])
    # Deep in the trunk the norms hang on which way a few ReLUs fall.
    np.testing.assert_allclose(norms, golden["grad_norms"], 5e-2)


def test_priors_are_the_reference_s(goldens: Path) -> None:
    """All four variants, unclipped, to the last bit."""
    path = goldens / "prior_boxes.npz"
    if not path.exists():
        pytest.skip("no prior_boxes.npz in --goldens")
    golden = dict(np.load(path))
    stride = int(golden.get("stride", 1))
    for key, expected in golden.items():
        if not key.startswith("tiling_"):
            continue
        variant = key[len("tiling_") :]
        architecture = Architecture(int(variant[:3]), "x4" in variant)
        sizes = golden[f"fm_sizes_{variant}"].tolist()
        assert architecture.map_sizes() == sizes
        ours = anchors.priors(architecture)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours[::stride], expected)


def test_encoding_is_the_reference_s(goldens: Path) -> None:
    """Every prior's class, and the offsets of those that have one."""
    path = goldens / "encode_golden.npz"
    if not path.exists():
        pytest.skip("no encode_golden.npz in --goldens")
    golden = dict(np.load(path))
    prior_boxes = tf.constant(anchors.priors(Architecture()))
    for number in range(4):
        classes, offsets = anchors.encode(
            tf.constant(golden[f"boxes_{number}"]),
            tf.constant(golden[f"labels_{number}"]),
            prior_boxes,
        )
        expected = golden[f"conf_labels_{number}"]
        np.testing.assert_array_equal(classes, expected)
        np.testing.assert_allclose(
            offsets.numpy()[golden[f"pos_idx_{number}"]],
            golden[f"loc_targets_pos_{number}"],
            atol=1e-4,
        )


def test_legacy_resize_samples_from_the_corner() -> None:
    """Pixel i of n comes from i h / n, without half a pixel."""
    ramp = tf.reshape(tf.range(6.0), [1, 6, 1, 1]) * tf.ones([1, 6, 6, 1])
    for size in (4, 9):
        places = np.arange(size) * 6 / size
        bilinear = resize(ramp, [size, 6], "bilinear")[0, :, 0, 0]
        np.testing.assert_allclose(
            bilinear, np.minimum(places, 5.0), atol=1e-5
        )
        nearest = resize(ramp, [size, 6], "nearest")[0, :, 0, 0]
        np.testing.assert_array_equal(nearest, np.floor(places))


def test_frozen_batch_norm_stays() -> None:
    """Moving statistics in training too; gamma and beta are not trained."""
    images = tf.random.stateless_uniform([2, 96, 96, 3], [0, 1])
    network = create_model(SMALL, Norm(frozen=True))
    fill(network)
    before = {
        n: v.numpy() for n, v in weights.named_variables(network).items()
    }
    trained = network(images, training=True)["location"]
    np.testing.assert_array_equal(trained, network(images)["location"])
    after = {n: v.numpy() for n, v in weights.named_variables(network).items()}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    # Kernels and biases: two heads on seven maps, and eight convolutions.
    heads = 2 * (2 * 7 + 8)
    assert (
        len(network.trainable_variables)
        == heads + len(weights.kernels(network)) - heads // 2
    )


def test_batch_norm_over_ranks_is_that_of_the_whole_batch() -> None:
    """Outputs, gradients and moving statistics of a layer, to 1e-5.

    With each rank's features the same, any mean over them is their own.
    """
    features = tf.random.stateless_uniform([3, 5, 7, 4], [0, 1])
    weighting = tf.random.stateless_normal([3, 5, 7, 6], [0, 2])
    results = []
    both = Runtime("cpu", "float32", "", size=2)
    for norm, copies in ((Norm(), 2), (Norm(runtime=both), 1)):
        layer = ConvolutionNorm(6, 3, norm)
        layer(features)  # makes its variables
        layer.kernel.assign(golden_fill("kernel", (3, 3, 4, 6)))
        with tf.GradientTape() as tape:
            output = layer(tf.tile(features, [copies, 1, 1, 1]), training=True)
            loss = tf.reduce_mean(output[:3] * weighting)
            loss += tf.reduce_mean(output[-3:] * weighting)
        sources = [layer.kernel, layer.gamma, layer.beta]
        results.append(
            [
                output[:3],
                *tape.gradient(loss, sources),
                layer.moving_mean,
                layer.moving_variance,
            ]
        )
    for whole, ranks in zip(*results):
        whole, ranks = map(tf.convert_to_tensor, (whole, ranks))
        np.testing.assert_allclose(ranks, whole, atol=1e-5)


@pytest.mark.parametrize("objects", [0, 3])
def test_losses_over_ranks_are_those_of_the_whole_batch(objects: int) -> None:
    """Hard negatives are mined over all ranks; the means are the same."""
    rng = np.random.RandomState(0)
    classes = np.zeros((2, 40), np.int32)
    classes[0, :objects] = 1 + np.arange(objects)
    confidence = rng.normal(size=(2, 40, 4)).astype(np.float32)
    location, boxes = rng.normal(size=(2, 2, 40, 4)).astype(np.float32)
    whole = losses.detection_losses(
        *map(tf.constant, (confidence, location, classes, boxes))
    )
    # The other rank's tensors, in the order in which they are asked for.
    log = [[], []]
    for rank in (0, 1):

        def note(tensors, rank=rank):
            log[rank] += tensors
            return tensors

        ranks = losses.Ranks(note, rank, 2)
        part = slice(rank, rank + 1)
        losses.detection_losses(
            *(
                tf.constant(each[part])
                for each in (confidence, location, classes, boxes)
            ),
            ranks,
        )
    # Counts come first: what is gathered afterwards depends on none of them.
    answers = [(ours + theirs) / 2 for ours, theirs in zip(*log)]
    parts = []
    for rank in (0, 1):
        left = list(answers)
        ranks = losses.Ranks(lambda _, left=left: [left.pop(0)], rank, 2)
        part = slice(rank, rank + 1)
        parts.append(
            losses.detection_losses(
                *(
                    tf.constant(each[part])
                    for each in (confidence, location, classes, boxes)
                ),
                ranks,
            )
        )
    for name in ("class", "bbox", "accuracy"):
        mean = (parts[0][name] + parts[1][name]) / 2.0
        np.testing.assert_allclose(mean, whole[name], rtol=1e-6)
