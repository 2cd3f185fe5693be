"""Canvas, augmentation and the stream of samples."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from common.npu_config import UserError
from ROI_FCN import augment, dataset, pictures, sample_data

RECIPE = augment.Recipe("paper", 64, 96, 255, 0.3, 0.0, 0.0, 0.0)
EVERYTHING = RECIPE._replace(crop=1.0, colour=1.0, noise=1.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Five pictures as read from disk."""
    path = str(tmp_path_factory.mktemp("vessels"))
    sample_data.draw(path, count=5, height=70, width=90)
    reader = pictures.Reader(path, "liquid_solid", 4, 255, False)
    return reader.read("Train_Images")


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
        pairs, recipe, (2, 2, 3, 8), 0.5, batch_size, 3, start, rank, size
    )
    assert data.element_spec["image"].shape == (batch_size, 64, 96, 3)
    assert data.element_spec["roi"].shape == (batch_size, 64, 96, 1)
    assert data.element_spec["label"].shape == (batch_size, 64, 96)
    return next(iter(data))


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE._replace(kind="none"),
        RECIPE._replace(kind="port"),
        RECIPE,
        EVERYTHING,
    ],
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
    assert set(np.unique(whole["dropout_mask"])) == {0, 1}
    # What is no picture is no region and does not count.
    outside = whole["valid"].numpy() == 0.0
    assert not whole["label"].numpy()[outside].any()
    assert not whole["roi"].numpy()[outside].any()
    if recipe.kind == "port":
        assert not outside.any()


def marked_sample(height: int, width: int) -> tuple:
    """A picture whose red channel is its label, as image and masks."""
    label = np.zeros((height, width, 1), np.uint8)
    label[5:30, 10:40] = 3
    label[-1, :] = 255
    image = np.repeat(label, 3, -1) * np.array([80, 0, 0], np.uint8)
    roi = ((label > 0) & (label < 255)).astype(np.uint8)
    return tf.constant(image), tf.constant(np.stack([label, roi]))


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE._replace(crop=1.0)])
def test_image_label_and_region_move_together(
    recipe: augment.Recipe,
) -> None:
    """A picture that shows its own label still does after augmentation."""
    image, masks = marked_sample(50, 70)
    shown = 0
    for seed in range(12):
        key = tf.constant([seed, 9], tf.int64)
        sample = augment.augment(image, masks, recipe, key)
        inside = sample["label"].numpy() == 3
        shown += inside.any()
        np.testing.assert_array_equal(
            sample["roi"][..., 0] > 0, sample["label"] > 0
        )
        pixels = sample["image"].numpy()
        valid = sample["valid"].numpy() > 0
        bright = pixels.max(-1)
        # Edges are blurred by the resizing, a pixel or two on each side.
        threshold = bright[inside].max() / 2
        agree = (bright > threshold)[valid] == inside[valid]
        assert agree.mean() > 0.93
    assert shown == 12


def test_paper_varies_scale_and_place_within_the_canvas() -> None:
    """From 0.3 to 1 of the picture, somewhere on the canvas."""
    image, masks = marked_sample(60, 90)
    shares, corners = [], set()
    for seed in range(40):
        key = tf.constant([seed, 1], tf.int64)
        valid = augment.augment(image, masks, RECIPE, key)["valid"].numpy()
        rows, columns = np.nonzero(valid)
        corners.add((rows.min(), columns.min()))
        shares.append((np.ptp(columns) + 1) / 90)
    # Scale and stretch together go down to 0.3 x 0.5.
    assert 0.15 < min(shares) < 0.35 and 0.8 < max(shares) <= 1.0
    assert len(corners) > 30


