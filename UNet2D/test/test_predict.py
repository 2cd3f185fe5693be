"""Prediction at any size: tiles that leave no seam."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from UNet2D import augment, dataset, predict, visuals
from UNet2D.model import MARGIN, covering_side, create_model


@pytest.fixture(scope="module")
def network() -> tf.keras.Model:
    """A narrow network whose output varies from pixel to pixel."""
    network, _ = create_model(3, 1, 4, "he_normal")
    return network


def infer(network: tf.keras.Model):
    """Probabilities of a batch."""
    return tf.function(lambda tile: tf.nn.softmax(network(tile)))


@pytest.mark.parametrize("size", [(388, 388), (301, 215), (90, 420), (40, 1)])
def test_tiles_equal_one_pass(network: tf.keras.Model, size: tuple) -> None:
    """To 1e-4, over the whole picture, mirrored borders included."""
    image = np.random.RandomState(0).uniform(-1, 1, (*size, 1))
    image = image.astype(np.float32)
    padded = image
    for axis, length in enumerate(size):
        side = covering_side(length)
        indices = augment.mirror_indices(-MARGIN, side - MARGIN, length)
        padded = np.take(padded, indices, axis)
    whole = infer(network)(padded[None])[0].numpy()[: size[0], : size[1]]
    tiled = predict.predict_tiles(infer(network), image, 3, 252)
    assert tiled.shape == (*size, 3)
    np.testing.assert_allclose(tiled, whole, atol=1e-4)
    assert whole.std() > 1e-3


def test_tile_starts_cover_and_align() -> None:
    """Multiples of 16 that reach the end with overlap."""
    for length in (1, 36, 68, 69, 500, 1000):
        for output in (36, 68, 388):
            starts = predict.tile_starts(length, output)
            assert starts[-1] + output >= length
            assert all(start % 16 == 0 for start in starts)
            assert all(
                later - earlier <= output - predict.EDGE
                for earlier, later in zip(starts, starts[1:])
            )


def test_probabilities_come_back_at_the_picture_s_size(
    network: tf.keras.Model,
) -> None:
    """They are resized, then thresholded; rows still add up to one."""
    geometry = dataset.Geometry(252, 1, 3, "mirror", "half_pixel", -1)
    picture = np.random.RandomState(1).randint(0, 256, (77, 130, 1), np.uint8)
    maps = predict.predict_picture(
        infer(network), picture, (0.5, 0.75), geometry, 252
    )
    assert maps.shape == (77, 130, 3)
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-5)


def test_inputs_by_file_folder_and_glob(tmp_path: Path) -> None:
    """Natural order, pictures only."""
    for name in ("10.png", "9.png", "notes.txt", "a b.TIF"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in predict.find_inputs(str(tmp_path))]
    assert names == ["9.png", "10.png", "a b.TIF"]
    found = predict.find_inputs(str(tmp_path / "*.png"))
    assert [Path(path).name for path in found] == ["9.png", "10.png"]
    with pytest.raises(predict.UserError, match="no pictures found"):
        predict.find_inputs(str(tmp_path / "none*"))
    (tmp_path / "10.jpg").touch()
    with pytest.raises(
        predict.UserError, match=r"10.jpg and .*10.png: the results"
    ):
        predict.find_inputs(str(tmp_path))


def test_overlay_tints_what_was_found() -> None:
    """Class 0 stays as it is, and every other class gets a colour."""
    picture = np.full((2, 3, 3), 120, np.uint8)
    classes = np.array([[0, 1, 2], [0, 0, 1]])
    blended = visuals.overlay(picture, classes, 3)
    assert (blended[classes == 0] == 120).all()
    # Grey would be hard to tell from the picture.
    assert (np.ptp(blended[classes > 0], axis=-1) > 30).all()
    assert (blended[0, 1] != blended[0, 2]).any()
