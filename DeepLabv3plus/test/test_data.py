"""Scaling, cropping and the stream of samples."""

from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import tensorflow as tf

from common.npu_config import UserError
from DeepLabv3plus import (
    augment,
    dataset,
    evaluate,
    metrics,
    sample_data,
    visuals,
)
from DeepLabv3plus.augment import Recipe

# Sides that differ, since exchanged axes would go unseen in a square.
RECIPE = Recipe("reference", 65, 81, 255)
PLAIN = RECIPE._replace(kind="none")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Five pictures as read from disk."""
    path = str(tmp_path_factory.mktemp("shapes"))
    sample_data.draw(path, count=5, height=70, width=90)
    values = {
        "data_path": path,
        "label_folder": None,
        "num_classes": 5,
        "ignore_label": 255,
    }
    return evaluate.read_split(values, "train")


def preprocessing_goldens(folder: Path) -> list[dict[str, np.ndarray]]:
    """Golden files of the preprocessing."""
    paths = sorted(folder.glob("golden_preproc*.npz"))
    return [dict(np.load(path)) for path in paths]


def test_scaling_is_the_reference_s(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """All seven scales; sizes are cut down to whole pixels."""
    for golden in found(preprocessing_goldens(goldens)):
        image, label = (tf.constant(golden[n]) for n in ("image", "label"))
        scales = [n[-4:] for n in golden if n.startswith("scaled_image")]
        assert len(scales) == 7
        for scale in scales:
            size = augment.scaled_size(tf.shape(image)[:2], float(scale))
            np.testing.assert_allclose(
                augment.resize_image(image, size),
                golden[f"scaled_image_{scale}"],
                atol=1e-3,
            )
            np.testing.assert_array_equal(
                augment.resize_ids(label, size),
                golden[f"scaled_label_{scale}"],
            )
        ours = augment.resize_ids(label, tf.constant([19, 40]))
        np.testing.assert_array_equal(ours, golden["nearest_19x40"][0])


def test_padding_and_ranges_are_the_reference_s(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Bottom and right, mean grey and void; sides between two bounds."""
    ranged = PLAIN._replace(min_resize=41, max_resize=65, resize_factor=16)
    for golden in found(preprocessing_goldens(goldens)):
        image, label = (tf.constant(golden[n]) for n in ("image", "label"))
        padded = augment.pad(tf.cast(image, tf.float32), 65, 81, 127.5)
        np.testing.assert_allclose(padded, golden["eval_image_65x81"])
        padded = augment.pad(label, 65, 81, 255)
        np.testing.assert_array_equal(padded, golden["eval_label_65x81"])
        size = augment.range_size(tf.shape(image)[:2], ranged)
        np.testing.assert_allclose(
            augment.resize_image(image, size),
            golden["range41_65_f16_image"],
            atol=1e-3,
        )
        np.testing.assert_array_equal(
            augment.resize_ids(label, size), golden["range41_65_f16_label"]
        )


def test_mean_iou_and_colours_are_the_reference_s(
    goldens: Path, found: Callable[[list], list]
) -> None:
    """Over a confusion matrix with absent classes; the devkit's palette."""
    for golden in found(preprocessing_goldens(goldens)):
        classes = int(golden["miou_num_classes"])
        totals = metrics.picture_totals(
            np.eye(classes)[golden["miou_pred"]][np.newaxis],
            golden["miou_gt"].astype(int)[np.newaxis],
            golden["miou_weight"][np.newaxis],
        )
        np.testing.assert_array_equal(totals["confusion"], golden["confusion"])
        table = metrics.figures(totals)
        assert table["mean_iou"] == pytest.approx(float(golden["miou"]))
        palette = golden["pascal_colormap_256"]
        np.testing.assert_array_equal(visuals.palette(256), palette)


def test_figures_by_hand() -> None:
    """A class that is predicted but never labelled counts as 0."""
    confusion = np.array([[3, 1, 0, 0], [2, 4, 1, 0], [0] * 4, [0] * 4])
    table = metrics.figures({"confusion": confusion, "cross_entropy": 22.0})
    assert table["iou_per_class"] == [3 / 6, 4 / 8, 0.0, None]
    assert table["mean_iou"] == pytest.approx(1 / 3)
    assert (table["classes_in_mean"], table["classes_in_labels"]) == (3, 2)
    assert table["pixel_accuracy"] == 7 / 11
    assert table["cross_entropy"] == 2.0


def stream(start: int, take: int, rank: int = 0, size: int = 1) -> list:
    """(position, index) pairs of a stream over seven pictures."""
    data = dataset.index_stream(7, 5, start, rank, size).take(take)
    return [(int(position), int(index)) for position, index in data]


def test_stream_is_a_function_of_seed_and_position() -> None:
    """It resumes anywhere, and each epoch is a permutation of its own."""
    whole = stream(0, 28)
    assert [position for position, _ in whole] == list(range(28))
    assert stream(11, 17) == whole[11:]
    epochs = [
        [index for _, index in whole[first : first + 7]]
        for first in range(0, 28, 7)
    ]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_ranks_share_one_stream() -> None:
    """Eight ranks see disjoint samples that together are the stream."""
    # More ranks than pictures, so that one step crosses an epoch's end.
    parts = [stream(16, 3, rank, 8) for rank in range(8)]
    assert sorted(sum(parts, [])) == stream(16, 24)


def batches(pairs, recipe, batch_size, start, rank=0, size=1) -> dict:
    """The first batch of a stream."""
    data = dataset.training_batches(
        pairs, recipe, (5, 6, 8), 0.5, batch_size, 3, start, rank, size
    )
    assert data.element_spec["image"].shape == (batch_size, 65, 81, 3)
    assert data.element_spec["label"].shape == (batch_size, 65, 81)
    assert data.element_spec["valid"].shape == (batch_size, 65, 81)
    return next(iter(data))