def test_port_and_none_do_what_they_say() -> None:
    """port fills the canvas; none keeps the scale, and shrinks to fit."""
    key = tf.constant([0, 0], tf.int64)
    image, masks = marked_sample(40, 50)
    port = augment.augment(image, masks, RECIPE._replace(kind="port"), key)
    expected = Image.fromarray(image.numpy()).resize((96, 64), Image.BILINEAR)
    np.testing.assert_allclose(port["image"], np.asarray(expected), atol=1.01)
    recipe = RECIPE._replace(kind="none")
    sample = augment.augment(image, masks, recipe, key)
    assert sample["valid"].numpy().sum() == 39 * 50  # the last row is ignored
    large, masks = marked_sample(128, 96)
    sample = augment.augment(large, masks, recipe, key)
    rows, columns = np.nonzero(sample["image"].numpy()[..., 0] > 200)
    assert np.ptp(rows) < 64 and np.ptp(columns) < 48


def test_ignored_pixels_do_not_count() -> None:
    """Their label is 0, so that the loss can look it up all the same."""
    image, masks = marked_sample(40, 50)
    recipe = RECIPE._replace(kind="none", height=40, width=50)
    sample = augment.augment(image, masks, recipe, tf.zeros([2], tf.int64))
    assert not sample["valid"][-1].numpy().any()
    assert sample["valid"][:-1].numpy().all()
    assert sample["label"].numpy().max() == 3


def test_crop_keeps_what_is_labelled() -> None:
    """A small object stays in sight in nearly all crops."""
    label = np.zeros((100, 120, 1), np.uint8)
    label[70:95, 90:115] = 2
    label[:30, :30] = 255  # ignored, so that it is not worth a window
    valid = (label != 255).astype(np.uint8)
    image, roi = tf.zeros([100, 120, 3]), tf.zeros([100, 120, 1], tf.uint8)
    sample = augment.Sample(image, tf.constant(label), roi, valid)
    whole = 0
    for seed in range(30):
        draws = tf.random.stateless_uniform([35], [seed, 0])
        cropped = augment.random_crop(sample, draws, 1.0)
        assert cropped.label.shape[0] >= 69 and cropped.label.shape[1] >= 83
        whole += (cropped.label.numpy() == 2).sum() >= 500
    assert whole >= 27
    draws = tf.ones([35]) * 0.5
    same = augment.random_crop(sample, draws, 0.0)
    assert same.label.shape == (100, 120, 1)


def test_colours_change_only_where_asked() -> None:
    """Shade and grey are the reference's; tints and noise are switches."""
    image = tf.random.stateless_uniform([8, 8, 3], [0, 0], 0, 255)
    still = tf.ones([11]) * 0.99
    same = augment.change_colours(
        image, still, RECIPE, tf.zeros([2], tf.int64)
    )
    np.testing.assert_allclose(same, image)
    grey = tf.tensor_scatter_nd_update(still, [[2]], [0.1])
    changed = augment.change_colours(
        image, grey, RECIPE, tf.zeros([2], tf.int64)
    ).numpy()
    np.testing.assert_allclose(changed[..., 0], changed[..., 2])
    shaded = tf.tensor_scatter_nd_update(still, [[0], [1]], [0.0, 0.1])
    changed = augment.change_colours(
        image, shaded, RECIPE, tf.zeros([2], tf.int64)
    )
    np.testing.assert_allclose(changed, 0.4 * image, rtol=1e-5)
    tinted = tf.zeros([11])
    for recipe in (RECIPE._replace(colour=1.0), RECIPE._replace(noise=1.0)):
        plain, changed = (
            augment.change_colours(image, tinted, each, [0, 1])
            for each in (RECIPE, recipe)
        )
        assert np.abs(plain - changed).max() > 1.0


def test_augmentation_is_the_same_eager_and_in_tf_data() -> None:
    """What is tested eagerly is what training sees."""
    image, masks = marked_sample(50, 70)
    key = tf.constant([1, 2], tf.int64)
    for recipe in (RECIPE, EVERYTHING):
        eager = augment.augment(image, masks, recipe, key)
        data = tf.data.Dataset.from_tensors((image, masks))
        graph = next(
            iter(data.map(lambda *each: augment.augment(*each, recipe, key)))  # noqa: B023
        )
        for name in eager:
            np.testing.assert_allclose(graph[name], eager[name], atol=1e-3)


