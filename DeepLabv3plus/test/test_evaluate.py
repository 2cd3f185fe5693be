"""Evaluation over ranks, at any size and several scales."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import UserError
from DeepLabv3plus import (
    augment,
    dataset,
    evaluate,
    metrics,
    options,
    sample_data,
    segment,
)
from DeepLabv3plus.layers import BatchNorm, resize_bilinear
from DeepLabv3plus.model import Shape, create_model

CLASSES = 5
RECIPE = augment.Recipe("none", 65, 81, 255)
PLAN = segment.Plan((65, 81), 4, (1.0,), False, RECIPE)
SHAPE = Shape(
    num_classes=CLASSES,
    depth_multiplier=0.05,
    aspp_filters=8,
    decoder_filters=8,
    initializer="fan_in",
)


class Runtime:
    """One of several ranks; keeps what it is asked to reduce."""

    def __init__(self, size: int = 1) -> None:
        self.rank, self.size = 0, size

    def all_reduce(self, tensors: list) -> list:
        """Adds what another rank might have seen."""
        # HCCL fails or hangs where ranks reduce tensors of unequal shapes.
        self.reduced = [tuple(tensor.shape) for tensor in tensors]
        return [tensor + 1.0 for tensor in tensors]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Three pictures larger than the crop."""
    path = str(tmp_path_factory.mktemp("shapes"))
    sample_data.draw(path, count=3, height=96, width=100)
    values = {
        "data_path": path,
        "label_folder": None,
        "num_classes": CLASSES,
        "ignore_label": 255,
    }
    return evaluate.read_split(values, "train")


@pytest.fixture(scope="module")
def network() -> tf.keras.Model:
    """A narrow network whose classifier has an opinion."""
    tf.random.set_seed(0)
    network, _ = create_model(SHAPE, BatchNorm())
    layer = network.get_layer("logits.semantic")
    rng = np.random.RandomState(0)
    # With its initial spread of 0.01 all classes are nearly level.
    layer.kernel.assign(rng.normal(size=layer.kernel.shape))
    return network


def test_a_rank_without_pictures_takes_part_in_the_sum(
    network: tf.keras.Model, pairs: list
) -> None:
    """Four ranks and three pictures: one has none, and nobody waits."""
    segmenter = segment.Segmenter(network, PLAN)
    shapes = []
    for rank, count in ((0, 1), (3, 0)):
        runtime = Runtime(4)
        data = dataset.evaluation_batches(pairs, 255, rank, 4)
        _, rows = evaluate.evaluate(segmenter, CLASSES, data, runtime)
        assert len(rows) == count
        shapes.append(runtime.reduced)
    assert shapes[0] == shapes[1] and len(shapes[0]) == 2


def test_figures_refer_to_the_labels_own_pixels(
    network: tf.keras.Model, pairs: list, tmp_path: Path
) -> None:
    """Every pixel but the void counts once, windows overlapping or not."""
    segmenter = segment.Segmenter(network, PLAN)
    data = dataset.evaluation_batches(pairs, 255)
    confusion, valid = 0.0, 0
    for batch in data:
        probabilities = segmenter(batch["image"][0].numpy())
        sample = {name: value[0].numpy() for name, value in batch.items()}
        totals = metrics.picture_totals(
            probabilities, sample["label"], sample["valid"]
        )
        confusion = confusion + totals["confusion"]
        valid += int(sample["valid"].sum())
    assert confusion.sum() == valid < 3 * 96 * 100
    table, rows = evaluate.evaluate(segmenter, CLASSES, data, Runtime())
    hits = np.diag(confusion)
    unions = confusion.sum(0) + confusion.sum(1) - hits
    expected = (hits / np.maximum(unions, 1))[unions > 0].mean()
    assert table["mean_iou"] == pytest.approx(expected)
    evaluate.save_sheet(str(tmp_path / "a" / "sheet.png"), rows)
    assert (tmp_path / "a" / "sheet.png").stat().st_size > 0


def softmax_at(network: tf.keras.Model, images: tf.Tensor) -> np.ndarray:
    """Probabilities at the size of the images, in one pass."""
    logits = resize_bilinear(network(images), images.shape[1:3])
    return tf.nn.softmax(logits).numpy()


