"""The network and its losses against numbers of the TF1 reference."""

import ast
import zlib
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import pytest
import tensorflow as tf

from BiSeNet import losses, weights
from BiSeNet.backbones import FRONTENDS
from BiSeNet.layers import BatchNorm, Upsample
from BiSeNet.model import HEADS, create_model
from common.npu_config import Runtime

MOMENTS = ("moving_mean", "moving_variance")


def golden_fill(name: str, shape: tuple, scale: float) -> np.ndarray:
    """The reference's value of a variable, from its name and shape alone."""
    # Golden files were made by this rule: changed, it fails them all.
    rng = np.random.RandomState(zlib.crc32(name.encode("utf8")))
    leaf = name.split("/")[-1]
    if leaf == "moving_variance":
        return (1.0 + 0.5 * rng.uniform(size=shape)).astype(np.float32)
    if leaf == "gamma":
        return (1.0 + 0.1 * rng.normal(size=shape)).astype(np.float32)
    if len(shape) < 2:
        return (0.1 * rng.normal(size=shape)).astype(np.float32)
    inputs = shape[:2] if leaf == "depthwise_weights" else shape[:-1]
    spread = scale * np.sqrt(2.0 / np.prod(inputs))
    return (rng.normal(size=shape) * spread).astype(np.float32)


def fill(model: tf.keras.Model, scale: float = 1.0) -> None:
    """Gives every variable the reference's value."""
    for name, variable in weights.named_variables(model).items():
        variable.assign(golden_fill(name, tuple(variable.shape), scale))


def golden_files(folder: Path, key: str = "logits") -> list:
    """Golden files that hold `key`."""
    found = []
    for path in sorted(folder.glob("golden*.npz")):
        with np.load(path) as golden:
            if key in golden.files:
                found.append((path.name, dict(golden)))
    return found


def reference(
    golden: dict[str, np.ndarray], runtime: Optional[Runtime] = None
) -> tf.keras.Model:
    """The reference's network of a golden file, filled."""
    classes, frontend = int(golden["num_classes"]), str(golden["frontend"])
    _, trainer = create_model(classes, frontend, "reference", runtime=runtime)
    fill(trainer, float(golden["weight_scale"]))
    return trainer


