"""Prediction at any size, within a region."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from common.npu_config import UserError
from ROI_FCN import dataset, pictures, predict, train, visuals, weights
from ROI_FCN.augment import Recipe
from ROI_FCN.model import create_model

RECIPE = Recipe("none", 64, 96, -1, 1.0, 0.0, 0.0, 0.0)


def test_logits_have_the_picture_s_own_size() -> None:
    """Odd sizes, and pictures larger than the canvas."""
    network, _ = create_model(3, 4, 8)
    rng = np.random.RandomState(0)
    for kind in ("none", "port"):
        infer = predict.make_inference(network, RECIPE._replace(kind=kind))
        for size in ((50, 70), (75, 107), (200, 90)):
            picture = rng.randint(0, 256, (*size, 3), np.uint8)
            region = np.ones(size, np.uint8)
            logits = infer(picture, region)
            assert logits.shape == (*size, 3)
            assert np.isfinite(logits).all()


def two_vessels(rng: np.random.RandomState) -> tuple:
    """A picture of two boxes, one dark and one light, and their outlines."""
    picture = rng.randint(90, 110, (64, 96, 3)).astype(np.uint8)
    boxes = []
    for left, value in ((6, 40), (54, 200)):
        top = rng.randint(5, 20)
        box = np.zeros((64, 96), np.uint8)
        box[top : top + 36, left : left + 34] = 1
        picture[box > 0] = value + rng.randint(-10, 10, 3)
        boxes.append(box)
    return picture, boxes


def test_moving_the_region_moves_the_prediction() -> None:
    """After some training, each of two vessels is found when asked for.

    The same picture with one region or the other: dark vessels are class 1,
    light ones 2, and the one that is not asked for is background.
    """
    tf.random.set_seed(0)
    network, _ = create_model(3, 8, 16)
    rng = np.random.RandomState(0)
    variables = list(weights.named_variables(network).values())
    optimizer = train.FusedAdam(2e-3, epsilon=1e-8)
    # Keras 2.6 has no build(): it makes the slots in the first step.
    getattr(optimizer, "build", lambda _: None)(variables)

    def step(images, regions, labels):
        with tf.GradientTape() as tape:
            logits = network([images, regions], training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            )
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables))
        return loss

    step = tf.function(step)
    for _ in range(120):
        samples = []
        for _ in range(2):
            picture, boxes = two_vessels(rng)
            for number, box in enumerate(boxes, 1):
                samples.append((picture, box, box * number))
        images, regions, labels = (np.stack(each) for each in zip(*samples))
        loss = step(
            tf.constant(images, tf.float32),
            tf.constant(regions[..., None], tf.float32),
            tf.constant(labels, tf.int32),
        )
    assert np.isfinite(float(loss))
    infer = predict.make_inference(network, RECIPE)
    picture, boxes = two_vessels(np.random.RandomState(99))
    for number, box in enumerate(boxes, 1):
        classes = infer(picture, box).argmax(-1)
        other = boxes[2 - number] > 0
        assert (classes == number)[box > 0].mean() > 0.8
        assert (classes == 0)[other].mean() > 0.8


def test_regions_by_file_and_folder(tmp_path: Path) -> None:
    """One PNG with the stem of each picture; what is missing is named."""
    roi = np.zeros((20, 30), np.uint8)
    roi[5:10] = 255
    Image.fromarray(roi).save(tmp_path / "a.png")
    assert pictures.find_roi("x/a.jpg", None) is None
    for where in (tmp_path, tmp_path / "a.png"):
        path = pictures.find_roi("x/a.jpg", str(where))
        np.testing.assert_array_equal(
            pictures.read_roi(path, (20, 30)), roi > 0
        )
    with pytest.raises(UserError, match="b.jpg: no region .*b.png"):
        pictures.find_roi("x/b.jpg", str(tmp_path))
    with pytest.raises(UserError, match="30x20 pixels, its picture has 20x30"):
        pictures.read_roi(str(tmp_path / "a.png"), (30, 20))


def test_inputs_by_file_folder_and_glob(tmp_path: Path) -> None:
    """Natural order, pictures only."""
    for name in ("10.png", "9.png", "notes.txt", "a b.TIF"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in predict.find_inputs(str(tmp_path))]
    assert names == ["9.png", "10.png", "a b.TIF"]
    found = predict.find_inputs(str(tmp_path / "*.png"))
    assert [Path(path).name for path in found] == ["9.png", "10.png"]
    with pytest.raises(UserError, match="no pictures found"):
        predict.find_inputs(str(tmp_path / "none*"))
    (tmp_path / "10.jpg").touch()
    with pytest.raises(UserError, match=r"10.jpg and .*10.png: the results"):
        predict.find_inputs(str(tmp_path))


def test_palette_keeps_the_reference_s_colours() -> None:
    """Background black, then the colours of the reference, then a formula."""
    colours = visuals.palette(17)
    assert colours[:4].tolist() == [
        [0, 0, 0],
        [255, 0, 0],
        [0, 0, 255],
        [0, 128, 0],
    ]
    red, green, blue = 15**2 + 4 * 15 + 5, 150, 15**3 + 7 * 225 + 45 + 30
    assert colours[15].tolist() == [red % 255, green, blue % 255]


def test_seed_s_sizes_parse() -> None:
    """The canvas of the seed's export."""
    assert dataset.parse_size("480,854", "canvas") == (480, 854)