def test_small_pictures_are_padded(network: tf.keras.Model) -> None:
    """With mean grey, at the bottom and on the right."""
    picture = np.random.RandomState(0).uniform(0, 255, (40, 50, 3))
    padded = np.full((1, 65, 81, 3), 127.5, np.float32)
    padded[0, :40, :50] = picture
    expected = softmax_at(network, tf.constant(padded))[0, :40, :50]
    ours = segment.Segmenter(network, PLAN)(picture)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_crop_slides_over_large_pictures(
    network: tf.keras.Model,
) -> None:
    """Windows overlap and cover everything; their means are taken."""
    assert segment.window_starts(40, 65) == [0]
    assert segment.window_starts(65, 65) == [0]
    assert segment.window_starts(66, 65) == [0, 1]
    for side in (100, 200, 513):
        starts = segment.window_starts(side, 65)
        assert starts[0] == 0 and starts[-1] == side - 65
        # 65 less the third that neighbours share.
        assert max(np.diff(starts)) <= 44
    picture = np.random.RandomState(0).uniform(0, 255, (65, 100, 3))
    expected, counts = np.zeros((65, 100, CLASSES)), np.zeros((100, 1))
    for left in (0, 19):
        part = tf.constant(picture[np.newaxis, :, left : left + 81], "float32")
        expected[:, left : left + 81] += softmax_at(network, part)[0]
        counts[left : left + 81] += 1
    ours = segment.Segmenter(network, PLAN)(picture)
    np.testing.assert_allclose(ours, expected / counts, atol=1e-5)


def test_scales_and_flips_average_probabilities(
    network: tf.keras.Model,
) -> None:
    """By the reference's sizes; no softmax is taken twice."""
    rng = np.random.RandomState(0)
    images = tf.constant(rng.uniform(0, 255, (1, 65, 81, 3)), tf.float32)
    plan = PLAN._replace(scales=(0.75, 1.0, 1.25), mirrored=True)
    ours = segment.average_probabilities(network, images, plan)
    parts = []
    # Side (n - 1) s + 1, cut off; logits are not taken below scale 1.
    for size, small in (
        ((49, 61), (17, 21)),
        ((65, 81), (17, 21)),
        ((81, 101), (21, 26)),
    ):
        scaled = resize_bilinear(images, size)
        for step in (1, -1):
            logits = resize_bilinear(network(scaled[:, :, ::step]), small)
            logits = resize_bilinear(logits[:, :, ::step], (65, 81))
            parts.append(tf.nn.softmax(logits))
    np.testing.assert_allclose(ours, np.mean(parts, 0), atol=1e-5)
    np.testing.assert_allclose(tf.reduce_sum(ours, -1), 1.0, atol=1e-5)


def test_a_range_of_sizes_holds_for_prediction_too(
    network: tf.keras.Model,
) -> None:
    """The network sees the size of training, the caller his own."""
    recipe = RECIPE._replace(min_resize=60, max_resize=80)
    segmenter = segment.Segmenter(network, PLAN._replace(recipe=recipe))
    picture = np.random.RandomState(0).uniform(0, 255, (30, 36, 3))
    ours = segmenter(picture)
    assert ours.shape == (30, 36, CLASSES)
    seen = augment.resize_image(tf.constant(picture), [60, 72]).numpy()
    expected = augment.resize_image(segmenter._slide(seen), [30, 36])
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_scales_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is named."""
    for wrong in (["a"], [], ["9"], ["1", "0"]):
        given = SimpleNamespace(scales=wrong)
        monkeypatch.setattr(evaluate, "FLAGS", given)
        with pytest.raises(UserError, match="--scales=.*: numbers of 0.1..4"):
            evaluate.read_scales()


def test_what_seldom_works_is_told() -> None:
    """Small batches, frozen random weights, rates wider than the features."""

    def told(**given) -> list[str]:
        values = {
            "fine_tune_batch_norm": True,
            "init_checkpoint": None,
            "eval_crop_size": None,
            **given,
        }
        batch = values.pop("batch", 8)
        size = values.pop("size", (257, 257))
        return options.warnings(values, batch, size, Shape())

    assert told() == []
    assert told(eval_crop_size="361,481", size=(513, 513)) == []
    (rates,) = told(eval_crop_size="361,481")
    assert rates.startswith("rates [18] of the pyramid reach beyond the 17x17")
    (small,) = told(batch=7)
    assert small.startswith("batch norm is trained on 7 pictures a step")
    (frozen,) = told(fine_tune_batch_norm=False)
    assert frozen.startswith("batch norm is frozen")
    assert told(fine_tune_batch_norm=False, init_checkpoint="a") == []