def drawn(
    seed: np.ndarray, label_seed: np.ndarray, shape: np.ndarray, classes: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The images and labels that a golden file was made from."""
    images = np.random.RandomState(int(seed)).uniform(0, 255, shape)
    rng = np.random.RandomState(int(label_seed))
    labels = rng.randint(0, classes, shape[:3])
    return tf.constant(images, tf.float32), tf.constant(labels, tf.int32)


def loss_terms(
    trainer: tf.keras.Model,
    frontend: str,
    outputs: list[tf.Tensor],
    labels: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """The terms of the reference's loss, by the names of golden files."""
    ones = tf.ones(labels.shape)
    terms = losses.segmentation_losses(outputs, labels, ones)
    kernels = weights.decayed_kernels(trainer, frontend, "reference")
    decay = FRONTENDS[frontend].weight_decay
    decay *= losses.weight_decay_loss(kernels)
    return {
        **{head: terms[f"{head}_loss"] for head in HEADS},
        "reg": decay,
        "total": terms["total_loss"] + decay,
    }


def off(ours: tf.Tensor, theirs: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_logits_and_losses(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Names, shapes, three heads to 1e-4 of their maximum, losses too."""
    for name, golden in found(golden_files(goldens)):
        trainer = reference(golden)
        ours = weights.named_variables(trainer)
        theirs = dict(
            zip(map(str, golden["var_names"]), map(str, golden["var_shapes"]))
        )
        shapes = {each: tuple(value.shape) for each, value in ours.items()}
        assert shapes == {
            each: ast.literal_eval(shape) for each, shape in theirs.items()
        }, name
        images, labels = drawn(
            golden["input_seed"],
            golden["label_seed"],
            golden["input_shape"],
            int(golden["num_classes"]),
        )
        outputs = trainer(images, training=False)
        for key, output in zip(("logits", "sup1", "sup2"), outputs):
            auxiliary = key != "logits"
            step = int(golden["aux_stride" if auxiliary else "main_stride"])
            assert off(output[:, ::step, ::step], golden[key]) <= 1e-4, name
        if "argmax" in golden:
            same = np.argmax(outputs[0], -1) == golden["argmax"]
            assert same.mean() > 0.999, name
        terms = loss_terms(trainer, str(golden["frontend"]), outputs, labels)
        for key, term in terms.items():
            np.testing.assert_allclose(
                term, golden[f"eval_loss_{key}"], 1e-4, err_msg=f"{name} {key}"
            )


def equal_ranks(size: int) -> Runtime:
    """Ranks that all see the same, so that a mean over them is their own."""
    return Runtime("cpu", "float32", "", size=size)


@pytest.mark.parametrize("over_ranks", [False, True])
def test_training_mode(
    goldens: Path, found: Callable[[list], list], over_ranks: bool
) -> None:
    """Losses and moving averages of a step; logits and gradients too.

    Batch norms over the means of two pictures are ill-conditioned: the
    rounding of TensorFlow's fused kernel alone moves logits by 1e-3 of their
    maximum and gradients by 3e-2, which is all that is allowed. So these are
    compared with batch norms in two passes, as several ranks compute them.
    """
    for name, golden in found(golden_files(goldens, "train_logits")):
        trainer = reference(golden, equal_ranks(1) if over_ranks else None)
        images, labels = drawn(
            golden["train_seed"],
            golden["train_label_seed"],
            golden["train_shape"],
            int(golden["num_classes"]),
        )
        named = weights.named_variables(trainer)
        sources = [named[str(each)] for each in golden["train_grad_names"]]
        with tf.GradientTape() as tape:
            outputs = trainer(images, training=True)
            terms = loss_terms(
                trainer, str(golden["frontend"]), outputs, labels
            )
        gradients = tape.gradient(terms["total"], sources)
        for key, term in terms.items():
            np.testing.assert_allclose(
                term, golden[f"train_loss_{key}"], 1e-4, err_msg=name
            )
        sums = [
            named[str(each)].numpy().sum()
            for each in golden["train_moving_names"]
        ]
        theirs = golden["train_moving_sum_after"]
        assert off(np.array(sums), theirs) <= 1e-5, name
        if not over_ranks:
            continue
        for key, output in zip(("logits", "sup1", "sup2"), outputs):
            auxiliary = key != "logits"
            step = int(
                golden["train_aux_stride" if auxiliary else "train_stride"]
            )
            theirs = golden[f"train_{key}"]
            assert off(output[:, ::step, ::step], theirs) <= 1e-3, name
        norms = [float(tf.norm(gradient)) for gradient in gradients]
        assert off(np.array(norms), golden["train_grad_l2"]) <= 3e-2, name


# Trainable parameters: torchvision's ResNet18 without its classifier; Keras'
# MobileNetV2 likewise, less the four layers after the last map that is used;
# the whole network with slim's ResNet101, as counted in the reference.
COUNTS = {
    "ResNet18": 11_689_512 - 513_000,
    "MobileNetV2": 2_223_872 - 2 * 320_000 - 473_920 - 412_160,
    "ResNet101": 47_373_248 - 4_844_352,
}


@pytest.mark.parametrize("frontend", list(COUNTS))
def test_other_frontends(frontend: str) -> None:
    """As many parameters as others count, and maps that fit together."""
    _, trainer = create_model(32, frontend, "reference")
    scope = FRONTENDS[frontend].scope
    named = weights.named_variables(trainer)
    own = [
        int(np.prod(variable.shape))
        for name, variable in named.items()
        if name.startswith(scope) and not name.endswith(MOMENTS)
    ]
    assert sum(own) == COUNTS[frontend]
    outputs = trainer(tf.zeros([1, 64, 96, 3]))
    assert [tuple(each.shape) for each in outputs] == [(1, 64, 96, 32)] * 3


@pytest.mark.parametrize("size", [(75, 107), (64, 32), (97, 64)])
def test_any_size(size: tuple[int, int]) -> None:
    """Odd and portrait sizes are padded within and cut again."""
    network, trainer = create_model(5, compat="paper")
    fill(trainer, 0.8)
    rng = np.random.RandomState(0)
    images = rng.uniform(0, 255, (2, *size, 3)).astype(np.float32)
    logits = network(images)
    assert logits.shape == (2, *size, 5) and logits.dtype == tf.float32
    height, width = (-side % 32 for side in size)
    padded = np.pad(images, ((0, 0), (0, height), (0, width), (0, 0)))
    whole = network(padded)[:, : size[0], : size[1]]
    np.testing.assert_allclose(logits, whole, atol=1e-5)
    np.testing.assert_array_equal(trainer(images)[0], logits)
    # Unknown sizes are known only when the graph runs.
    spec = tf.TensorSpec([2, None, None, 3], tf.float32)
    np.testing.assert_allclose(
        tf.function(network, [spec])(images), logits, atol=1e-5
    )


def test_the_paper_s_form_mends_the_reference() -> None:
    """Gammas that start silent, whole gates, no shift of the picture."""
    forms = {}
    for compat in ("paper", "reference"):
        network, trainer = create_model(4, compat=compat)
        named = weights.named_variables(trainer)
        forms[compat] = {
            name for name in named if name.startswith("xception39")
        }
        relus = sum(
            isinstance(layer, tf.keras.layers.ReLU) for layer in network.layers
        )
        forms[f"{compat} relus"] = relus
        if compat == "paper":
            silent = named["xception39/stage1/block2/BatchNorm_2/gamma"]
            np.testing.assert_array_equal(silent, np.zeros(64))
    gammas = forms["paper"] - forms["reference"]
    assert len(gammas) == 52
    assert all(name.endswith("/gamma") for name in gammas)
    # Three gates of attention and fusion.
    assert forms["reference relus"] - forms["paper relus"] == 3
    ramp = tf.reshape(tf.range(4.0), [1, 1, 4, 1])
    centred, shifted = (
        Upsample(2, half_pixel)(ramp)[0, 0, :, 0]
        for half_pixel in (True, False)
    )
    np.testing.assert_allclose(
        centred, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    )
    np.testing.assert_allclose(shifted, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_over_ranks_is_that_of_the_whole_batch(
    training: bool,
) -> None:
    """Features, moments and gradients, with half of the batch doubled."""
    features = tf.random.stateless_normal(
        [2, 3, 4, 5], [0, 1], dtype="float32"
    )
    results = []
    runtime: Optional[Runtime]
    for runtime, batch in (
        (None, tf.concat([features, features], 0)),
        (equal_ranks(2), features),
    ):
        layer = BatchNorm(runtime=runtime)
        layer.build(batch.shape)
        with tf.GradientTape() as tape:
            tape.watch(batch)
            normed = layer(batch, training=training)
            loss = tf.reduce_mean(tf.square(normed) * tf.sin(normed))
        gradient = tape.gradient(loss, layer.gamma)
        moments = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
        results.append((normed[:2].numpy(), gradient.numpy(), *moments))
    for alone, joined in zip(*results):
        np.testing.assert_allclose(joined, alone, rtol=1e-4, atol=1e-6)
