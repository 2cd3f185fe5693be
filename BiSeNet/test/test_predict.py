"""Prediction of pictures of any size, and what is written of it."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from BiSeNet import predict, visuals
from BiSeNet.classes import Classes
from BiSeNet.model import create_model
from common.npu_config import UserError

CLASSES = Classes(
    ("Road", "Car", "Void"), ((128, 64, 128), (64, 0, 128), (0, 0, 0)), (2,)
)


def test_prediction_keeps_the_picture_s_size() -> None:
    """Odd and portrait sizes; ids of classes."""
    tf.random.set_seed(0)
    network, _ = create_model(3)
    infer = predict.make_inference(network, (1.0,), False)
    rng = np.random.RandomState(0)
    for size in ((50, 70), (75, 107), (200, 90)):
        picture = rng.randint(0, 256, (*size, 3)).astype(np.uint8)
        predicted = infer(picture)
        assert predicted.shape == size and predicted.dtype == np.uint8
        wanted = tf.argmax(network(picture[np.newaxis].astype("f4")), -1)[0]
        # Another graph may round a pixel into a class as likely.
        assert (predicted == wanted.numpy()).mean() > 0.999


def test_inputs_by_file_folder_and_glob(tmp_path: Path) -> None:
    """Natural order, as the frames of a video come; pictures only."""
    for name in ("frame10.png", "frame9.png", "notes.txt", "z b.TIF"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in predict.find_inputs(str(tmp_path))]
    assert names == ["frame9.png", "frame10.png", "z b.TIF"]
    found = predict.find_inputs(str(tmp_path / "*.png"))
    assert [Path(path).name for path in found] == names[:2]
    with pytest.raises(UserError, match="no pictures found"):
        predict.find_inputs(str(tmp_path / "none*"))
    (tmp_path / "frame9.jpg").touch()
    with pytest.raises(UserError, match=r"9.jpg and .*9.png: the results"):
        predict.find_inputs(str(tmp_path))


def test_masks_keep_ids_and_colours(tmp_path: Path) -> None:
    """A palette picture: numbers for programs, colours for people."""
    label = np.array([[0, 1], [2, 1]], np.uint8)
    predict._save(
        "x/a b.jpg", str(tmp_path), np.zeros((2, 2, 3)), label, CLASSES
    )
    with Image.open(tmp_path / "a b_mask.png") as mask:
        np.testing.assert_array_equal(mask, label)
        colours = np.asarray(mask.convert("RGB"))
    np.testing.assert_array_equal(colours, visuals.palette(CLASSES)[label])
