"""Crops, augmentation and the stream of samples."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from BiSeNet import augment, dataset, pictures, sample_data
from BiSeNet.classes import UNKNOWN
from common.npu_config import UserError

RECIPE = augment.Recipe("reference", 64, 96, 0.5, 2.0, True)
PLAIN = RECIPE._replace(kind="none")
VALUES = {
    "ignore_label": -1,
    "unknown_colour": "error",
    "class_dict": None,
    "num_classes": None,
    "group_classes": "none",
    "ignore_classes": ["Void"],
}
WEIGHTS = [float(label != UNKNOWN) * (label + 1) for label in range(256)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Five pictures as read from disk."""
    path = str(tmp_path_factory.mktemp("streets"))
    sample_data.draw(path, count=5, height=70, width=90)
    return pictures.Reader({**VALUES, "data_path": path}).read("train")


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
    parts = [stream(16, 3, rank, 8) for rank in range(8)]
    assert sorted(sum(parts, [])) == stream(16, 24)


def batches(pairs, recipe, batch_size, start, rank=0, size=1) -> dict:
    """The first batch of a stream."""
    data = dataset.training_batches(
        pairs, recipe, WEIGHTS, batch_size, 3, start, rank, size
    )
    assert data.element_spec["image"].shape == (batch_size, 64, 96, 3)
    assert data.element_spec["label"].shape == (batch_size, 64, 96)
    assert data.element_spec["weight"].shape == (batch_size, 64, 96)
    return next(iter(data))


@pytest.mark.parametrize(
    "recipe", [PLAIN, RECIPE, RECIPE._replace(half_pixel=False)]
)
def test_batches_are_static_and_repeatable(
    pairs: list, recipe: augment.Recipe
) -> None:
    """The same numbers from any start, for any number of ranks."""
    whole = batches(pairs, recipe, 4, 8)
    halves = [batches(pairs, recipe, 2, 8, rank, 2) for rank in range(2)]
    for name, value in whole.items():
        for rank, half in enumerate(halves):
            np.testing.assert_array_equal(half[name], value[rank::2])
    assert 0.0 <= np.min(whole["image"]) and np.max(whole["image"]) <= 255.0
    labels = whole["label"].numpy()
    np.testing.assert_array_equal(whole["weight"], np.take(WEIGHTS, labels))


def test_pictures_too_many_for_the_memory_are_read_at_each_visit(
    pairs: list,
) -> None:
    """The same samples as from memory."""
    on_disk = [pair._replace(content=b"") for pair in pairs]
    for name, value in batches(pairs, RECIPE, 4, 0).items():
        np.testing.assert_array_equal(
            batches(on_disk, RECIPE, 4, 0)[name], value
        )


def marked_sample(height: int, width: int) -> tuple[tf.Tensor, tf.Tensor]:
    """A picture whose red channel shows its label."""
    label = np.full((height, width, 1), 1, np.uint8)
    label[5:30, 10:40] = 3
    image = np.repeat(label, 3, -1) * np.array([70, 0, 0], np.uint8)
    return tf.constant(image), tf.constant(label)


@pytest.mark.parametrize("half_pixel", [True, False])
def test_image_and_label_move_together(half_pixel: bool) -> None:
    """A picture that shows its own label still does after augmentation."""
    image, label = marked_sample(80, 120)
    recipe, shown = RECIPE._replace(half_pixel=half_pixel), 0
    for seed in range(12):
        key = tf.constant([seed, 9], tf.int64)
        sample = augment.augment(image, label, recipe, key)
        inside = sample["label"].numpy() == 3
        known = sample["label"].numpy() != UNKNOWN
        if not inside.any() or inside[known].all():
            continue
        shown += 1
        red = sample["image"].numpy()[..., 0]
        threshold = (red[inside].max() + red[known].min()) / 2
        # Edges are blurred by the resizing, a pixel or two on each side.
        agree = (red > threshold)[known] == inside[known]
        assert agree.mean() > 0.93
    assert shown >= 8


def test_scale_place_and_side_vary() -> None:
    """From half to twice the size, and what is left is at the far corner."""
    image, label = marked_sample(60, 90)
    shares, firsts = [], set()
    for seed in range(60):
        key = tf.constant([seed, 1], tf.int64)
        sample = augment.augment(image, label, RECIPE, key)
        known = sample["label"].numpy() != UNKNOWN
        rows, columns = np.nonzero(known)
        assert rows.min() == columns.min() == 0
        assert not sample["image"].numpy()[~known].any()
        shares.append((rows.max() + 1) / 60)
        columns = np.nonzero(sample["label"].numpy() == 3)[1]
        firsts.add(columns.min() if columns.size else None)
    assert 0.49 < min(shares) < 0.6 and max(shares) == 64 / 60
    # A third of the range from 0.5 to 2 is below 1.
    assert np.mean(np.array(shares) < 1.0) == pytest.approx(1 / 3, abs=0.15)
    assert len(firsts) > 20


