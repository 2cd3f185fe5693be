"""The network and its losses against numbers of the TF1 reference."""

import ast
import functools
import zlib
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import Runtime
from DeepLabv3plus import losses, weights
from DeepLabv3plus.layers import BatchNorm, Convolution, resize_bilinear
from DeepLabv3plus.model import Shape, create_model, features_size
from DeepLabv3plus.optimizer import FusedMomentum
from DeepLabv3plus.schedule import Schedule

SMALL = Shape(
    num_classes=3,
    depth_multiplier=0.05,
    aspp_filters=8,
    decoder_filters=8,
    initializer="fan_in",
)


def golden_fill(name: str, shape: tuple, tempered: bool) -> np.ndarray:
    """The reference's value of a variable, from its name and shape alone."""
    # The rule by which the golden files were made. crc32, since Python's own
    # hash of a text differs from run to run.
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


def test_logits_losses_and_gradients(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Logits to 1e-4 of their maximum; norms of gradients to 1e-3."""
    for name, golden in found(golden_files(goldens, "upsampled_logits")):
        network = network_for(golden)
        batch = golden_batch(golden)

        decay = float(golden["weight_decay"])

        def graph(network=network, batch=batch, decay=decay):
            with tf.GradientTape() as tape:
                logits, entropy, norm = terms(network, batch)
                total = entropy + decay * norm
            variables = list(weights.trainable_variables(network).values())
            return logits, entropy, norm, tape.gradient(total, variables)

        logits, entropy, norm, gradients = tf.function(graph)()
        # Noise is 5e-6 here, a wrong epsilon 2e-3 in the tempered files.
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
            assert list(weights.trainable_variables(network)) == list(
                golden["grad_names"]
            )
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
        assert list(weights.trainable_variables(network)) == trained, name
        decayed = [n for n, r in zip(names, golden["l2_regularized"]) if r]
        assert weights.decayed(names) == decayed, name
    assert len(network.trainable_variables) == 440
    assert network.count_params() == 41_258_213


def step_along(
    network: tf.keras.Model,
    batch: dict[str, tf.Tensor],
    optimizer: FusedMomentum,
    factors: list[float],
    decay: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One step of training; cross-entropy and the norm before it."""
    variables = list(weights.trainable_variables(network).values())
    with tf.GradientTape() as tape:
        _, entropy, norm = terms(network, batch)
        total = entropy + decay * norm
    gradients = tape.gradient(total, variables)
    scaled = [each * factor for each, factor in zip(gradients, factors)]
    optimizer.apply_gradients(zip(scaled, variables))
    return entropy, norm


def test_three_steps_of_training(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Losses and rates before each step; variables after three of them."""
    for name, golden in found(golden_files(goldens, "after_names")):
        network = network_for(golden)
        batch = golden_batch(golden)
        named = weights.trainable_variables(network)
        variables = list(named.values())
        rates = Schedule(
            "poly", float(golden["base_lr"]), int(golden["total_steps"])
        )
        optimizer = FusedMomentum(rates, float(golden["momentum"]))
        # Keras 2.6 has no build(): it makes the slots in the first step.
        getattr(optimizer, "build", lambda _: None)(variables)
        factors = weights.gradient_multipliers(named)
        decay = float(golden["weight_decay"])

        step = tf.function(
            functools.partial(
                step_along, network, batch, optimizer, factors, decay
            )
        )
        for number in range(3):
            np.testing.assert_allclose(rates(number), golden["lr"][number])
            entropy, norm = step()
            np.testing.assert_allclose(entropy, golden["ce"][number], 1e-5)
            np.testing.assert_allclose(
                decay * norm, golden["reg"][number], 1e-5
            )
        _, entropy, norm = terms(network, batch)
        np.testing.assert_allclose(entropy, golden["ce"][3], 1e-5)
        for each in map(str, golden["after_names"]):
            after = golden["after/" + each.replace("/", "|")]
            ours = named[each].numpy().ravel()[: after.size]
            assert error_of(ours, after) < 1e-5, f"{name} {each}"
        for each, factor in zip(
            golden["multiplier_names"], golden["multipliers"]
        ):
            if str(each) in named:
                assert weights.gradient_multipliers([str(each)]) == [factor]


LOSS_VARIANTS = {
    "default": {},
    "no_upsample": {"upsample": False},
    "label_weights": {"weighted": True},
    "topk25": {"mining": losses.Mining(0.25)},
    "topk25_step100_at30": {"mining": losses.Mining(0.25, 100)},
    "topk25_label_weights": {"mining": losses.Mining(0.25), "weighted": True},
    "all_ignored": {"ignored": True},
}


def golden_loss(
    golden: dict[str, np.ndarray],
    upsample: bool = True,
    weighted: bool = False,
    mining: Optional[losses.Mining] = None,
    ignored: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss and its gradient for a variant of a golden file."""
    rng = np.random.RandomState(int(golden["logits_seed"]))
    logits = tf.constant(3.0 * rng.normal(size=(2, 9, 11, 5)), tf.float32)
    rng = np.random.RandomState(int(golden["label_seed"]))
    labels = rng.randint(0, 5, (2, 33, 41, 1))
    labels[rng.uniform(size=labels.shape) < 0.1] = 255
    valid = (labels[..., 0] != 255) * (not ignored)
    assert ignored or (valid == 0).sum() == golden["ignore_count"]
    with tf.GradientTape() as tape:
        tape.watch(logits)
        sized = losses.match_sizes(
            logits,
            tf.constant(labels[..., 0] * valid, tf.int32),
            tf.constant(valid, tf.float32),
            upsample,
        )
        loss = losses.segmentation_loss(
            *sized,
            [float(each) for each in golden["label_weights"] if weighted],
            mining and mining.share_at(tf.constant(30)),
        )
    return loss, tape.gradient(loss, logits)


@pytest.mark.parametrize("variant", LOSS_VARIANTS)
def test_losses_and_gradients(
    goldens: Path, found: Callable[[list], list], variant: str
) -> None:
    """Upsampling, class weights, mining, and nothing that counts."""
    for name, golden in found(golden_files(goldens, f"loss_{variant}")):
        loss, gradient = golden_loss(golden, **LOSS_VARIANTS[variant])
        expected = golden[f"loss_{variant}"]
        np.testing.assert_allclose(loss, expected, 1e-5, err_msg=name)
        np.testing.assert_allclose(
            gradient, golden[f"grad_{variant}"], atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize(
    ("key", "schedule"),
    [
        ("lr_1p", Schedule("poly", 1e-4, 300000)),
        ("lr_8p", Schedule("poly", 8e-4, 32500)),
        ("lr_slow5", Schedule("poly", 1e-3, 20, 0.9, 5, 2e-4)),
        ("lr_step", Schedule("step", 1e-3, 300000)),
    ],
)
def test_learning_rates(
    goldens: Path, found: Callable[[list], list], key: str, schedule: Schedule
) -> None:
    """The seed's runs on one device and on eight, and slow starts."""
    for _, golden in found(golden_files(goldens, key)):
        ours = [float(schedule(int(step))) for step in golden["lr_steps"]]
        np.testing.assert_allclose(ours, golden[key], 1e-4, atol=1e-12)


@pytest.mark.parametrize("size", [(65, 81), (70, 97), (33, 129)])
@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        SMALL._replace(output_stride=8, atrous_rates=(12, 24)),
        SMALL._replace(decoder_stride=8),
        SMALL._replace(decoder_stride=0),
        SMALL._replace(variant="xception_41"),
        SMALL._replace(
            variant="mobilenet_v2", decoder_stride=0, atrous_rates=()
        ),
        SMALL._replace(
            variant="mobilenet_v2",
            decoder_stride=0,
            atrous_rates=(),
            output_stride=8,
        ),
    ],
)
def test_any_size_and_the_trainer(shape: Shape, size: tuple) -> None:
    """Sizes are rounded up; the trainer with masks of ones is the network."""
    network, trainer = create_model(shape, BatchNorm(), dropout=0.0)
    fill(network, tempered=True)
    rng = np.random.RandomState(0)
    images = tf.constant(rng.uniform(0, 255, (2, *size, 3)), tf.float32)
    logits = network(images)
    sides = [-(-side // shape.logits_stride) for side in size]
    assert logits.shape == (2, *sides, 3) and logits.dtype == tf.float32
    masks = tf.ones([2, *features_size(*size, shape)], tf.uint8)
    np.testing.assert_array_equal(trainer([images, masks]), logits)
    dropped = trainer([images, 0 * masks])
    assert np.abs(dropped - logits).max() > 0.0


def test_mobilenet_v2_is_the_model_zoo_s() -> None:
    """Its names, strides and the number of parameters of its backbone."""
    shape = Shape("mobilenet_v2", decoder_stride=0, atrous_rates=())
    network, _ = create_model(shape, BatchNorm())
    named = weights.named_variables(network)
    shapes = {name: tuple(each.shape) for name, each in named.items()}
    assert shapes["MobilenetV2/Conv/weights"] == (3, 3, 3, 32)
    first = "MobilenetV2/expanded_conv/depthwise/depthwise_weights"
    assert shapes[first] == (3, 3, 32, 1)
    last = "MobilenetV2/expanded_conv_16/project/weights"
    assert shapes[last] == (1, 1, 960, 320)
    assert shapes["concat_projection/weights"] == (1, 1, 512, 256)
    # Keras' MobileNetV2 without its last convolution of 1280 channels.
    keras = tf.keras.applications.MobileNetV2(include_top=False, weights=None)
    last_two = 320 * 1280 + 4 * 1280
    backbone = [n for n in named if n.startswith("MobilenetV2/")]
    count = sum(np.prod(shapes[name]) for name in backbone)
    assert count == keras.count_params() - last_two
    # Its last bottleneck has the same place in the network.
    layer = network.get_layer("MobilenetV2.expanded_conv_16.project")
    assert layer.compute_output_shape((1, 33, 33, 960)) == (1, 33, 33, 320)


def normalized(norm: BatchNorm) -> tuple[Convolution, tf.Tensor, tf.Tensor]:
    """A pointwise convolution that passes features on to its batch norm."""
    layer = Convolution(4, 1, norm, tf.keras.initializers.Zeros())
    features = tf.random.stateless_normal([3, 5, 6, 4], [0, 1])
    layer(features)
    layer.kernel.assign(np.eye(4)[np.newaxis, np.newaxis])
    layer.moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    layer.moving_variance.assign([4.0, 3.0, 2.0, 1.0])
    layer.gamma.assign([1.0, 0.5, 2.0, 1.0])
    layer.beta.assign([0.0, 1.0, 0.0, -1.0])
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    expected = (features - mean) / np.sqrt(variance + 1e-3)
    return layer, features, expected * layer.gamma.numpy() + layer.beta.numpy()


def test_frozen_batch_norm_neither_moves_nor_uses_the_batch() -> None:
    """Whatever `training` says, alone and in a model; gamma and beta learn."""
    layer, features, expected = normalized(BatchNorm(trained=False))
    inputs = tf.keras.Input((5, 6, 4))
    model = tf.keras.Model(inputs, layer(inputs, training=False))
    before = [v.numpy() for v in (layer.moving_mean, layer.moving_variance)]
    for call in (layer, model, tf.function(model)):
        for training in (False, True):
            with tf.GradientTape() as tape:
                ours = call(features, training=training)
            np.testing.assert_allclose(ours, expected, atol=1e-5)
    gradients = tape.gradient(
        tf.reduce_sum(ours**2), model.trainable_variables
    )
    assert len(gradients) == 3
    after = [v.numpy() for v in (layer.moving_mean, layer.moving_variance)]
    np.testing.assert_array_equal(before, after)


def test_trained_batch_norm_uses_and_collects_the_batch() -> None:
    """In training alone; the variance is collected without bias."""
    layer, features, expected = normalized(BatchNorm(True, decay=0.75))
    inputs = tf.keras.Input((5, 6, 4))
    model = tf.keras.Model(inputs, layer(inputs))
    ours = model(features, training=False)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    ours = model(features, training=True).numpy()
    np.testing.assert_allclose(ours.mean((0, 1, 2)), layer.beta, atol=1e-5)
    flat = features.numpy().reshape(-1, 4)
    np.testing.assert_allclose(
        layer.moving_mean,
        0.75 * np.array([1.0, 2.0, 3.0, 4.0]) + 0.25 * flat.mean(0),
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        layer.moving_variance,
        0.75 * np.array([4.0, 3.0, 2.0, 1.0]) + 0.25 * flat.var(0, ddof=1),
        rtol=1e-4,
    )


def test_batch_norm_over_ranks_is_that_of_the_whole_batch() -> None:
    """Two ranks with equal shares have the statistics of one rank."""
    layer, features, _ = normalized(BatchNorm(True, 0.75))
    alone = layer(features, training=True)
    norm = BatchNorm(True, 0.75, Runtime("cpu", "float32", "", size=2))
    both, _, _ = normalized(norm)
    # Both have the same share here, so that the mean over ranks is its own.
    twice = both(features, training=True)
    np.testing.assert_allclose(twice, alone, atol=1e-5)
    np.testing.assert_allclose(both.moving_mean, layer.moving_mean, 1e-5)
    pixels = 2 * 3 * 5 * 6
    flat = features.numpy().reshape(-1, 4)
    expected = flat.var(0) * pixels / (pixels - 1)
    np.testing.assert_allclose(
        both.moving_variance,
        0.75 * np.array([4.0, 3.0, 2.0, 1.0]) + 0.25 * expected,
        rtol=1e-4,
    )