def test_evaluation_sees_the_scale_of_training(pairs: list) -> None:
    """Labels keep their size; pictures larger than the canvas shrink."""
    for recipe, seen in (
        (RECIPE, (64, 82)),
        (RECIPE._replace(height=200, width=200), (70, 90)),
        (RECIPE._replace(kind="port"), (64, 96)),
    ):
        batch = next(iter(dataset.evaluation_batches(pairs, recipe)))
        assert batch["image"].shape[1:3] == seen
        assert batch["roi"].shape[1:3] == seen
        assert batch["label"].shape[1:] == (70, 90)
    batch = next(iter(dataset.evaluation_batches(pairs, RECIPE, (48, 80))))
    assert batch["image"].shape[1:3] == batch["label"].shape[1:] == (48, 80)


def test_evaluation_takes_every_picture_once(pairs: list) -> None:
    """Over two ranks together."""
    seen = []
    for rank in range(2):
        data = dataset.evaluation_batches(pairs, RECIPE, None, rank, 2)
        seen += [batch["image"].numpy().sum() for batch in data]
    alone = [
        batch["image"].numpy().sum()
        for batch in dataset.evaluation_batches(pairs, RECIPE)
    ]
    assert sorted(seen) == sorted(alone) and len(alone) == 5


def test_sizes_as_people_write_them() -> None:
    """The seed's comma, or an x; anything else is told in one line."""
    assert dataset.parse_size("480,854", "canvas") == (480, 854)
    assert dataset.parse_size("64x96", "canvas") == (64, 96)
    for wrong in ("480", "a,b", "8,900", "480,85400", "1,2,3", ""):
        with pytest.raises(UserError, match=f"--canvas={wrong}: height"):
            dataset.parse_size(wrong, "canvas")


def test_sample_data_keep_the_data_set_s_promises(tmp_path: Path) -> None:
    """Coarse labels follow from the exact ones, and regions too."""
    sample_data.draw(str(tmp_path), count=12)
    counts = np.zeros(4, int)
    twins = 0
    previous = None
    for path in sorted((tmp_path / "Train_Images").iterdir()):

        def read(folder, name=path.name):
            return np.asarray(Image.open(tmp_path / folder / name))

        exact, coarse = read("ExactPhaseLabels"), read("LiquidSolidLabels")
        np.testing.assert_array_equal(exact > 0, read("VesselLabels") == 1)
        np.testing.assert_array_equal(exact > 1, read("FillLevelLabels") == 2)
        np.testing.assert_array_equal(exact == 2, coarse == 2)
        np.testing.assert_array_equal(exact == 7, coarse == 3)
        counts += np.bincount(coarse.ravel(), minlength=4)
        picture = read("Train_Images")
        twins += previous is not None and (picture == previous).all()
        previous = picture
    assert (counts > 0).all()
    # The same picture with another region: two vessels in one scene.
    assert twins >= 2


def test_colour_alone_does_not_solve_the_sample_data(tmp_path: Path) -> None:
    """The likeliest class of each colour within the region is often wrong."""
    sample_data.draw(str(tmp_path), count=80)

    def colours(folder):
        for path in sorted((tmp_path / folder).iterdir()):
            label = Image.open(tmp_path / "LiquidSolidLabels" / path.name)
            label = np.asarray(label)
            bins = np.asarray(Image.open(path)).astype(int) // 32
            codes = bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]
            yield codes[label > 0], label[label > 0]

    counts = np.zeros((512, 4))
    for codes, label in colours("Train_Images"):
        np.add.at(counts, (codes, label), 1)
    confusion = np.zeros((4, 4))
    for codes, label in colours("Test_Images_All"):
        np.add.at(confusion, (label, counts[codes].argmax(-1)), 1)
    hits = np.diag(confusion)
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits).clip(1)
    assert iou[1:].mean() < 0.5