def test_padding_is_as_wide_as_it_has_to_be() -> None:
    """Landscape and portrait pictures at their own scale."""
    key = tf.constant([0, 0], tf.int64)
    for height, width in ((40, 120), (120, 40), (64, 96), (200, 300)):
        image, label = marked_sample(height, width)
        sample = augment.augment(image, label, PLAIN, key)
        known = sample["label"].numpy() != UNKNOWN
        assert known.sum() == min(height, 64) * min(width, 96)


def test_none_cuts_without_changing_pixels() -> None:
    """A window of the very picture, somewhere in it."""
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (80, 110, 3)).astype(np.uint8)
    label = (image[..., :1] // 64).astype(np.uint8)
    places = set()
    for seed in range(8):
        key = tf.constant([seed, 0], tf.int64)
        sample = augment.augment(
            tf.constant(image), tf.constant(label), PLAIN, key
        )
        pixels = sample["image"].numpy()
        np.testing.assert_array_equal(pixels[..., 0] // 64, sample["label"])
        rows, columns = np.nonzero((image == pixels[0, 0]).all(-1))
        places.add((rows[0], columns[0]))
    assert len(places) > 4


def test_colours_in_either_order() -> None:
    """Brightness by up to 32, saturation by up to a half, then clipped."""
    image = tf.random.stateless_uniform([6, 6, 3], [0, 0], 60, 190)
    same = augment.change_colours(image, tf.constant([0.5, 0.5, 0.9]))
    np.testing.assert_allclose(same, image, atol=1e-2)
    brighter = augment.change_colours(image, tf.constant([1.0, 0.5, 0.0]))
    np.testing.assert_allclose(brighter, image + 32.0, atol=1e-2)
    orders = [
        augment.change_colours(image, tf.constant([0.0, 1.0, which]))
        for which in (0.0, 0.9)
    ]
    assert np.abs(orders[0] - orders[1]).max() > 1.0
    white = augment.change_colours(
        image * 0.0 + 250.0, tf.constant([1.0, 0.5, 0.9])
    )
    np.testing.assert_array_equal(white, np.full((6, 6, 3), 255.0))


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
    """Whole, at its own size, over two ranks together."""
    seen = []
    for rank in range(2):
        for batch in dataset.evaluation_batches(pairs, rank, 2):
            assert batch["image"].shape == (1, 70, 90, 3)
            assert batch["label"].shape == (1, 70, 90)
            seen.append(float(tf.reduce_sum(batch["image"])))
    alone = [
        float(tf.reduce_sum(batch["image"]))
        for batch in dataset.evaluation_batches(pairs)
    ]
    assert sorted(seen) == sorted(alone) and len(alone) == 5


def test_the_crop_fits_the_pictures(pairs: list) -> None:
    """Whole strides, so that the network pads nothing."""
    assert dataset.fitted_crop(pairs) == "64,64"
    wide = [pairs[0]._replace(size=(360, 480))]
    assert dataset.fitted_crop(wide) == "352,480"


def test_sizes_as_people_write_them() -> None:
    """A comma or an x; anything else is told in one line."""
    assert dataset.parse_size("352,480", "crop_size") == (352, 480)
    assert dataset.parse_size("64x96", "crop_size") == (64, 96)
    for wrong in ("480", "a,b", "8,900", "480,85400", "1,2,3", ""):
        with pytest.raises(UserError, match=f"--crop_size={wrong}: height"):
            dataset.parse_size(wrong, "crop_size")


def test_colour_alone_does_not_solve_the_sample_data(tmp_path: Path) -> None:
    """The likeliest class of each colour is often wrong."""
    sample_data.draw(str(tmp_path), count=60)
    reader = pictures.Reader({**VALUES, "data_path": str(tmp_path)})

    def colours(split):
        for pair in reader.read(split):
            # Eight levels a channel: more would know single pictures by heart.
            image = np.frombuffer(pair.content, np.uint8).astype(int) // 32
            image = image.reshape(-1, 3)
            codes = image[:, 0] * 64 + image[:, 1] * 8 + image[:, 2]
            yield codes, pictures.unpack_label(pair).ravel()

    counts = np.zeros((512, 7))
    for codes, label in colours("train"):
        np.add.at(counts, (codes, label), 1)
    assert (counts.sum(0) > 0).all()
    confusion = np.zeros((7, 7))
    for codes, label in colours("test"):
        np.add.at(confusion, (label, counts[codes].argmax(-1)), 1)
    hits = np.diag(confusion)
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits).clip(1)
    # Without Void, which is the last.
    assert iou[:-1].mean() < 0.4