@pytest.mark.parametrize("recipe", [PLAIN, RECIPE])
def test_batches_are_static_and_repeatable(
    pairs: list, recipe: Recipe
) -> None:
    """The same numbers from any start, for any number of ranks."""
    whole = batches(pairs, recipe, 4, 8)
    halves = [batches(pairs, recipe, 2, 8, rank, 2) for rank in range(2)]
    for name, value in whole.items():
        for rank, half in enumerate(halves):
            np.testing.assert_array_equal(half[name], value[rank::2])
    assert 0.0 <= np.min(whole["image"]) and np.max(whole["image"]) <= 255.0
    assert set(np.unique(whole["dropout_mask"])) == {0, 1}
    # What does not count is class 0, so that the loss can look it up.
    outside = whole["valid"].numpy() == 0.0
    assert outside.any() and not whole["label"].numpy()[outside].any()


def marked_sample(height: int, width: int) -> tuple[tf.Tensor, tf.Tensor]:
    """A picture whose channels are its label."""
    label = np.zeros((height, width, 1), np.uint8)
    label[5:30, 10:30] = 3
    label[-1, :] = 255
    image = np.repeat((label == 3) * np.uint8(90), 3, -1)
    return tf.constant(image), tf.constant(label)


def test_image_and_label_move_together() -> None:
    """A picture that shows its own label still does after augmentation."""
    image, label = marked_sample(50, 70)
    shown, mirrored, areas = 0, set(), set()
    for seed in range(24):
        key = tf.constant([seed, 9], tf.int64)
        sample = augment.augment(image, label, RECIPE, key)
        inside = sample["label"].numpy() == 3
        valid = sample["valid"].numpy() > 0
        shown += inside.any()
        areas.add(int(inside.sum()))
        pixels = sample["image"].numpy()
        # Edges are blurred by the resizing, a pixel or two on each side.
        agree = (abs(pixels[..., 0] - 90) < 45)[valid] == inside[valid]
        assert agree.mean() > 0.95
        np.testing.assert_array_equal(pixels.shape, (65, 81, 3))
        # The object lies on the left of the picture, whatever its scale.
        mirrored.add(
            bool(inside.any() and inside[:, :40].sum() * 2 < inside.sum())
        )
    assert shown > 16 and len(areas) > 4 and mirrored == {False, True}


def test_scales_come_in_steps() -> None:
    """Seven of them, or any, or one."""
    draws = np.linspace(0.0, 0.999, 50)
    scales = [float(augment.random_scale(draw, RECIPE)) for draw in draws]
    assert sorted(set(scales)) == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    smooth = RECIPE._replace(scale_step=0.0)
    scales = [float(augment.random_scale(draw, smooth)) for draw in draws]
    assert len(set(scales)) == 50 and 0.5 <= min(scales) < max(scales) < 2.0
    fixed = RECIPE._replace(min_scale=1.5, max_scale=1.5)
    assert float(augment.random_scale(0.7, fixed)) == 1.5


def test_padding_counts_nowhere() -> None:
    """Mean grey that no loss sees, at the bottom and on the right."""
    image, label = marked_sample(40, 50)
    sample = augment.augment(image, label, PLAIN, tf.zeros([2], tf.int64))
    valid = sample["valid"].numpy()
    # The last of the 40 rows is void in the label itself.
    assert valid[:39, :50].all() and not valid[39:].any()
    assert not valid[:, 50:].any()
    np.testing.assert_array_equal(sample["image"][40:], 127.5)


def test_augmentation_is_the_same_eager_and_in_tf_data() -> None:
    """What is tested eagerly is what training sees."""
    image, label = marked_sample(50, 70)
    key = tf.constant([1, 2], tf.int64)
    eager = augment.augment(image, label, RECIPE, key)
    data = tf.data.Dataset.from_tensors((image, label))
    data = data.map(lambda *each: augment.augment(*each, RECIPE, key))
    graph = next(iter(data))
    for name in eager:
        np.testing.assert_allclose(graph[name], eager[name], atol=1e-3)


def test_evaluation_takes_every_picture_once(pairs: list) -> None:
    """Over two ranks together, at the pictures' own size."""
    seen = []
    for rank in range(2):
        for batch in dataset.evaluation_batches(pairs, 255, rank, 2):
            assert batch["image"].shape == (1, 70, 90, 3)
            seen.append(batch["image"].numpy().sum())
    alone = [
        batch["image"].numpy().sum()
        for batch in dataset.evaluation_batches(pairs, 255)
    ]
    assert sorted(seen) == sorted(alone) and len(alone) == 5


def test_sizes_as_people_write_them() -> None:
    """The seed's comma, or an x; anything else is told in one line."""
    assert dataset.parse_size("513,513", "train_crop_size") == (513, 513)
    assert dataset.parse_size("65x97", "train_crop_size") == (65, 97)
    for wrong in ("480", "a,b", "8,900", "480,85400", "1,2,3", ""):
        with pytest.raises(UserError, match=f"--crop={wrong}: height"):
            dataset.parse_size(wrong, "crop")


def test_sample_data_hold_every_class(pairs: list) -> None:
    """Objects of all classes, with a border of void."""
    counts = np.zeros(256, int)
    for batch in dataset.evaluation_batches(pairs, -1):
        counts += np.bincount(batch["label"].numpy().ravel(), minlength=256)
    assert (counts[[0, 1, 2, 3, 4, 255]] > 0).all()
    assert counts[5:255].sum() == 0
